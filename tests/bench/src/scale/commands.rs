//! The commands of the runbook, as an operator runs them.

use std::time::{Duration, Instant};

use lethe_testing::cli::lethe;

use super::{CONTROLLER, told};
use crate::bench::Bench;
use crate::report::Report;

const REACH: Duration = Duration::from_secs(2);

/// Those whose cost must not grow with what has ended.
const COMMANDS: [&[&str]; 21] = [
    &["top", "--once"],
    &["doctor"],
    &["clock", "show"],
    &["request", "list"],
    &["request", "list", "--controller", CONTROLLER],
    &["request", "list", "--status", "pending"],
    &["request", "list", "--status", "in_progress"],
    &["request", "list", "--status", "completed"],
    &["request", "list", "--status", "cancelled"],
    &["request", "list", "--awaiting-approval"],
    &["batch", "list"],
    &["batch", "show", "1"],
    &["endpoint", "list"],
    &["endpoint", "list", "--failing"],
    &["endpoint", "list", "--controller", CONTROLLER],
    &["callback", "list"],
    &["callback", "list", "--state", "exhausted"],
    &["callback", "list", "--state", "ready"],
    &["callback", "replay", "--controller", CONTROLLER],
    &["dead-letter", "list"],
    &["controller", "list"],
];

pub(crate) async fn times(bench: &Bench, size: u64, report: &mut Report) {
    for command in COMMANDS {
        let started = Instant::now();
        let ran = lethe(&bench.world, command).await;
        let took = started.elapsed();
        // Some end with 1 for what they find, or find nothing to do; none may fail in the database.
        let failed = if ran.err.contains("PostgreSQL said") { " (failed)" } else { "" };
        told(report, size, &format!("lethe {}{failed}", command.join(" ")), took, REACH);
    }
}
