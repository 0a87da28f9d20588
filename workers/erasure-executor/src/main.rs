//! `erasure-executor`: erases one slice of a batch from every data store.

mod erase;
mod options;

use std::process::ExitCode;

use lethe_runtime::service::{self, Identity};

fn main() -> ExitCode {
    let identity = Identity {
        name: "erasure-executor",
        about: "Erases one slice of a batch from every data store",
        version: env!("CARGO_PKG_VERSION"),
        role: None,
    };
    service::run(identity, options::Options::check, erase::run)
}
