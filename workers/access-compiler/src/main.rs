//! `access-compiler`: compiles one access or portability request into a result file.

mod compile;
mod file;
mod options;
mod upload;

use std::process::ExitCode;

use lethe_runtime::fleet::ACCESS_COMPILER;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&ACCESS_COMPILER, options::Options::check, compile::run)
}
