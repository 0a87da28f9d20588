//! Who the processor is, and what signs for it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use jiff::Timestamp;
use url::Url;

use crate::signature::Signer;
use crate::signing_keys::SigningKeys;
use lethe_process::settings::ConfigError;

/// What signs.
#[derive(Clone, Debug, Args)]
pub struct SigningOptions {
    /// The domain in headers, certificate and extensions
    #[arg(long = "processor-domain", env = "LETHE_PROCESSOR_DOMAIN", value_name = "DOMAIN")]
    processor_domain: String,
    /// Base of `results_url` and of the certificate's address
    #[arg(long = "public-url", env = "LETHE_PUBLIC_URL", value_name = "URL")]
    public_url: Url,
    /// RSA key that signs, PKCS#8 PEM
    #[arg(long = "signing-key-file", env = "LETHE_SIGNING_KEY_FILE", value_name = "FILE")]
    signing_key_file: PathBuf,
    /// X.509 chain of that key, PEM
    #[arg(long = "signing-cert-file", env = "LETHE_SIGNING_CERT_FILE", value_name = "FILE")]
    signing_cert_file: PathBuf,
    /// P-256 key for controllers that are set to ECDSA, PKCS#8 PEM
    #[arg(
        long = "signing-ec-key-file",
        env = "LETHE_SIGNING_EC_KEY_FILE",
        value_name = "FILE",
        requires = "signing_ec_cert_file"
    )]
    signing_ec_key_file: Option<PathBuf>,
    /// X.509 chain of that key, PEM
    #[arg(
        long = "signing-ec-cert-file",
        env = "LETHE_SIGNING_EC_CERT_FILE",
        value_name = "FILE",
        requires = "signing_ec_key_file"
    )]
    signing_ec_cert_file: Option<PathBuf>,
    /// RSA key that signs until `--signing-switch-at`, and afterwards for receivers that still keep its certificate
    #[arg(long = "signing-previous-key-file", env = "LETHE_SIGNING_PREVIOUS_KEY_FILE", value_name = "FILE",
          requires_all = ["signing_previous_cert_file", "signing_switch_at"])]
    signing_previous_key_file: Option<PathBuf>,
    /// X.509 chain of that key, PEM
    #[arg(
        long = "signing-previous-cert-file",
        env = "LETHE_SIGNING_PREVIOUS_CERT_FILE",
        value_name = "FILE",
        requires = "signing_previous_key_file"
    )]
    signing_previous_cert_file: Option<PathBuf>,
    /// P-256 key that goes with the previous RSA key, PKCS#8 PEM
    #[arg(long = "signing-previous-ec-key-file", env = "LETHE_SIGNING_PREVIOUS_EC_KEY_FILE", value_name = "FILE", requires_all = ["signing_previous_ec_cert_file", "signing_previous_key_file"])]
    signing_previous_ec_key_file: Option<PathBuf>,
    /// X.509 chain of that key, PEM
    #[arg(
        long = "signing-previous-ec-cert-file",
        env = "LETHE_SIGNING_PREVIOUS_EC_CERT_FILE",
        value_name = "FILE",
        requires = "signing_previous_ec_key_file"
    )]
    signing_previous_ec_cert_file: Option<PathBuf>,
    /// When the new keys take over (RFC 3339), the same for all processes
    #[arg(
        long = "signing-switch-at",
        env = "LETHE_SIGNING_SWITCH_AT",
        value_name = "TIME",
        requires = "signing_previous_key_file"
    )]
    signing_switch_at: Option<Timestamp>,
}

/// Who the processor is, checked: domain, public URL and certificate agree.
#[derive(Clone, Debug)]
pub struct Processor {
    /// `LETHE_PROCESSOR_DOMAIN`, lower-case.
    pub domain: String,
    /// `LETHE_PUBLIC_URL`.
    pub public_url: Url,
    /// Signs answers and callbacks.
    pub signer: Arc<Signer>,
}

impl SigningOptions {
    /// Reads the keys, and checks that domain, public URL and certificate agree.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn processor(&self) -> Result<Processor, ConfigError> {
        let domain = self.domain()?;
        let signer = Arc::new(self.signer(&domain)?);
        Ok(Processor { domain, public_url: self.public_url.clone(), signer })
    }

    fn domain(&self) -> Result<String, ConfigError> {
        let plausible = url::Host::parse(&self.processor_domain).is_ok() && !self.processor_domain.contains(['/', ':']);
        if plausible {
            Ok(self.processor_domain.to_ascii_lowercase())
        } else {
            Err(ConfigError::new("LETHE_PROCESSOR_DOMAIN", "must be a domain such as privacy.example.com"))
        }
    }

    fn signer(&self, domain: &str) -> Result<Signer, ConfigError> {
        let invalid = |error| ConfigError::new("LETHE_SIGNING_KEY_FILE", error);
        let mut keys = SigningKeys::load(&self.signing_key_file, &self.signing_cert_file).map_err(invalid)?;
        if let (Some(key), Some(certificate)) = (&self.signing_ec_key_file, &self.signing_ec_cert_file) {
            let invalid = |error| ConfigError::new("LETHE_SIGNING_EC_KEY_FILE", error);
            keys = keys.with_ec(key, certificate).map_err(invalid)?;
        }
        let mut signer = Signer::new(keys);
        if let Some((previous, until)) = self.previous()? {
            signer = signer.rotating_from(previous, until);
        }
        let host = self.public_url.host_str().unwrap_or_default();
        if !host.eq_ignore_ascii_case(domain) {
            let problem = format!("its host {host} is not LETHE_PROCESSOR_DOMAIN ({domain})");
            return Err(ConfigError::new("LETHE_PUBLIC_URL", problem));
        }
        // Tests and demos run on local addresses, for which nobody issues certificates.
        let local = domain == "localhost" || domain.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if let Some(stranger) = signer.certificates().find(|one| !local && !one.covers(domain)) {
            let names = stranger.names.join(", ");
            let problem = format!("a certificate names {names}, not LETHE_PROCESSOR_DOMAIN ({domain})");
            return Err(ConfigError::new("LETHE_SIGNING_CERT_FILE", problem));
        }
        Ok(signer)
    }

    fn previous(&self) -> Result<Option<(SigningKeys, Timestamp)>, ConfigError> {
        let (Some(key), Some(certificate), Some(until)) =
            (&self.signing_previous_key_file, &self.signing_previous_cert_file, self.signing_switch_at)
        else {
            return Ok(None);
        };
        let invalid = |error| ConfigError::new("LETHE_SIGNING_PREVIOUS_KEY_FILE", error);
        let mut keys = SigningKeys::load(key, certificate).map_err(invalid)?;
        if let (Some(key), Some(certificate)) =
            (&self.signing_previous_ec_key_file, &self.signing_previous_ec_cert_file)
        {
            let invalid = |error| ConfigError::new("LETHE_SIGNING_PREVIOUS_EC_KEY_FILE", error);
            keys = keys.with_ec(key, certificate).map_err(invalid)?;
        }
        Ok(Some((keys, until)))
    }
}
