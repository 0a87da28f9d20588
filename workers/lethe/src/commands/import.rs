//! `lethe import`: JSON Lines into the built-in store.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use lethe::db::Db;
use lethe::opendsr::DeniedValues;
use lethe::request::ControllerId;
use lethe::stores::import::{self, EventBatchLine, InvalidLine, ProfileLine};
use serde::Serialize;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::context::database;
use crate::output::Output;

/// Lines and bytes of one transaction at most.
const LINES: usize = 2_000;
const BYTES: usize = 8 << 20;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Profiles: {"mpid":1,"identities":{"email":"…"},"attributes":{…},"audiences":[…]}
    Profiles {
        #[command(flatten)]
        source: Source,
        /// Identity values that name nobody, beside empty, null and all zeros; they are not indexed
        #[arg(long, env = "LETHE_DENIED_IDENTITIES", value_delimiter = ',', value_name = "VALUES")]
        denied_identities: Vec<String>,
    },
    /// Event batches: the batch object itself, with a top-level mpid
    EventBatches {
        #[command(flatten)]
        source: Source,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Source {
    /// A file of JSON Lines
    file: PathBuf,
    /// Whose data it is
    #[arg(long, value_name = "ID")]
    controller: ControllerId,
}

#[derive(Default, Serialize)]
struct Summary {
    lines: u64,
    identities_left_out: usize,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        let summary = match self {
            Self::Profiles { source, denied_identities } => {
                let denied = DeniedValues::new(denied_identities.iter().map(String::as_str));
                let mut left_out = 0;
                let parse = |line: &str| {
                    let parsed = ProfileLine::parse(line, &denied)?;
                    left_out += parsed.skipped;
                    Ok(parsed)
                };
                let lines = each_group(&db, &source, output, parse, async |db, id, group: &[ProfileLine]| {
                    import::profiles(db, id, group).await
                })
                .await?;
                Summary { lines, identities_left_out: left_out }
            }
            Self::EventBatches { source } => {
                let lines = each_group(
                    &db,
                    &source,
                    output,
                    EventBatchLine::parse,
                    async |db, id, group: &[EventBatchLine]| import::event_batches(db, id, group).await,
                )
                .await?;
                Summary { lines, identities_left_out: 0 }
            }
        };
        output.one(
            &summary,
            vec![
                ("lines imported", summary.lines.to_string()),
                ("identities left out (they name nobody)", summary.identities_left_out.to_string()),
            ],
        )
    }
}

/// Reads lines and stores them in groups. A bad line ends the import; what stood before its group is stored, and the
/// message says at which line to go on.
async fn each_group<T>(
    db: &Db,
    source: &Source,
    output: Output,
    mut parse: impl FnMut(&str) -> Result<T, InvalidLine>,
    store: impl AsyncFn(&Db, &ControllerId, &[T]) -> Result<(), lethe::stores::StoreError>,
) -> anyhow::Result<u64> {
    if !import::controller_exists(db, &source.controller).await? {
        bail!("there is no controller {}; add it with `lethe controller add`", source.controller);
    }
    let shown = source.file.display();
    let file = File::open(&source.file).await.with_context(|| format!("cannot open {shown}"))?;
    let bar = output.progress(file.metadata().await?.len(), "bytes");
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let (mut group, mut bytes, mut number, mut stored) = (Vec::new(), 0, 0_u64, 0_u64);
    let mut line = String::new();
    loop {
        line.clear();
        let read =
            reader.read_line(&mut line).await.with_context(|| format!("cannot read line {} of {shown}", number + 1))?;
        number += u64::from(read > 0);
        let text = line.trim_end_matches(['\r', '\n']);
        if !text.trim().is_empty() {
            let parsed = parse(text).with_context(|| {
                format!("line {number} of {shown} cannot be imported; the lines up to {stored} are stored: mend it and import the rest from line {}", stored + 1)
            })?;
            group.push(parsed);
            bytes += text.len();
        }
        if group.len() >= LINES || bytes >= BYTES || (read == 0 && !group.is_empty()) {
            store(db, &source.controller, &group)
                .await
                .with_context(|| format!("the lines after {stored} of {shown} are not stored"))?;
            stored = number;
            bar.set_position(bar.position() + bytes as u64);
            group.clear();
            bytes = 0;
        }
        if read == 0 {
            bar.finish_and_clear();
            return Ok(number);
        }
    }
}
