//! `identity-matcher`: takes requests, cancellations and queries in over AMQP.

mod desk;
mod handlers;
mod options;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "identity-matcher",
        about: "Takes requests in, validates and records them, and resolves identities to profiles",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, handlers::run)
}
