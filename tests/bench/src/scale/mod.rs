//! Years of data: what a scheduler and an operator wait for once millions of requests have ended. Each row is measured at each
//! size; a row needs a name in [`ScaleName`], a module here, and a line in [`run`].

mod commands;
mod schedule;
mod work;

use std::time::{Duration, Instant};

use clap::ValueEnum;
use lethe_testing::history::History;

use crate::bench::Bench;
use crate::options::ScaleName;
use crate::report::Report;

/// Whose requests they are.
const CONTROLLER: &str = "history";

/// Fills the tables up to each size, and measures the rows of these names there; all of them where there is none.
pub(crate) async fn run(bench: &mut Bench, names: &[ScaleName], report: &mut Report) {
    let names = if names.is_empty() { ScaleName::value_variants() } else { names };
    let controller = bench.world.controller(CONTROLLER).await;
    let mut made = 0;
    let sizes = [bench.sizes.scale_requests, bench.sizes.most_scale_requests];
    for size in sizes.into_iter().filter(|size| *size > 0) {
        if size <= made {
            continue;
        }
        let started = Instant::now();
        let number = |count: u64| u32::try_from(count).unwrap();
        let endpoints = number(bench.sizes.scale_endpoints);
        // A week of a large controller is a batch.
        let more =
            History { requests: number(size - made), batches: number((size - made).div_ceil(20_000)), endpoints };
        more.make(&bench.world, &controller).await;
        made = size;
        println!("{size} requests, made in {:.0} s", started.elapsed().as_secs_f64());
        for name in names {
            match name {
                ScaleName::Round => schedule::round(bench, size, report).await,
                ScaleName::Lateness => schedule::lateness(bench, size, report).await,
                ScaleName::Commands => commands::times(bench, size, report).await,
                ScaleName::Neighbour => work::neighbour(bench, size, report).await,
                ScaleName::Large => work::large(bench, size, report).await,
            }
        }
    }
}

/// A figure against what is to be reached.
pub(crate) fn told(report: &mut Report, size: u64, what: &str, took: Duration, reach: Duration) {
    let verdict = if took <= reach { "" } else { " (missed)" };
    let figure = format!("{:.0} ms{verdict}", took.as_secs_f64() * 1e3);
    report.fact(format!("{what}, {size} requests"), figure, format!("≤ {} ms", reach.as_millis()));
}
