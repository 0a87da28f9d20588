//! Configuration from the environment (contract 2): options, secrets, durations.
//!
//! Everything is read and checked before anything connects; what is wrong ends the process with exit code 64 and a
//! sentence that says what to fix.

mod duration;
mod options;
mod receiving;
mod secret;
mod signing;

pub use duration::{HumanDuration, InvalidDuration};
pub use options::{
    CalendarOptions, CapOptions, CommonOptions, KeyOptions, LogFormat, ResultOptions, parse_backoff,
    without_empty_variable,
};
pub use receiving::{AddressOptions, IntakeOptions, Receiving, ReceivingOptions};
pub use secret::{SecretError, secret};
pub use signing::{Processor, SigningOptions};

/// The configuration is wrong. The message says which setting, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct ConfigError {
    /// The environment variable.
    pub setting: &'static str,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl ConfigError {
    /// `setting` is wrong because of `problem`.
    pub fn new(setting: &'static str, problem: impl std::fmt::Display) -> Self {
        Self { setting, problem: problem.to_string() }
    }
}
