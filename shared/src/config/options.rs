//! The options, in groups; each process takes the groups that it needs.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use url::Url;

use super::{ConfigError, HumanDuration};
use crate::backoff::BackoffPolicy;
use crate::callback::address::AddressPolicy;
use crate::callback::signature::Signer;
use crate::crypto::Keys;
use crate::opendsr::{DeniedValues, Parser};
use crate::request::{Calendar, Schedule};

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
    /// Address for /metrics, /livez and /readyz; port 0 takes a free one
    #[arg(long = "admin-listen", env = "LETHE_ADMIN_LISTEN", value_name = "ADDRESS")]
    pub admin_listen: Option<SocketAddr>,
    /// Folder in which the process writes its admin address, as <name>-<pid>.addr
    #[arg(long = "run-dir", env = "LETHE_RUN_DIR", value_name = "FOLDER")]
    pub run_dir: Option<PathBuf>,
    /// How log lines are written
    #[arg(long = "log-format", env = "LETHE_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged, as in `info` or `lethe=debug,info`
    #[arg(long = "log", env = "LETHE_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How long a process that is told to stop may finish what it has in hand
    #[arg(long = "drain-timeout", env = "LETHE_DRAIN_TIMEOUT", default_value = "30s", value_name = "DURATION")]
    pub drain_timeout: HumanDuration,
    /// Connections to PostgreSQL at most
    #[arg(long = "database-connections", env = "LETHE_DATABASE_CONNECTIONS", default_value_t = 8, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub database_connections: u16,
}

/// How requests are read.
#[derive(Clone, Debug, Args)]
pub struct IntakeOptions {
    /// The domain in headers, certificate and extensions
    #[arg(long = "processor-domain", env = "LETHE_PROCESSOR_DOMAIN", value_name = "DOMAIN")]
    pub processor_domain: String,
    /// Further keys under `extensions` that are read as ours
    #[arg(
        long = "extension-domains",
        env = "LETHE_EXTENSION_DOMAINS",
        value_delimiter = ',',
        value_name = "DOMAINS",
        default_value = "opendsr.mparticle.com,opengdpr.mparticle.com"
    )]
    pub extension_domains: Vec<String>,
    /// Identity values that name nobody, beside empty, null and all zeros
    #[arg(long = "denied-identities", env = "LETHE_DENIED_IDENTITIES", value_delimiter = ',', value_name = "VALUES")]
    pub denied_identities: Vec<String>,
    /// CIDRs, and the word http, that callbacks may use beyond public https
    #[arg(long = "callback-allow", env = "LETHE_CALLBACK_ALLOW", default_value = "", value_name = "LIST")]
    pub callback_allow: AddressPolicy,
}

/// The blast-radius cap.
#[derive(Clone, Copy, Debug, Args)]
pub struct CapOptions {
    /// A request that matches more profiles than this waits for an operator
    #[arg(long = "max-mpids-per-request", env = "LETHE_MAX_MPIDS_PER_REQUEST", default_value_t = 1_000, value_name = "NUMBER",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_mpids_per_request: u32,
}

impl IntakeOptions {
    /// The parser of requests.
    #[must_use]
    pub fn parser(&self) -> Parser {
        let mut domains = vec![self.processor_domain.clone()];
        domains.extend(self.extension_domains.iter().map(|domain| domain.trim().to_owned()));
        domains.sort();
        domains.dedup();
        Parser {
            extension_domains: domains,
            denied: DeniedValues::new(self.denied_identities.iter().map(String::as_str)),
            addresses: self.callback_allow.clone(),
        }
    }

    /// The processor's domain, once it is plausible.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn domain(&self) -> Result<String, ConfigError> {
        let plausible = url::Host::parse(&self.processor_domain).is_ok() && !self.processor_domain.contains(['/', ':']);
        if plausible {
            Ok(self.processor_domain.to_ascii_lowercase())
        } else {
            Err(ConfigError::new("LETHE_PROCESSOR_DOMAIN", "must be a domain such as privacy.example.com"))
        }
    }
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

