//! `gateway`: serves OpenDSR v1, v2 and v3, and downloads, over HTTP (contract 9).

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
mod signatures;
mod state;
mod tls;

use std::process::ExitCode;

use lethe_runtime::fleet::GATEWAY;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&GATEWAY, options::Options::check, serve::run)
}
