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

use lethe_runtime::fleet::CALLBACK_COURIER;
use lethe_runtime::service;

fn main() -> ExitCode {
    service::run(&CALLBACK_COURIER, options::Options::check, dispatch::run)
}
