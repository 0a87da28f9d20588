//! What the callback courier is configured with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use lethe_db::callbacks::{EndpointLimits, RetryPolicy};
use lethe_delivery::{CallbackClient, DELIVERY_TIMEOUT, system_lookup};
use lethe_domain::crypto::Keys;
use lethe_domain::result_link::Links;
use lethe_process::settings::{ConfigError, HumanDuration};
use lethe_runtime::options::{AddressOptions, KeyOptions, parse_backoff};
use lethe_signing::{Processor, SigningOptions};

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    addresses: AddressOptions,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    signing: SigningOptions,
    /// The wait after the first failed attempt
    #[arg(
        long = "callback-first-retry",
        env = "LETHE_CALLBACK_FIRST_RETRY",
        default_value = "30s",
        value_name = "DURATION"
    )]
    first_retry: HumanDuration,
    /// The longest wait between attempts
    #[arg(
        long = "callback-max-retry",
        env = "LETHE_CALLBACK_MAX_RETRY",
        default_value = "6h",
        value_name = "DURATION"
    )]
    max_retry: HumanDuration,
    /// How long to try a callback before it is exhausted, and a silent endpoint before giving up on it
    #[arg(long = "callback-give-up", env = "LETHE_CALLBACK_GIVE_UP", default_value = "72h", value_name = "DURATION")]
    give_up: HumanDuration,
    /// Deliveries in flight at once in this process
    #[arg(long = "callback-deliveries", env = "LETHE_CALLBACK_DELIVERIES", default_value_t = 1_024, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    deliveries: u16,
    /// Deliveries in flight at once to one endpoint, across all couriers
    #[arg(long = "callback-deliveries-per-endpoint", env = "LETHE_CALLBACK_DELIVERIES_PER_ENDPOINT", default_value_t = 8, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=1_000))]
    deliveries_per_endpoint: u16,
    /// Deliveries in flight at once to the endpoints of one controller, in this process; by default an
    /// eighth of all, but at least enough for two endpoints
    #[arg(long = "callback-deliveries-per-controller", env = "LETHE_CALLBACK_DELIVERIES_PER_CONTROLLER", value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    deliveries_per_controller: Option<u16>,
    /// Consecutive failures of an endpoint after which only one delivery at a time probes it
    #[arg(long = "callback-breaker", env = "LETHE_CALLBACK_BREAKER", default_value_t = 10, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    breaker: u16,
    /// The longest wait between the probes of such an endpoint
    #[arg(
        long = "callback-max-probe",
        env = "LETHE_CALLBACK_MAX_PROBE",
        default_value = "5m",
        value_name = "DURATION"
    )]
    max_probe: HumanDuration,
    /// PEM file of certificates that are trusted in addition to those of the system
    #[arg(long = "callback-ca-file", env = "LETHE_CALLBACK_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) processor: Processor,
    pub(crate) keys: Arc<Keys>,
    pub(crate) links: Links,
    pub(crate) client: CallbackClient,
    pub(crate) policy: RetryPolicy,
    pub(crate) limits: EndpointLimits,
    pub(crate) deliveries: u16,
    /// The share of one controller in them.
    pub(crate) share: u16,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.keys)
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let keys = Arc::new(self.keys.keys()?);
        let processor = self.signing.processor()?;
        let links = Links::new(keys.clone(), processor.public_url.clone());
        let client =
            CallbackClient::new(self.addresses.callback_allow.clone(), system_lookup(), self.ca_file.as_deref())?;
        let probe_max = self.max_probe.max(self.first_retry);
        let policy = RetryPolicy {
            backoff: parse_backoff("LETHE_CALLBACK_FIRST_RETRY", self.first_retry, self.max_retry)?,
            give_up: self.give_up.get(),
            breaker_threshold: self.breaker.into(),
            probe: parse_backoff("LETHE_CALLBACK_MAX_PROBE", self.first_retry, probe_max)?,
            // The longest wait before a probe and the time it takes; doubled to allow for a courier that restarts.
            longest_pause: 2 * (probe_max.get() + DELIVERY_TIMEOUT),
        };
        let share = self.deliveries_per_controller.unwrap_or_else(|| self.eighth()).min(self.deliveries);
        let limits = EndpointLimits {
            in_flight: self.deliveries_per_endpoint.into(),
            lease: DELIVERY_TIMEOUT + Duration::from_secs(30),
        };
        Ok(Ready { processor, keys, links, client, policy, limits, deliveries: self.deliveries, share })
    }

    /// One controller's share, unless another one is given.
    fn eighth(&self) -> u16 {
        (self.deliveries / 8).max(self.deliveries_per_endpoint.saturating_mul(2))
    }
}
