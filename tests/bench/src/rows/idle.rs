//! A fleet that has nothing to do: start-up and memory of each worker, CPU of all of them, transactions of PostgreSQL.

use std::time::{Duration, Instant};

use lethe_testing::Worker;

use crate::bench::{Bench, DAILY};
use crate::meter::median;
use crate::report::Report;
use crate::servers;

pub(crate) async fn facts(bench: &Bench, report: &mut Report) {
    bench.clean().await;
    bench.calendar(DAILY).await;
    for name in lethe_testing::worker::queue_workers() {
        let mut seconds = Vec::new();
        for _ in 0..bench.sizes.runs {
            let started = Instant::now();
            let worker = bench.workers(&[name], DAILY).await;
            seconds.push(started.elapsed().as_secs_f64());
            for worker in worker {
                Worker::stop(worker).await;
            }
        }
        report.fact(format!("start-up of {name}"), format!("{:.2} s", median(seconds).unwrap()), "≤ 0.5 s");
    }
    let fleet = bench.workers(&lethe_testing::worker::queue_workers(), DAILY).await;
    // The beginning is not idleness.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let pids: Vec<u32> = fleet.iter().map(Worker::id).collect();
    let cpu_before = servers::of_processes(&pids).cpu;
    let transactions_before = transactions(bench).await;
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(bench.sizes.idle_seconds)).await;
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = servers::of_processes(&pids).cpu.saturating_sub(cpu_before).as_secs_f64() / elapsed;
    // One of them is our own look.
    let per_second = (transactions(bench).await - transactions_before - 1) as f64 / elapsed;
    for (worker, name) in fleet.iter().zip(lethe_testing::worker::queue_workers()) {
        let memory = servers::resident_memory(worker.id());
        let text = memory.map_or("–".to_owned(), |bytes| format!("{:.1} MiB", bytes as f64 / 1_048_576.0));
        report.fact(format!("resident memory of {name}"), text, "≤ 20 MiB");
    }
    report.fact("CPU of an idle fleet", format!("{:.2} % of a core", cpu * 100.0), "≤ 1 % of a core");
    report.fact("transactions of an idle fleet", format!("{per_second:.1} /s"), "–");
    for worker in fleet {
        worker.stop().await;
    }
}

/// Transactions of our database so far. PostgreSQL's sessions report what they did at most once a second.
async fn transactions(bench: &Bench) -> i64 {
    bench.count("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()").await
}
