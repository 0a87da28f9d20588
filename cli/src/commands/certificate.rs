//! `lethe certificate`: needs no database and no network.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use lethe_audit::Trust;
use lethe_audit::certificate::{self, Verified};

use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check that a certificate is signed and unchanged, and show what it says; exit with 1 if it is not
    Verify {
        /// The output of `lethe request certificate`; - for standard input
        file: PathBuf,
        /// The processor's signing certificates, PEM; without them, compare the fingerprint yourself
        #[arg(long, env = "LETHE_SIGNING_CERT_FILE", value_delimiter = ',', value_name = "FILES")]
        certificate: Vec<PathBuf>,
    },
}

impl Command {
    #[expect(clippy::unused_async, reason = "every command is run in one way")]
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let Self::Verify { file, certificate } = self;
        let bytes = if file.as_os_str() == "-" {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes)?;
            bytes
        } else {
            std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?
        };
        let trust = if certificate.is_empty() { None } else { Some(Trust::read(&certificate)?) };
        let Verified { statement, fingerprint } = certificate::verify(&bytes, trust.as_ref())?;
        let (asked, execution) = (&statement.request, &statement.execution);
        let mut rows = vec![
            ("certified by", statement.processor_domain.clone()),
            ("controller", statement.controller_id.clone()),
            ("subject_request_id", statement.subject_request_id.clone()),
            ("type", asked.subject_request_type.clone()),
            ("submitted", asked.submitted_time.to_string()),
            ("received", asked.received_time.to_string()),
            ("completed", execution.completed_at.to_string()),
            ("profiles", execution.profiles.to_string()),
        ];
        for store in &statement.stores {
            let text = format!(
                "{}: {} rows deleted, {} remaining at {}, {} arrived later",
                store.store, store.rows_deleted, store.rows_remaining, store.verified_at, store.rows_arrived_later
            );
            rows.push(("store", text));
        }
        rows.push(("audit position", format!("{} {}", statement.audit.chain, statement.audit.position)));
        rows.push(("signing certificate", format!("SHA-256 {fingerprint}")));
        output.one(&statement, rows)?;
        if trust.is_none() {
            output.say("the signature is valid; compare the SHA-256 with that of the processor's certificate")?;
        }
        Ok(())
    }
}
