//! The rows of the table. Each module has Lethe's side and the raw side next to each other.

pub(crate) mod callbacks;
pub(crate) mod compile;
mod end_to_end;
pub(crate) mod erasure;
mod idle;
pub(crate) mod intake;
mod latency;
pub(crate) mod raw;
pub(crate) mod release;

use clap::ValueEnum;

use crate::bench::Bench;
use crate::options::RowName;
use crate::report::Report;

/// Measures the rows of these names; all of them where there is none.
pub(crate) async fn run(bench: &mut Bench, names: &[RowName], report: &mut Report) {
    let names = if names.is_empty() { RowName::value_variants() } else { names };
    for name in names {
        let started = std::time::Instant::now();
        match name {
            RowName::Intake => report.row(intake::row(bench).await),
            RowName::Answers => report.row(intake::row_with_answers(bench).await),
            RowName::Erasure => report.row(erasure::row(bench).await),
            RowName::Compile => report.row(compile::row(bench).await),
            RowName::Callbacks => report.row(callbacks::row(bench).await),
            RowName::Release => report.row(release::row(bench).await),
            RowName::EndToEnd => report.row(end_to_end::row(bench).await),
            RowName::Latency => latency::facts(bench, report).await,
            RowName::Idle => idle::facts(bench, report).await,
        }
        println!("  {name:?} took {:.0} s with all its preparations", started.elapsed().as_secs_f64());
    }
}
