//! `access-compiler`: compiles one access or portability request into a result file.

mod compile;
mod file;
mod options;
mod upload;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "access-compiler",
        about: "Compiles one access or portability request into a result file",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, compile::run)
}
