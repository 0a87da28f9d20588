//! `scheduler`: closes batches, releases them, re-drives late work, expires results, seals the audit trail.

mod cancellations;
mod clock;
mod expiry;
mod keys;
mod lead;
mod markers;
mod measure;
mod options;
mod parts;
mod put_off;
mod redrive;
mod release;
mod retention;
mod schedule;
mod scheduler;
mod seal;
mod wakes;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "scheduler",
        about: "Closes batches, releases them as batch triggers, re-drives late work, expires results and seals the audit trail",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, schedule::run)
}
