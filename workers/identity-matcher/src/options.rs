//! What the identity matcher is configured with.

use clap::Args;
use lethe_domain::crypto::Keys;
use lethe_intake::options::{Receiving, ReceivingOptions};
use lethe_process::settings::ConfigError;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    receiving: ReceivingOptions,
    /// Groups of requests handled at once; each takes a channel and a database connection
    #[arg(long = "intake-consumers", env = "LETHE_INTAKE_CONSUMERS", default_value_t = 2, value_name = "NUMBER",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    consumers: u8,
    /// Maximum number of requests in a group
    #[arg(long = "intake-group", env = "LETHE_INTAKE_GROUP", default_value_t = 256, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=4_096))]
    group: u16,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) receiving: Receiving,
    pub(crate) consumers: u8,
    pub(crate) group: u16,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.receiving.keys)
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        Ok(Ready { receiving: self.receiving.check()?, consumers: self.consumers, group: self.group })
    }
}
