//! What the gateway is configured with.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use lethe_audit::Signatory;
use lethe_domain::crypto::Keys;
use lethe_intake::options::{Receiving, ReceivingOptions};
use lethe_process::settings::{ConfigError, HumanDuration};
use lethe_results::ResultOptions;
use lethe_results::day_keys::DayKeys;
use lethe_results::store::{self, Store};

use crate::tls::TlsFiles;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    receiving: ReceivingOptions,
    #[command(flatten)]
    results: ResultOptions,
    /// The address that controllers connect to; port 0 picks a free port
    #[arg(long = "http-listen", env = "LETHE_HTTP_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Certificate chain for https, PEM; read again when it changes
    #[arg(long = "tls-cert-file", env = "LETHE_TLS_CERT_FILE", value_name = "FILE", requires = "tls_key_file")]
    tls_cert_file: Option<PathBuf>,
    /// Key of that certificate, PEM
    #[arg(long = "tls-key-file", env = "LETHE_TLS_KEY_FILE", value_name = "FILE", requires = "tls_cert_file")]
    tls_key_file: Option<PathBuf>,
    /// CIDRs of reverse proxies whose X-Forwarded-For is trusted
    #[arg(long = "trusted-proxies", env = "LETHE_TRUSTED_PROXIES", value_delimiter = ',', value_name = "CIDRS")]
    trusted_proxies: Vec<IpNet>,
    /// Maximum number of connections; further ones wait until one closes. Each takes a file descriptor
    #[arg(long = "http-connections", env = "LETHE_HTTP_CONNECTIONS", default_value_t = 512, value_name = "NUMBER",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Maximum number of calls handled at once; further ones are answered with 503
    #[arg(long = "http-calls", env = "LETHE_HTTP_CALLS", default_value_t = 256, value_name = "NUMBER",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    calls: u32,
    /// Maximum number of downloads at once; further ones are answered with 503
    #[arg(long = "http-downloads", env = "LETHE_HTTP_DOWNLOADS", default_value_t = 64, value_name = "NUMBER",
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    downloads: u32,
    /// How long a client may take to send its header, to send its body, and to read the next piece of an answer
    #[arg(long = "http-timeout", env = "LETHE_HTTP_TIMEOUT", default_value = "30s", value_name = "DURATION")]
    timeout: HumanDuration,
    /// Maximum number of calls from one controller per second; further ones are answered with 429
    #[arg(
        long = "rate-per-controller",
        env = "LETHE_RATE_PER_CONTROLLER",
        default_value = "500",
        value_name = "NUMBER"
    )]
    rate_per_controller: NonZeroU32,
    /// Maximum number of calls from one address per second (IPv6: one /64); further ones are answered with 429
    #[arg(long = "rate-per-address", env = "LETHE_RATE_PER_ADDRESS", default_value = "500", value_name = "NUMBER")]
    rate_per_address: NonZeroU32,
    /// Maximum number of credentials from one address verified per minute, besides those verified up to 30 s before
    #[arg(long = "logins-per-address", env = "LETHE_LOGINS_PER_ADDRESS", default_value = "120", value_name = "NUMBER")]
    logins_per_address: NonZeroU32,
}

/// How much the gateway takes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) connections: usize,
    pub(crate) calls: usize,
    pub(crate) downloads: usize,
    pub(crate) timeout: Duration,
    pub(crate) rate_per_controller: NonZeroU32,
    pub(crate) rate_per_address: NonZeroU32,
    pub(crate) logins_per_address: NonZeroU32,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) receiving: Receiving,
    pub(crate) signatory: Arc<Signatory>,
    pub(crate) results: Store,
    pub(crate) day_keys: DayKeys,
    pub(crate) listen: SocketAddr,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) bounds: Bounds,
}

impl lethe_runtime::service::Ready for Ready {
    fn keys(&self) -> Option<&Keys> {
        Some(&self.receiving.keys)
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let receiving = self.receiving.check()?;
        let results = store::open_to_read("LETHE_RESULT_STORE", &self.results.result_store)?;
        let key_store = store::open_to_read("LETHE_KEY_STORE", &self.results.key_store)?;
        let tls = self.tls_cert_file.zip(self.tls_key_file).map(|(certificate, key)| TlsFiles { certificate, key });
        if let Some(files) = &tls {
            files.load().map_err(|error| ConfigError::new("LETHE_TLS_CERT_FILE", error))?;
        }
        if self.timeout.get().is_zero() {
            return Err(ConfigError::new("LETHE_HTTP_TIMEOUT", "must be more than zero"));
        }
        // Tried here, so that an address already in use is reported before anything connects.
        std::net::TcpListener::bind(self.listen).map_err(|error| {
            ConfigError::new("LETHE_HTTP_LISTEN", format!("cannot listen on {}: {error}", self.listen))
        })?;
        let signatory = Signatory::new(receiving.processor.clone(), &[])
            .map_err(|error| ConfigError::new("LETHE_SIGNING_CERT_FILE", error))?;
        let number = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        Ok(Ready {
            day_keys: DayKeys::new(key_store, receiving.keys.clone()),
            receiving,
            signatory: Arc::new(signatory),
            results,
            listen: self.listen,
            tls,
            trusted_proxies: self.trusted_proxies,
            bounds: Bounds {
                connections: number(self.connections),
                calls: number(self.calls),
                downloads: number(self.downloads),
                timeout: self.timeout.get(),
                rate_per_controller: self.rate_per_controller,
                rate_per_address: self.rate_per_address,
                logins_per_address: self.logins_per_address,
            },
        })
    }
}
