//! `scheduler`: closes batches, releases them, wakes for late work, expires results, seals the audit trail.

mod cancellations;
mod clock;
mod expiry;
mod keys;
mod lead;
mod markers;
mod measure;
mod options;
mod overdue;
mod parts;
mod put_off;
mod release;
mod retention;
mod schedule;
mod scheduler;
mod seal;
mod wakes;

use std::process::ExitCode;

use lethe_runtime::fleet::SCHEDULER;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&SCHEDULER, options::Options::check, schedule::run)
}