/// What signs.
#[derive(Clone, Debug, Args)]
pub struct SigningOptions {
    /// Base of `results_url` and of the certificate's address
    #[arg(long = "public-url", env = "LETHE_PUBLIC_URL", value_name = "URL")]
    pub public_url: Url,
    /// RSA key that signs, PKCS#8 PEM
    #[arg(long = "signing-key-file", env = "LETHE_SIGNING_KEY_FILE", value_name = "FILE")]
    pub signing_key_file: PathBuf,
    /// X.509 chain of that key, PEM
    #[arg(long = "signing-cert-file", env = "LETHE_SIGNING_CERT_FILE", value_name = "FILE")]
    pub signing_cert_file: PathBuf,
    /// P-256 key for controllers that are set to ECDSA, PKCS#8 PEM
    #[arg(
        long = "signing-ec-key-file",
        env = "LETHE_SIGNING_EC_KEY_FILE",
        value_name = "FILE",
        requires = "signing_ec_cert_file"
    )]
    pub signing_ec_key_file: Option<PathBuf>,
    /// X.509 chain of that key, PEM
    #[arg(
        long = "signing-ec-cert-file",
        env = "LETHE_SIGNING_EC_CERT_FILE",
        value_name = "FILE",
        requires = "signing_ec_key_file"
    )]
    pub signing_ec_cert_file: Option<PathBuf>,
}

impl SigningOptions {
    /// Reads the keys, and checks that domain, public URL and certificate agree.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn signer(&self, domain: &str) -> Result<Signer, ConfigError> {
        let invalid = |error| ConfigError::new("LETHE_SIGNING_KEY_FILE", error);
        let mut signer = Signer::load(&self.signing_key_file, &self.signing_cert_file).map_err(invalid)?;
        if let (Some(key), Some(certificate)) = (&self.signing_ec_key_file, &self.signing_ec_cert_file) {
            let invalid = |error| ConfigError::new("LETHE_SIGNING_EC_KEY_FILE", error);
            signer = signer.with_ec(key, certificate).map_err(invalid)?;
        }
        let host = self.public_url.host_str().unwrap_or_default();
        if !host.eq_ignore_ascii_case(domain) {
            let problem = format!("its host {host} is not LETHE_PROCESSOR_DOMAIN ({domain})");
            return Err(ConfigError::new("LETHE_PUBLIC_URL", problem));
        }
        // Tests and demos run on local addresses, for which nobody issues certificates.
        let local = domain == "localhost" || domain.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if !local && !signer.certificate().covers(domain) {
            let names = signer.certificate().names.join(", ");
            let problem = format!("the certificate names {names}, not LETHE_PROCESSOR_DOMAIN ({domain})");
            return Err(ConfigError::new("LETHE_SIGNING_CERT_FILE", problem));
        }
        Ok(signer)
    }
}

/// Where result files and their keys lie.
#[derive(Clone, Debug, Args)]
pub struct ResultOptions {
    /// Where result files go: file://, s3://, gs:// or az://
    #[arg(
        long = "result-store",
        env = "LETHE_RESULT_STORE",
        default_value = "file:///var/lib/lethe/results",
        value_name = "URL"
    )]
    pub result_store: Url,
    /// Where the keys of the days of expiry lie, outside PostgreSQL
    #[arg(
        long = "key-store",
        env = "LETHE_KEY_STORE",
        default_value = "file:///var/lib/lethe/keys",
        value_name = "URL"
    )]
    pub key_store: Url,
    /// How long a result link works
    #[arg(long = "result-lifetime", env = "LETHE_RESULT_LIFETIME", default_value = "7d", value_name = "DURATION")]
    pub result_lifetime: HumanDuration,
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
    /// From a batch's closing to its execution
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
    /// Added to the scheduled time for `expected_completion_time`
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
