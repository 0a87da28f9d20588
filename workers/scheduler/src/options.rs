//! What the scheduler is configured with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use jiff::SignedDuration;
use lethe_audit::Signatory;
use lethe_db::put_off::Longest;
use lethe_db::{callbacks, details, results};
use lethe_domain::crypto::Keys;
use lethe_domain::request::Calendar;
use lethe_process::settings::{ConfigError, HumanDuration};
use lethe_results::ResultOptions;
use lethe_results::day_keys::DayKeys;
use lethe_results::store::{self, Store};
use lethe_runtime::options::{CalendarOptions, CapOptions, KeyOptions};
use lethe_signing::SigningOptions;
use url::Url;

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
    /// How often the scheduler looks for what is due
    #[arg(
        long = "scheduler-interval",
        env = "LETHE_SCHEDULER_INTERVAL",
        default_value = "500ms",
        value_name = "DURATION"
    )]
    interval: HumanDuration,
    /// How long work that is due may lie untouched before it is woken again; doubles each time, up to 5 minutes
    #[arg(long = "redrive-after", env = "LETHE_REDRIVE_AFTER", default_value = "10s", value_name = "DURATION")]
    redrive_after: HumanDuration,
    /// How long a request keeps its identities, profiles, group and callback URLs after it has ended
    #[arg(long = "retention", env = "LETHE_RETENTION", default_value = "30d", value_name = "DURATION")]
    retention: HumanDuration,
    /// How long its records (callbacks, receipts, results) stay after its end; its id, digest and status stay for good
    #[arg(long = "record-retention", env = "LETHE_RECORD_RETENTION", default_value = "1095d", value_name = "DURATION")]
    record_retention: HumanDuration,
    /// The same as on the couriers: once the retention and this time are over, no callback keeps personal data
    #[arg(long = "callback-give-up", env = "LETHE_CALLBACK_GIVE_UP", default_value = "72h", value_name = "DURATION")]
    give_up: HumanDuration,
    /// The same as the couriers': no callback is put off for longer
    #[arg(
        long = "callback-max-retry",
        env = "LETHE_CALLBACK_MAX_RETRY",
        default_value = "6h",
        value_name = "DURATION"
    )]
    callback_max_retry: HumanDuration,
    /// The same as the couriers': no endpoint is held for longer
    #[arg(
        long = "callback-max-probe",
        env = "LETHE_CALLBACK_MAX_PROBE",
        default_value = "5m",
        value_name = "DURATION"
    )]
    callback_max_probe: HumanDuration,
    /// The same as that of executors and compilers: no slice is put off for longer
    #[arg(long = "store-max-retry", env = "LETHE_STORE_MAX_RETRY", default_value = "10m", value_name = "DURATION")]
    store_max_retry: HumanDuration,
    /// If no scheduler has led for longer than this, the next one to lead needs `lethe clock agree`
    #[arg(long = "clock-absence", env = "LETHE_CLOCK_ABSENCE", default_value = "24h", value_name = "DURATION")]
    clock_absence: HumanDuration,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) calendar: Calendar,
    pub(crate) cap: u32,
    pub(crate) keys: Arc<Keys>,
    pub(crate) results: Store,
    pub(crate) results_url: Url,
    pub(crate) day_keys: DayKeys,
    pub(crate) key_store: Store,
    pub(crate) key_store_url: Url,
    pub(crate) interval: Duration,
    pub(crate) redrive_after: Duration,
    pub(crate) retention: Duration,
    /// How long a week of details is.
    pub(crate) details_span: SignedDuration,
    pub(crate) record_retention: Duration,
    pub(crate) give_up: Duration,
    /// What is put off for longer was put off by a clock that was ahead.
    pub(crate) longest: Longest,
    pub(crate) clock_absence: SignedDuration,
    pub(crate) signatory: Arc<Signatory>,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.keys)
    }
}

impl Options {
    /// Never shorter than the waits that are built into the code, whatever the settings.
    fn longest(&self) -> Longest {
        Longest {
            callback: self.callback_max_retry.get().max(callbacks::UNREADABLE),
            // The first of its waits may be the longest, and is at most that of a callback.
            endpoint: self.callback_max_probe.get().max(self.callback_max_retry.get()),
            slice: self.store_max_retry.get().max(Duration::from_mins(10)),
            object: results::LONGEST_WAIT,
        }
    }

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
        // The purge comes first: what is removed has nothing personal left.
        if self.record_retention < self.retention {
            return Err(ConfigError::new("LETHE_RECORD_RETENTION", "must not be shorter than LETHE_RETENTION"));
        }
        let longest = self.longest();
        Ok(Ready {
            calendar: self.calendar.calendar(),
            cap: self.cap.max_mpids_per_request,
            day_keys: DayKeys::new(key_store.clone(), keys.clone()),
            key_store,
            key_store_url: self.results.key_store,
            keys,
            results,
            results_url: self.results.result_store,
            interval: positive("LETHE_SCHEDULER_INTERVAL", self.interval)?,
            redrive_after: positive("LETHE_REDRIVE_AFTER", self.redrive_after)?,
            retention: self.retention.get(),
            details_span: details::span(self.retention.signed()),
            record_retention: self.record_retention.get(),
            give_up: self.give_up.get(),
            longest,
            clock_absence: self.clock_absence.signed(),
            signatory: Arc::new(signatory),
        })
    }
}
