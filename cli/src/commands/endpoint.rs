//! `lethe endpoint`.

use std::time::Duration;

use clap::Subcommand;
use lethe_db::endpoint_list::{self, COUNTED, EndpointRow, Filter};
use lethe_db::give_up::{self, GivenUpBy};
use lethe_domain::request::{ControllerId, EndpointId};
use lethe_process::settings::HumanDuration;

use crate::context::{Usage, database};
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List callback endpoints, with the state of each and what is waiting for it
    List {
        /// Only this controller
        #[arg(long, value_name = "ID")]
        controller: Option<ControllerId>,
        /// Only those that are failing
        #[arg(long)]
        failing: bool,
        /// At most this many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
    },
    /// Give up on an endpoint: its waiting callbacks become exhausted; `lethe callback replay` sends them again
    #[command(name = "give-up")]
    GiveUp {
        /// The endpoint, as `lethe endpoint list` shows it
        #[arg(value_name = "ENDPOINT_ID")]
        endpoint: EndpointId,
        /// Only callbacks older than this
        #[arg(long, default_value = "0s", value_name = "DURATION")]
        older_than: HumanDuration,
    },
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        match self {
            Self::List { controller, failing, limit } => {
                let filter = Filter { controller_id: controller, in_trouble: failing };
                list(output, &filter, limit).await
            }
            Self::GiveUp { endpoint, older_than } => give_up(output, endpoint, older_than.get()).await,
        }
    }
}

async fn list(output: Output, filter: &Filter, limit: i64) -> anyhow::Result<()> {
    let session = database().await?.session().await?;
    let rows = endpoint_list::list(&session, filter, limit).await?;
    let headings = [
        "id",
        "controller",
        "endpoint",
        "state",
        "failures",
        "held until",
        "last answer",
        "no answer since",
        "ready",
        "oldest",
    ];
    output.list(&rows, &headings, |row| {
        vec![
            row.endpoint_id.to_string(),
            row.controller_id.clone(),
            row.endpoint.clone(),
            row.state.to_owned(),
            row.consecutive_failures.to_string(),
            or_dash(row.open_until),
            or_dash(row.last_answer_at),
            or_dash(row.unanswered_since),
            ready(row),
            or_dash(row.oldest_ready_at),
        ]
    })
}

fn ready(row: &EndpointRow) -> String {
    if row.ready > COUNTED { format!("over {COUNTED}") } else { row.ready.to_string() }
}

async fn give_up(output: Output, endpoint: EndpointId, older_than: Duration) -> anyhow::Result<()> {
    let db = database().await?;
    let unknown = || Usage(format!("there is no endpoint {endpoint}; `lethe endpoint list` shows them"));
    let row = endpoint_list::find(&db.session().await?, endpoint).await?.ok_or_else(unknown)?;
    let bar = output.progress(u64::try_from(row.ready).unwrap_or(0), "callbacks");
    let (mut exhausted, mut is_first) = (0, true);
    let by = GivenUpBy::Operator { older_than };
    let cutoff = give_up::cutoff(&db, by).await?;
    loop {
        let step = give_up::step(&db, endpoint, by, cutoff, is_first).await?;
        let step = step.ok_or_else(unknown)?;
        is_first = false;
        if step.exhausted == 0 {
            break;
        }
        exhausted += step.exhausted;
        bar.inc(step.exhausted as u64);
    }
    bar.finish_and_clear();
    let summary = serde_json::json!({
        "endpoint_id": endpoint, "controller_id": row.controller_id, "endpoint": row.endpoint, "exhausted": exhausted,
    });
    output.one(
        &summary,
        vec![("endpoint", row.endpoint), ("controller", row.controller_id), ("exhausted", exhausted.to_string())],
    )
}
