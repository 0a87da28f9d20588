//! The short form of the fault suite: harm that needs no servers of its own, and two planted defects.
#![allow(clippy::print_stdout, reason = "the report of a run is what explains a failure")]

use lethe_chaos::report::Report;
use lethe_chaos::run::Options;
use tokio::sync::Mutex;

/// One at a time, also where all of them are in one process: each runs a whole fleet.
async fn run(options: &Options) -> Report {
    static TURN: Mutex<()> = Mutex::const_new(());
    let _turn = TURN.lock().await;
    lethe_chaos::run::run(options).await
}

async fn holds(seed: u64) {
    let report = run(&Options::short(seed)).await;
    println!("{report}");
    assert!(report.violations.is_empty(), "repeat it: chaos --short --seed {seed} --seeds 1\n{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_run_has_no_violation() {
    holds(1).await;
}

async fn is_caught(defect: &str) {
    let report = run(&Options::short(1).with_defect(defect)).await;
    assert!(report.is_caught(), "the planted defect {defect} was not caught\n{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_wake_ups_that_nobody_makes_up_are_caught() {
    is_caught("publish_lost").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callbacks_out_of_order_are_caught() {
    is_caught("callbacks_out_of_order").await;
}
