//! The benchmark of Lethe. Each row does the same work twice, alternately: with Lethe's release binaries, and with a raw
//! program that does the bare minimum with the same servers and the same libraries. What counts is the ratio of the two,
//! taken in one run on one machine.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark that cannot go on ends, and its figures go to the screen"
)]
#![allow(clippy::cast_precision_loss, reason = "counts, bytes and durations become rates")]

mod bench;
mod broker;
mod gain;
mod growth;
mod meter;
mod options;
mod people;
mod receiver;
mod report;
mod requests;
mod rows;
mod scale;
mod servers;

use clap::Parser;

use crate::bench::Bench;
use crate::options::{Command, Options};
use crate::report::Report;

#[tokio::main]
async fn main() {
    let options = Options::parse();
    if let Command::Gain { before, names } = &options.command {
        gain::run(before, names, &options.arguments(), options.sizes().runs, &options.output);
        return;
    }
    let mut report = Report::new(&options);
    let mut bench = Bench::new(options.sizes()).await;
    report.conditions(&bench).await;
    match &options.command {
        Command::Rows { names } => rows::run(&mut bench, names, &mut report).await,
        Command::Scale { names } => scale::run(&mut bench, names, &mut report).await,
        Command::Growth { names } => growth::run(&mut bench, names, &mut report).await,
        Command::Gain { .. } => {}
    }
    println!("{report}");
    println!("written to {}", report.write(&options.output).display());
}
