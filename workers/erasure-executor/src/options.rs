//! What the erasure executor is configured with.

use clap::Args;
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::crypto::Keys;
use lethe_process::settings::{ConfigError, HumanDuration};
use lethe_runtime::options::parse_backoff;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Slices erased at once; one controller gets at most half, rounded up
    #[arg(long = "erasure-slices", env = "LETHE_ERASURE_SLICES", default_value_t = 4, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=64))]
    slices: u16,
    /// The wait after the first failure of a data store
    #[arg(long = "store-first-retry", env = "LETHE_STORE_FIRST_RETRY", default_value = "5s", value_name = "DURATION")]
    first_retry: HumanDuration,
    /// The longest wait between attempts on a data store
    #[arg(long = "store-max-retry", env = "LETHE_STORE_MAX_RETRY", default_value = "10m", value_name = "DURATION")]
    max_retry: HumanDuration,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) slices: u16,
    pub(crate) backoff: BackoffPolicy,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        None
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let backoff = parse_backoff("LETHE_STORE_FIRST_RETRY", self.first_retry, self.max_retry)?;
        Ok(Ready { slices: self.slices, backoff })
    }
}
