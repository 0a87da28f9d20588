//! What the access compiler is configured with.

use std::sync::Arc;

use clap::Args;
use jiff::SignedDuration;
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::crypto::Keys;
use lethe_process::settings::{ConfigError, HumanDuration};
use lethe_results::ResultOptions;
use lethe_results::day_keys::DayKeys;
use lethe_results::store::{self, Store};
use lethe_runtime::options::{KeyOptions, parse_backoff};
use url::Url;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    results: ResultOptions,
    /// How long a result link works
    #[arg(long = "result-lifetime", env = "LETHE_RESULT_LIFETIME", default_value = "7d", value_name = "DURATION")]
    result_lifetime: HumanDuration,
    /// Files compiled at once; one controller gets at most half, rounded up; each takes up to about 20 MiB of memory
    #[arg(long = "compilations", env = "LETHE_COMPILATIONS", default_value_t = 4, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=64))]
    compilations: u16,
    /// The wait after the first failure
    #[arg(long = "store-first-retry", env = "LETHE_STORE_FIRST_RETRY", default_value = "5s", value_name = "DURATION")]
    first_retry: HumanDuration,
    /// The longest wait between attempts
    #[arg(long = "store-max-retry", env = "LETHE_STORE_MAX_RETRY", default_value = "10m", value_name = "DURATION")]
    max_retry: HumanDuration,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) keys: Arc<Keys>,
    pub(crate) results: Store,
    pub(crate) results_url: Url,
    pub(crate) day_keys: DayKeys,
    pub(crate) key_store: Store,
    pub(crate) key_store_url: Url,
    pub(crate) lifetime: SignedDuration,
    pub(crate) compilations: u16,
    pub(crate) backoff: BackoffPolicy,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.keys)
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let keys = Arc::new(self.keys.keys()?);
        let results = store::open("LETHE_RESULT_STORE", &self.results.result_store)?;
        let key_store = store::open("LETHE_KEY_STORE", &self.results.key_store)?;
        if self.result_lifetime.get().is_zero() {
            return Err(ConfigError::new("LETHE_RESULT_LIFETIME", "must be more than zero"));
        }
        Ok(Ready {
            results,
            results_url: self.results.result_store,
            day_keys: DayKeys::new(key_store.clone(), keys.clone()),
            key_store,
            key_store_url: self.results.key_store,
            keys,
            lifetime: self.result_lifetime.signed(),
            compilations: self.compilations,
            backoff: parse_backoff("LETHE_STORE_FIRST_RETRY", self.first_retry, self.max_retry)?,
        })
    }
}
