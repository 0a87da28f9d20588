//! How cost grows. Each point is a line of a curve; `tests/bench/plot.sh` draws them.

mod event_batches;
mod identities;
mod memory;
mod workers;

use clap::ValueEnum;

use crate::bench::Bench;
use crate::meter::{Run, median};
use crate::options::CurveName;
use crate::report::Report;

/// Measures the curves of these names; all of them where there is none.
pub(crate) async fn run(bench: &mut Bench, names: &[CurveName], report: &mut Report) {
    let names = if names.is_empty() { CurveName::value_variants() } else { names };
    for name in names {
        match name {
            CurveName::Identities => identities::curve(bench, report).await,
            CurveName::EventBatches => event_batches::curve(bench, report).await,
            CurveName::Workers => workers::curve(bench, report).await,
            CurveName::Memory => memory::curve(bench, report).await,
        }
    }
}

/// 10^5, 10^6 and so on, up to the given number.
fn powers_of_ten(from: u64, most: u64) -> Vec<u64> {
    std::iter::successors(Some(from), |n| n.checked_mul(10)).take_while(|n| *n <= most).collect()
}

fn rate(runs: &[Run]) -> f64 {
    median(runs.iter().map(Run::rate)).unwrap()
}

fn mebibytes(bytes: Option<u64>) -> f64 {
    bytes.map_or(f64::NAN, |bytes| bytes as f64 / 1_048_576.0)
}
