//! `identity-matcher`: takes requests, cancellations and queries in over AMQP.

mod handlers;
mod options;
mod responder;

use std::process::ExitCode;

use lethe_runtime::fleet::IDENTITY_MATCHER;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&IDENTITY_MATCHER, options::Options::check, handlers::run)
}
