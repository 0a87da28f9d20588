//! The rows of the table. Each module has Lethe's side and the raw side next to each other.

pub(crate) mod callbacks;
pub(crate) mod compile;
mod end_to_end;
pub(crate) mod erasure;
mod http;
mod idle;
mod import;
pub(crate) mod intake;
mod latency;
pub(crate) mod raw;
pub(crate) mod release;
mod writes;

use clap::ValueEnum;

use crate::bench::Bench;
use crate::options::RowName;
use crate::report::Report;
use erasure::Layout;

/// Measures the rows of these names; all of them where there is none.
pub(crate) async fn run(bench: &mut Bench, names: &[RowName], report: &mut Report) {
    let names = if names.is_empty() { RowName::value_variants() } else { names };
    for name in names {
        let started = std::time::Instant::now();
        match name {
            RowName::Intake => report.row(intake::row(bench).await),
            RowName::Answers => report.row(intake::row_with_answers(bench).await),
            RowName::Controllers => report.row(intake::row_of_many_controllers(bench).await),
            RowName::Erasure => {
                for layout in [Layout::Scattered, Layout::Ordered] {
                    report.row(erasure::row(bench, layout).await);
                }
            }
            RowName::Compile => report.row(compile::row(bench).await),
            RowName::Callbacks => report.row(callbacks::row(bench).await),
            RowName::OneEndpoint => report.row(callbacks::row_of_one_endpoint(bench).await),
            RowName::Release => release::rows(bench).await.into_iter().for_each(|row| report.row(row)),
            RowName::EndToEnd => report.row(end_to_end::row(bench).await),
            RowName::Import => import::rows(bench).await.into_iter().for_each(|row| report.row(row)),
            RowName::Http => http::facts(bench, report).await,
            RowName::Writes => writes::facts(bench, report).await,
            RowName::Latency => latency::facts(bench, report).await,
            RowName::Idle => idle::facts(bench, report).await,
        }
        println!("  {name:?} took {:.0} s with all its preparations", started.elapsed().as_secs_f64());
    }
}
