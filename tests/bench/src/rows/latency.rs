//! Latency: one request on an idle fleet, from the moment it is published until its callback `pending` arrives.

use std::time::{Duration, Instant};

use super::intake::{PEOPLE, people};
use crate::bench::{Bench, DAILY};
use crate::broker::Link;
use crate::meter::percentile;
use crate::receiver::Receivers;
use crate::report::Report;
use crate::requests;

/// The fleet has nothing to do for so long before each request.
const PAUSE: Duration = Duration::from_millis(50);
/// Requests before those that count: connections are made, statements prepared.
const WARM_UP: u64 = 10;

pub(crate) async fn facts(bench: &Bench, report: &mut Report) {
    people(bench, PEOPLE, bench.sizes.profiles).await;
    bench.clean().await;
    let receivers = Receivers::start(1).await;
    let link = Link::connect(bench).await;
    let workers = bench.workers(&lethe_testing::worker::queue_workers(), DAILY).await;
    let controllers = [PEOPLE.to_owned()];
    let mut milliseconds = Vec::new();
    let made = requests::erasures(WARM_UP + bench.sizes.single_requests, bench.sizes.profiles, &receivers.urls);
    for (index, one) in made.chunks(1).enumerate() {
        tokio::time::sleep(PAUSE).await;
        let arrived = receivers.expect(1);
        let started = Instant::now();
        link.publish(&controllers, "dsr.requests", None, one).await;
        arrived.await;
        if index as u64 >= WARM_UP {
            milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (percent, reach) in [(50, "≤ 15 ms"), (99, "≤ 50 ms")] {
        let figure = percentile(milliseconds.iter().copied(), percent).unwrap();
        report.fact(format!("latency p{percent}"), format!("{figure:.1} ms"), reach);
    }
    for worker in workers {
        worker.stop().await;
    }
}
