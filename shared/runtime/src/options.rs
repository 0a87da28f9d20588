//! The options, in groups; each process takes the groups that it needs.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::callback_url::AddressPolicy;
use lethe_domain::request::{Calendar, Schedule};
use lethe_process::settings::{ConfigError, HumanDuration};

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What every process takes.
#[derive(Clone, Debug, Args)]
pub struct CommonOptions {
    /// Address for /metrics, /livez and /readyz; port 0 picks a free port
    #[arg(long = "admin-listen", env = "LETHE_ADMIN_LISTEN", value_name = "ADDRESS")]
    pub admin_listen: Option<SocketAddr>,
    /// Folder in which the process writes its admin address, as NAME-PID.addr
    #[arg(long = "run-dir", env = "LETHE_RUN_DIR", value_name = "FOLDER")]
    pub run_dir: Option<PathBuf>,
    /// How log lines are written
    #[arg(long = "log-format", env = "LETHE_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged, for example `info` or `lethe=debug,info`
    #[arg(long = "log", env = "LETHE_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How long a process that is told to stop may take to finish its current work
    #[arg(long = "drain-timeout", env = "LETHE_DRAIN_TIMEOUT", default_value = "30s", value_name = "DURATION")]
    pub drain_timeout: HumanDuration,
    /// Maximum number of connections to PostgreSQL
    #[arg(long = "database-connections", env = "LETHE_DATABASE_CONNECTIONS", default_value_t = 8, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub database_connections: u16,
}

/// The blast-radius cap.
#[derive(Clone, Copy, Debug, Args)]
pub struct CapOptions {
    /// A request that matches more profiles than this waits for an operator
    #[arg(long = "max-mpids-per-request", env = "LETHE_MAX_MPIDS_PER_REQUEST", default_value_t = 1_000, value_name = "NUMBER",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_mpids_per_request: u32,
}

/// Where callbacks may go.
#[derive(Clone, Debug, Args)]
pub struct AddressOptions {
    /// CIDRs, and the word http, that callbacks may use in addition to public https
    #[arg(long = "callback-allow", env = "LETHE_CALLBACK_ALLOW", default_value = "", value_name = "LIST")]
    pub callback_allow: AddressPolicy,
}

/// Where the master key lies.
#[derive(Clone, Debug, Args)]
pub struct KeyOptions {
    /// File with 32 bytes in base64: the root of all keys at rest and of result tokens
    #[arg(long = "master-key-file", env = "LETHE_MASTER_KEY_FILE", value_name = "FILE")]
    pub master_key_file: PathBuf,
}

impl KeyOptions {
    /// Reads the master key and derives all keys.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn keys(&self) -> Result<Keys, ConfigError> {
        let path = self.master_key_file.display();
        let text = std::fs::read_to_string(&self.master_key_file)
            .map_err(|error| ConfigError::new("LETHE_MASTER_KEY_FILE", format!("cannot read {path}: {error}")))?;
        Keys::from_master_key(&text).map_err(|error| ConfigError::new("LETHE_MASTER_KEY_FILE", error))
    }
}

/// The calendar; the scheduler stores it in the database, where every other process reads it.
#[derive(Clone, Debug, Args)]
pub struct CalendarOptions {
    /// When an erasure batch closes (cron, UTC)
    #[arg(
        long = "erasure-schedule",
        env = "LETHE_ERASURE_SCHEDULE",
        default_value = "30 12 * * MON",
        value_name = "CRON"
    )]
    pub erasure_schedule: Schedule,
    /// Time from the closing of a batch to its execution
    #[arg(
        long = "erasure-waiting-period",
        env = "LETHE_ERASURE_WAITING_PERIOD",
        default_value = "7d",
        value_name = "DURATION"
    )]
    pub erasure_waiting_period: HumanDuration,
    /// When erasures that skip the waiting period run (cron, UTC)
    #[arg(
        long = "expedited-schedule",
        env = "LETHE_EXPEDITED_SCHEDULE",
        default_value = "30 12 * * *",
        value_name = "CRON"
    )]
    pub expedited_schedule: Schedule,
    /// When access and portability batches run (cron, UTC)
    #[arg(
        long = "access-schedule",
        env = "LETHE_ACCESS_SCHEDULE",
        default_value = "5 0 * * MON,THU",
        value_name = "CRON"
    )]
    pub access_schedule: Schedule,
    /// Added to the scheduled time to give `expected_completion_time`
    #[arg(long = "completion-margin", env = "LETHE_COMPLETION_MARGIN", default_value = "48h", value_name = "DURATION")]
    pub completion_margin: HumanDuration,
}

impl CalendarOptions {
    /// The calendar that these options describe.
    #[must_use]
    pub fn calendar(&self) -> Calendar {
        Calendar {
            erasure: self.erasure_schedule.clone(),
            expedited: self.expedited_schedule.clone(),
            access: self.access_schedule.clone(),
            waiting_period: self.erasure_waiting_period.signed(),
            completion_margin: self.completion_margin.signed(),
        }
    }
}

/// A backoff from two settings.
///
/// # Errors
/// [`ConfigError`] for `setting` unless `0 < first <= max`.
pub fn parse_backoff(
    setting: &'static str,
    first: HumanDuration,
    max: HumanDuration,
) -> Result<BackoffPolicy, ConfigError> {
    BackoffPolicy::new(first.get(), max.get()).map_err(|error| ConfigError::new(setting, error))
}
