//! What the identity matcher is configured with.

use std::sync::Arc;

use clap::Args;
use lethe::callback::signature::Signer;
use lethe::config::{CapOptions, ConfigError, IntakeOptions, KeyOptions, SigningOptions};
use lethe::crypto::Keys;
use lethe::opendsr::Parser;
use lethe::results::link::Links;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    intake: IntakeOptions,
    #[command(flatten)]
    cap: CapOptions,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    signing: SigningOptions,
    /// Groups of requests that are worked on at once; each takes a channel and a database connection
    #[arg(long = "intake-consumers", env = "LETHE_INTAKE_CONSUMERS", default_value_t = 2, value_name = "NUMBER",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    consumers: u8,
    /// Requests of a group at most
    #[arg(long = "intake-group", env = "LETHE_INTAKE_GROUP", default_value_t = 256, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=4_096))]
    group: u16,
}

/// The options, read and checked.
pub(crate) struct Ready {
    pub(crate) parser: Parser,
    pub(crate) domain: String,
    pub(crate) cap: u32,
    pub(crate) keys: Arc<Keys>,
    pub(crate) signer: Arc<Signer>,
    pub(crate) links: Links,
    pub(crate) consumers: u8,
    pub(crate) group: u16,
}

impl Options {
    pub(crate) fn check(self) -> Result<Ready, ConfigError> {
        let domain = self.intake.domain()?;
        let keys = Arc::new(self.keys.keys()?);
        let signer = Arc::new(self.signing.signer(&domain)?);
        let links = Links::new(keys.clone(), self.signing.public_url.clone());
        Ok(Ready {
            parser: self.intake.parser(),
            domain,
            cap: self.cap.max_mpids_per_request,
            keys,
            signer,
            links,
            consumers: self.consumers,
            group: self.group,
        })
    }
}
