//! `lethe audit`.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use lethe_audit::Trust;
use lethe_audit::export::{Line, Reader};
use lethe_audit::trail::{self, Pages, Report};
use lethe_db::audit;
use lethe_domain::request::ControllerId;

use crate::context::database;
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Recompute the trail, report anything that was changed, removed or moved, and exit with 1 on any finding
    Verify(Verify),
    /// Write the sealed trail as JSON Lines to standard output
    Export {
        /// Only this controller
        #[arg(long, value_name = "ID")]
        controller: Option<ControllerId>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Only this controller
    #[arg(long, value_name = "ID", conflicts_with = "file")]
    controller: Option<ControllerId>,
    /// Verify an export instead of the database
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The signing certificate, and those from before any change of keys
    #[arg(long, env = "LETHE_SIGNING_CERT_FILE", value_delimiter = ',', required = true, value_name = "FILES")]
    certificate: Vec<PathBuf>,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        match self {
            Self::Verify(verify) => verify.run(output).await,
            Self::Export { controller } => export(controller.as_ref().map(ControllerId::as_str)).await,
        }
    }
}

impl Verify {
    async fn run(self, output: Output) -> anyhow::Result<()> {
        let trust = Trust::read(&self.certificate)?;
        let report = if let Some(file) = &self.file {
            verify_file(file, trust)?
        } else {
            let tx = database().await?.begin_snapshot("verify_audit_trail").await?;
            let report = trail::verify(&tx, trust, self.controller.as_ref().map(ControllerId::as_str)).await?;
            tx.commit().await?;
            report
        };
        let mut rows = vec![
            ("chains", report.chains.to_string()),
            ("sealed entries", report.entries.to_string()),
            ("not sealed yet", report.unsealed.to_string()),
        ];
        rows.extend(report.findings.iter().map(|finding| ("finding", finding.to_string())));
        output.one(&report, rows)?;
        match report.findings.len() {
            0 => output.say("the trail is intact"),
            findings => bail!("the trail is not intact: {findings} findings"),
        }
    }
}

fn verify_file(file: &Path, trust: Trust) -> anyhow::Result<Report> {
    let name = file.display();
    let mut lines = BufReader::new(std::fs::File::open(file).with_context(|| format!("cannot read {name}"))?);
    let mut reader = Reader::new(trust);
    let (mut text, mut number) = (String::new(), 0_u64);
    while lines.read_line(&mut text).with_context(|| format!("cannot read {name}"))? > 0 {
        number += 1;
        reader.line(text.trim_end_matches('\n')).with_context(|| format!("line {number} of {name}"))?;
        text.clear();
    }
    reader.finish().with_context(|| name.to_string())
}

async fn export(only: Option<&str>) -> anyhow::Result<()> {
    let tx = database().await?.begin_snapshot("export_audit_trail").await?;
    let mut out = BufWriter::new(std::io::stdout());
    let mut write = |line: &Line<'_>| -> anyhow::Result<()> {
        serde_json::to_writer(&mut out, line)?;
        Ok(out.write_all(b"\n")?)
    };
    let (mut pages, mut entries) = (Pages::new(only), 0_u64);
    loop {
        let rows = pages.next(&tx).await?;
        if rows.is_empty() {
            break;
        }
        entries += rows.len() as u64;
        for line in rows.into_iter().flat_map(Line::of_row) {
            write(&line)?;
        }
    }
    for (head, signature) in audit::heads(&tx, only).await? {
        write(&Line::of_head(head, signature))?;
    }
    write(&Line::End { entries, unsealed: audit::unsealed(&tx, only).await? })?;
    tx.commit().await?;
    Ok(out.flush()?)
}
