//! The scheduler beside years of data: how long a round takes, and how late a batch is released.

use std::time::{Duration, Instant};

use jiff::SignedDuration;
use lethe_testing::Worker;

use super::told;
use crate::bench::{Bench, DAILY};
use crate::report::Report;
use crate::requests;

const ROUND: Duration = Duration::from_millis(200);
const LATE: Duration = Duration::from_secs(2);
/// Rounds that are watched.
const ROUNDS: f64 = 40.0;
const PEOPLE: &str = "people";

/// The value of a metric.
async fn metric(worker: &Worker, name: &str) -> f64 {
    let text = worker.get("/metrics").await.map(|(_, text)| text).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    line.unwrap_or(0.0)
}

async fn scheduler(bench: &Bench) -> Worker {
    let settings: Vec<_> = DAILY.iter().chain(&[("LETHE_SCHEDULER_INTERVAL", "100ms")]).copied().collect();
    let mut workers = bench.workers(&["scheduler"], &settings).await;
    let worker = workers.remove(0);
    while metric(&worker, "lethe_schedule_round_seconds_count").await < 2.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    worker
}

/// The mean of some rounds, and what most of them stay under, by the bucket that they fall in.
pub(crate) async fn round(bench: &Bench, size: u64, report: &mut Report) {
    let worker = scheduler(bench).await;
    while metric(&worker, "lethe_schedule_round_seconds_count").await < ROUNDS {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (count, sum) = (
        metric(&worker, "lethe_schedule_round_seconds_count").await,
        metric(&worker, "lethe_schedule_round_seconds_sum").await,
    );
    told(report, size, "a round of the scheduler, mean", Duration::from_secs_f64(sum / count), ROUND);
    let text = worker.get("/metrics").await.map(|(_, text)| text).unwrap_or_default();
    let buckets = text.lines().filter_map(|line| {
        let (limit, passed) = line.strip_prefix("lethe_schedule_round_seconds_bucket{le=\"")?.split_once("\"} ")?;
        Some((limit.parse::<f64>().ok()?, passed.parse::<f64>().ok()?))
    });
    let most = buckets.into_iter().find(|(limit, passed)| limit.is_finite() && *passed >= 0.95 * count);
    let most = Duration::from_secs_f64(most.map_or(3_600.0, |(limit, _)| limit));
    told(report, size, "a round of the scheduler, 19 of 20 within", most, ROUND);
    let failures = text.lines().filter(|line| line.starts_with("lethe_scheduler_failures_total")).count();
    report.fact(format!("parts of the scheduler that failed, {size} requests"), failures.to_string(), "0");
    worker.stop().await;
}

/// How late a small batch is released, from the moment at which it is due.
pub(crate) async fn lateness(bench: &Bench, size: u64, report: &mut Report) {
    if bench.count(&format!("SELECT count(*) FROM lethe.controllers WHERE controller_id = '{PEOPLE}'")).await == 0 {
        bench.world.controller(PEOPLE).await;
    }
    bench.calendar(DAILY).await;
    let made = requests::erasures(500, 1_000, &[]);
    requests::record(bench, PEOPLE, made).await;
    let tick: jiff::Timestamp =
        bench.world.one("SELECT max(tick_at) FROM lethe.batches WHERE state = 'open'", &[]).await;
    let worker = scheduler(bench).await;
    let started = Instant::now();
    bench.set_clock(tick.checked_add(SignedDuration::from_secs(1)).unwrap()).await;
    while bench.count("SELECT count(*) FROM lethe.batches WHERE state IN ('open', 'closed')").await > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    told(report, size, "lateness of a release", started.elapsed(), LATE);
    worker.stop().await;
    bench.world.run("UPDATE lethe.clock SET shift = '0'").await;
}
