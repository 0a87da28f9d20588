//! `scheduler`: closes batches, releases them, re-drives late work, expires results, seals the audit trail.

mod expiry;
mod leadership;
mod options;
mod redrive;
mod release;
mod schedule;
mod seal;

use std::process::ExitCode;

use lethe::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "scheduler",
        about: "Closes batches, releases them as batch triggers, re-drives late work, expires results and seals the audit trail",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, schedule::run)
}
