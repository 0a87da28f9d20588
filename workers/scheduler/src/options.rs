//! What the scheduler is configured with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use lethe::audit::{Sealer, Signatory};
use lethe::config::{
    CalendarOptions, CapOptions, ConfigError, HumanDuration, KeyOptions, ResultOptions, SigningOptions,
};
use lethe::crypto::Keys;
use lethe::request::Calendar;
use lethe::results::day_keys::DayKeys;
use lethe::results::store::{self, Store};

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    calendar: CalendarOptions,
    #[command(flatten)]
    cap: CapOptions,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    results: ResultOptions,
    #[command(flatten)]
    signing: SigningOptions,
    /// Certificates that signed the audit trail before the present one; their chains are continued
    #[arg(long = "audit-former-certs", env = "LETHE_AUDIT_FORMER_CERTS", value_delimiter = ',', value_name = "FILES")]
    former_certificates: Vec<PathBuf>,
    /// How often it looks for what is due
    #[arg(
        long = "scheduler-interval",
        env = "LETHE_SCHEDULER_INTERVAL",
        default_value = "500ms",
        value_name = "DURATION"
    )]
    interval: HumanDuration,
    /// How long work that is due may lie untouched before it is driven again; doubles with each time, up to 5 minutes
    #[arg(long = "redrive-after", env = "LETHE_REDRIVE_AFTER", default_value = "10s", value_name = "DURATION")]
    redrive_after: HumanDuration,
    /// How long after its end a request keeps identities, profiles, group and callback URLs
    #[arg(long = "retention", env = "LETHE_RETENTION", default_value = "30d", value_name = "DURATION")]
    retention: HumanDuration,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) calendar: Calendar,
    pub(crate) cap: u32,
    pub(crate) keys: Arc<Keys>,
    pub(crate) results: Store,
    pub(crate) day_keys: DayKeys,
    pub(crate) interval: Duration,
    pub(crate) redrive_after: Duration,
    pub(crate) retention: Duration,
    pub(crate) sealer: Sealer,
}

impl lethe::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.keys)
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let positive = |setting, duration: HumanDuration| {
            let duration = duration.get();
            if duration.is_zero() { Err(ConfigError::new(setting, "must be more than zero")) } else { Ok(duration) }
        };
        let keys = Arc::new(self.keys.keys()?);
        let results = store::open("LETHE_RESULT_STORE", &self.results.result_store)?;
        let key_store = store::open("LETHE_KEY_STORE", &self.results.key_store)?;
        let signatory = Signatory::new(self.signing.processor()?, &self.former_certificates)
            .map_err(|error| ConfigError::new("LETHE_AUDIT_FORMER_CERTS", error))?;
        Ok(Ready {
            calendar: self.calendar.calendar(),
            cap: self.cap.max_mpids_per_request,
            day_keys: DayKeys::new(key_store, keys.clone()),
            keys,
            results,
            interval: positive("LETHE_SCHEDULER_INTERVAL", self.interval)?,
            redrive_after: positive("LETHE_REDRIVE_AFTER", self.redrive_after)?,
            retention: self.retention.get(),
            sealer: Sealer::new(Arc::new(signatory)),
        })
    }
}
