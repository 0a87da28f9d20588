//! `callback-courier`: delivers signed status callbacks, with backoff.

mod claim;
mod deliver;
mod dispatch;
mod give_up;
mod load;
mod options;
mod record;
mod share;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "callback-courier",
        about: "Delivers signed status callbacks, with backoff",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, dispatch::run)
}
