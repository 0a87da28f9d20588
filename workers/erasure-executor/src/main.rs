//! `erasure-executor`: erases one slice of a batch from every data store.

mod erase;
mod options;

use std::process::ExitCode;

use lethe_runtime::fleet::ERASURE_EXECUTOR;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&ERASURE_EXECUTOR, options::Options::check, erase::run)
}
