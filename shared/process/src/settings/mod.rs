//! Configuration from the environment (contract 2): options, secrets, durations.
//!
//! Everything is read and checked before anything connects; what is wrong ends the process with exit code 64 and a
//! sentence that says what to fix.

mod duration;
mod secret;

pub use duration::{HumanDuration, InvalidDuration};
pub use secret::secret;

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

/// An option whose variable is set to nothing is as good as without one: compose files and charts write `VARIABLE=` for
/// what is not set (contract 2).
#[must_use]
pub fn without_empty_variable(argument: clap::Arg) -> clap::Arg {
    let is_empty = |name| std::env::var_os(name).is_some_and(|value| value.is_empty());
    if argument.get_env().is_some_and(is_empty) { argument.env(clap::builder::Resettable::Reset) } else { argument }
}
