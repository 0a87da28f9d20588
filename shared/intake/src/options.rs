//! What it takes to receive requests: the same options, and the same checks, for every transport.

use std::sync::Arc;

use clap::Args;

use crate::Intake;
use lethe_broker::Publisher;
use lethe_db::Db;
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::{DeniedValues, Parser};
use lethe_domain::result_link::Links;
use lethe_process::settings::ConfigError;
use lethe_runtime::options::{AddressOptions, CapOptions, KeyOptions};
use lethe_signing::{Processor, SigningOptions};

/// How requests are read.
#[derive(Clone, Debug, Args)]
pub struct IntakeOptions {
    /// Additional keys under `extensions` that are read as Lethe's own
    #[arg(
        long = "extension-domains",
        env = "LETHE_EXTENSION_DOMAINS",
        value_delimiter = ',',
        value_name = "DOMAINS",
        default_value = "opendsr.mparticle.com,opengdpr.mparticle.com"
    )]
    pub extension_domains: Vec<String>,
    /// Identity values that name nobody, in addition to empty, null and all zeros
    #[arg(long = "denied-identities", env = "LETHE_DENIED_IDENTITIES", value_delimiter = ',', value_name = "VALUES")]
    pub denied_identities: Vec<String>,
    #[command(flatten)]
    addresses: AddressOptions,
}

impl IntakeOptions {
    /// The parser of requests.
    fn parser(&self, processor_domain: &str) -> Parser {
        let mut domains = vec![processor_domain.to_owned()];
        domains.extend(self.extension_domains.iter().map(|domain| domain.trim().to_owned()));
        domains.sort();
        domains.dedup();
        Parser {
            extension_domains: domains,
            denied: DeniedValues::new(self.denied_identities.iter().map(String::as_str)),
            addresses: self.addresses.callback_allow.clone(),
        }
    }
}

/// All of it.
#[derive(Clone, Debug, Args)]
pub struct ReceivingOptions {
    #[command(flatten)]
    intake: IntakeOptions,
    #[command(flatten)]
    cap: CapOptions,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    signing: SigningOptions,
}

/// The options, read and checked.
#[derive(Debug)]
pub struct Receiving {
    /// Reads requests.
    pub parser: Parser,
    /// All keys at rest.
    pub keys: Arc<Keys>,
    /// Who answers and signs.
    pub processor: Processor,
    cap: u32,
}

impl ReceivingOptions {
    /// Reads keys and certificates.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check(&self) -> Result<Receiving, ConfigError> {
        let processor = self.signing.processor()?;
        Ok(Receiving {
            parser: self.intake.parser(&processor.domain),
            keys: Arc::new(self.keys.keys()?),
            processor,
            cap: self.cap.max_mpids_per_request,
        })
    }
}

impl Receiving {
    /// The intake of every transport.
    #[must_use]
    pub fn intake(&self, db: Db, publisher: Arc<Publisher>) -> Intake {
        let links = Links::new(self.keys.clone(), self.processor.public_url.clone());
        Intake::new(db, self.keys.clone(), self.parser.clone(), self.cap, links, publisher)
    }
}
