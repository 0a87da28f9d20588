//! `gateway`: OpenDSR v1, v2 and v3 over HTTP, and the downloads (contract 9).

mod answers;
mod authentication;
mod calls;
mod certificate;
mod client_address;
mod discovery;
mod downloads;
mod groups;
mod limits;
mod openapi;
mod options;
mod ranges;
mod refusal;
mod routes;
mod schemas;
mod serve;
mod state;
mod tls;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "gateway",
        about: "OpenDSR v1, v2 and v3 over HTTP, and the downloads",
        version: env!("CARGO_PKG_VERSION"),
        role: Some("lethe_gateway"),
    };
    service::run(identity, options::Options::check, serve::run)
}
