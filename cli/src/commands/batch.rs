//! `lethe batch`: what will run when and on whom, and what was done.

use std::collections::BTreeMap;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lethe_db::batches::{self, BatchRow, Executed};
use lethe_db::release;
use lethe_db::slices::{self, Hindrance};
use lethe_domain::request::{BatchId, Mpid};
use lethe_runtime::options::{CapOptions, KeyOptions};
use lethe_stores::Stores;
use serde::Serialize;

use crate::context::{check_keys, database};
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the latest batches: when each closes and runs, and how its requests stand
    List {
        /// At most this many
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
    },
    /// Show a batch: before it runs, whom it would cover now; afterwards, what was done and what differed
    Show(Show),
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The batch, as `lethe batch list` shows it
    batch: BatchId,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    cap: CapOptions,
}

/// What a batch would run on, exact as of one instant.
#[derive(Serialize)]
struct Planned {
    as_of: String,
    requests: usize,
    held_back_by_the_cap: usize,
    mpids: usize,
    rows_by_store: BTreeMap<String, i64>,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    batch: BatchRow,
    #[serde(skip_serializing_if = "Option::is_none")]
    planned: Option<Planned>,
    #[serde(skip_serializing_if = "Option::is_none")]
    executed: Option<Executed>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kept_by: Vec<Hindrance>,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        match self {
            Self::List { limit } => {
                let rows = batches::list(&database().await?.session().await?, None, limit).await?;
                let headings = [
                    "batch",
                    "lane",
                    "closes",
                    "runs",
                    "state",
                    "requests",
                    "pending",
                    "in progress",
                    "completed",
                    "cancelled",
                ];
                output.list(&rows, &headings, |row| {
                    let mut cells = vec![
                        row.batch_id.to_string(),
                        row.lane.to_string(),
                        row.tick_at.to_string(),
                        row.runs_at.to_string(),
                        row.state.to_string(),
                    ];
                    cells.extend(
                        [row.requests, row.pending, row.in_progress, row.completed, row.cancelled]
                            .map(|n| n.to_string()),
                    );
                    cells
                })
            }
            Self::Show(show) => show.run(output).await,
        }
    }
}

impl Show {
    async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        // One snapshot for everything: what is printed was true at one instant.
        let tx = db.begin_snapshot("show_batch").await?;
        let batch = batches::list(&tx, Some(self.batch), 1).await?.pop();
        let batch = batch.with_context(|| format!("there is no batch {}; `lethe batch list` shows all", self.batch))?;
        let mut shown = Shown { batch, planned: None, executed: None, kept_by: Vec::new() };
        if shown.batch.pending > 0 {
            let keys = self.keys.keys()?;
            check_keys(&db, &keys).await?;
            let plan = release::plan(&tx, &keys, self.batch, self.cap.max_mpids_per_request).await?;
            let as_of = batches::now(&tx).await?;
            let mut rows_by_store = BTreeMap::new();
            for store in Stores::built_in(&db).iter() {
                let mut rows = 0;
                for (controller_id, mpids) in &plan.mpids {
                    let mpids: Vec<Mpid> = mpids.iter().copied().collect();
                    for chunk in mpids.chunks(1_000) {
                        let held = store.count(controller_id, chunk, as_of).await?;
                        rows += held.values().map(|held| held.before).sum::<i64>();
                    }
                }
                rows_by_store.insert(store.name().to_owned(), rows);
            }
            shown.planned = Some(Planned {
                as_of: as_of.to_string(),
                requests: plan.requests,
                held_back_by_the_cap: plan.held_back,
                mpids: plan.mpids.values().map(std::collections::BTreeSet::len).sum(),
                rows_by_store,
            });
        }
        if shown.batch.in_progress + shown.batch.completed > 0 {
            shown.executed = Some(batches::executed(&tx, self.batch).await?);
            shown.kept_by = slices::hindrances(&tx, self.batch, 20).await?;
        }
        tx.commit().await?;
        let rows = shown.rows();
        output.one(&shown, rows)
    }
}

impl Shown {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let batch = &self.batch;
        let mut rows = vec![
            ("batch", format!("{} ({})", batch.batch_id, batch.lane)),
            ("state", batch.state.to_string()),
            ("closes", batch.tick_at.to_string()),
            ("runs", batch.runs_at.to_string()),
            ("closed", or_dash(batch.closed_at)),
            ("released", or_dash(batch.released_at)),
            ("completed", or_dash(batch.completed_at)),
            ("requests", batch.requests.to_string()),
            ("of these pending", batch.pending.to_string()),
            ("of these in progress", batch.in_progress.to_string()),
            ("of these completed", batch.completed.to_string()),
            ("of these cancelled", batch.cancelled.to_string()),
        ];
        if let Some(planned) = &self.planned {
            rows.push(("would run now on", format!("{} requests, {} profiles", planned.requests, planned.mpids)));
            rows.push(("held back by the cap", planned.held_back_by_the_cap.to_string()));
            for (store, count) in &planned.rows_by_store {
                rows.push(("rows in store", format!("{store}: {count}")));
            }
            rows.push(("exact as of", planned.as_of.clone()));
        }
        if let Some(executed) = &self.executed {
            for (source, count) in &executed.mpids {
                let meaning = match source.as_str() {
                    "named" => "named by the request",
                    "receipt" => "matched at receipt",
                    _ => "found only at release",
                };
                rows.push(("ran on", format!("{count} profiles {meaning}")));
            }
            for (store, deleted, arrived, failing) in &executed.rows {
                rows.push((
                    "store",
                    format!("{store}: {deleted} rows deleted, {arrived} arrived later, {failing} requests failing"),
                ));
            }
        }
        for Hindrance { controller_id, class, needs_operator, slices, next_attempt_at } in &self.kept_by {
            let hint = if *needs_operator { ", waiting will not fix it" } else { "" };
            rows.push((
                "held up by",
                format!("{class}{hint}: {slices} slices of {controller_id}, next at {next_attempt_at}"),
            ));
        }
        rows
    }
}
