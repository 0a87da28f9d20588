//! `lethe request`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use lethe_audit::certificate;
use lethe_broker::Publisher;
use lethe_db::Db;
use lethe_db::request_lists::{self, Filter};
use lethe_db::requests::{self, Cancellation, Overtaking, Receipt, RequestRow};
use lethe_db::slices::{self, Work};
use lethe_domain::request::{Approval, BatchId, ControllerId, RequestStatus};
use lethe_intake::options::ReceivingOptions;
use lethe_intake::{Incoming, Unanswered};
use serde::Serialize;
use tokio::io::AsyncReadExt;

use crate::context::{SignatoryArgs, Target, broker, check_keys, database};
use crate::output::{Output, line, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Submit a request, as a controller would
    Submit {
        /// A file with the OpenDSR request; - for standard input
        file: PathBuf,
        /// Whose request it is
        #[arg(long, value_name = "ID")]
        controller: ControllerId,
        #[command(flatten)]
        receiving: Box<ReceivingOptions>,
    },
    /// Show where a request stands: profiles by source, receipts by store
    Status(Target),
    /// Cancel a request that is still pending
    Cancel(Target),
    /// List the latest requests
    List {
        /// Only this controller
        #[arg(long, value_name = "ID")]
        controller: Option<ControllerId>,
        /// Only those with this status: pending, `in_progress`, completed or cancelled
        #[arg(long)]
        status: Option<RequestStatus>,
        /// Only those that match too many profiles and wait for `lethe request approve`
        #[arg(long)]
        awaiting_approval: bool,
        /// At most this many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
    },
    /// Let a request run even though it matches more profiles than the cap allows
    Approve(Target),
    /// Retry the failed work of a request at once
    Retry(Target),
    /// Print the signed certificate of a completed erasure
    Certificate {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        signatory: Box<SignatoryArgs>,
    },
}

#[derive(Serialize)]
struct Shown {
    controller_id: ControllerId,
    subject_request_id: String,
    api_version: String,
    request_type: String,
    status: String,
    approval: Approval,
    received_at: String,
    expected_completion_time: String,
    batch_id: Option<BatchId>,
    results_count: Option<i64>,
}

impl Shown {
    fn of(row: &RequestRow) -> Self {
        Self {
            controller_id: row.controller_id.clone(),
            subject_request_id: row.subject_request_id.to_string(),
            api_version: row.api_version.to_string(),
            request_type: row.request_type.to_string(),
            status: row.status.to_string(),
            approval: row.approval,
            received_at: row.received_at.to_string(),
            expected_completion_time: row.expected_completion_time.to_string(),
            batch_id: row.batch_id,
            results_count: row.result.as_ref().map(|result| result.lines),
        }
    }
}

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    request: Shown,
    mpids: Vec<(String, i64)>,
    receipts: Vec<Receipt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    work: Option<Work>,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        match self {
            Self::Submit { file, controller, receiving } => submit(db, &file, &controller, &receiving).await,
            Self::Status(target) => status(&db, &target, output).await,
            Self::Cancel(target) => cancel(&db, &target, output).await,
            Self::List { controller, status, awaiting_approval, limit } => {
                let filter = Filter { controller_id: controller, status, awaiting_approval };
                let rows = request_lists::list(&db.session().await?, &filter, limit).await?;
                let rows: Vec<Shown> = rows.iter().map(Shown::of).collect();
                let headings =
                    ["controller", "subject_request_id", "type", "status", "approval", "received", "expected", "batch"];
                output.list(&rows, &headings, |row| {
                    vec![
                        row.controller_id.to_string(),
                        row.subject_request_id.clone(),
                        row.request_type.clone(),
                        row.status.clone(),
                        row.approval.to_string(),
                        row.received_at.clone(),
                        row.expected_completion_time.clone(),
                        or_dash(row.batch_id),
                    ]
                })
            }
            Self::Approve(target) => match requests::approve(&db, &target.pair()).await? {
                None => bail!(
                    "no such request awaits approval; `lethe request list --awaiting-approval` shows those that do"
                ),
                Some((lane, slot)) => {
                    let shown = serde_json::json!({
                        "subject_request_id": target.id, "lane": lane.as_str(), "runs_at": slot.runs_at,
                        "expected_completion_time": slot.expected_completion_time,
                    });
                    output.one(
                        &shown,
                        vec![
                            ("approved", target.id.to_string()),
                            ("runs at", slot.runs_at.to_string()),
                            ("expected completion", slot.expected_completion_time.to_string()),
                        ],
                    )
                }
            },
            Self::Certificate { target, signatory } => {
                let document = certificate::issue(&db, &signatory.open()?, &target.pair()).await??;
                Ok(std::io::Write::write_all(&mut std::io::stdout().lock(), document.as_bytes())?)
            }
            Self::Retry(target) => {
                if !requests::retry(&db, &target.pair()).await? {
                    bail!("this request has nothing to retry: it is not in progress, or it is being worked on");
                }
                output.one(
                    &serde_json::json!({"subject_request_id": target.id, "retried": true}),
                    vec![("retried", target.id.to_string())],
                )
            }
        }
    }
}

async fn submit(
    db: Db,
    file: &std::path::Path,
    controller: &ControllerId,
    receiving: &ReceivingOptions,
) -> anyhow::Result<()> {
    let mut body = Vec::new();
    if file.as_os_str() == "-" {
        tokio::io::stdin().read_to_end(&mut body).await.context("cannot read standard input")?;
    } else {
        body = tokio::fs::read(file).await.with_context(|| format!("cannot read {}", file.display()))?;
    }
    let receiving = receiving.check()?;
    check_keys(&db, &receiving.keys).await?;
    let intake = receiving.intake(db, Arc::new(Publisher::new(broker()?)));
    if intake.controllers(&[controller.as_str()]).await?.is_empty() {
        bail!("there is no controller {controller}; add it with `lethe controller add`");
    }
    let incoming = Incoming { controller_id: controller, body: &body, path_version: None };
    match intake.receive(&[incoming]).await.pop() {
        Some(Ok(answer)) => {
            let text = String::from_utf8_lossy(&answer.body);
            line(&text)?;
            if answer.status == 201 { Ok(()) } else { bail!("the request was refused with {}", answer.status) }
        }
        Some(Err(Unanswered::Later(error) | Unanswered::Poison(error))) => Err(error.into()),
        None => bail!("the intake gave no answer"),
    }
}

async fn status(db: &Db, target: &Target, output: Output) -> anyhow::Result<()> {
    let session = db.session().await?;
    let row = requests::find(&session, &target.pair()).await?;
    let row = row.with_context(|| format!("controller {} has no request {}", target.controller, target.id))?;
    let status = Status {
        request: Shown::of(&row),
        mpids: requests::mpid_sources(&session, row.request_key).await?,
        receipts: requests::receipts(&session, row.request_key).await?,
        work: match row.slice_id {
            Some(slice) if row.status == RequestStatus::InProgress => slices::work(&session, slice).await?,
            _ => None,
        },
    };
    let shown = &status.request;
    let mut rows = vec![
        ("controller", shown.controller_id.to_string()),
        ("subject_request_id", shown.subject_request_id.clone()),
        ("type", shown.request_type.clone()),
        ("status", shown.status.clone()),
        ("approval", shown.approval.to_string()),
        ("received", shown.received_at.clone()),
        ("expected completion", shown.expected_completion_time.clone()),
        ("batch", or_dash(shown.batch_id)),
        ("lines in the result", or_dash(shown.results_count)),
    ];
    for (source, count) in &status.mpids {
        rows.push(("profiles", format!("{count} by {source}")));
    }
    for receipt in &status.receipts {
        let state = match (&receipt.verified_at, &receipt.failure) {
            (Some(at), _) => format!("verified {at}"),
            (None, Some(class)) => format!("failing: {class}"),
            (None, None) => "under way".to_owned(),
        };
        let arrived = or_dash(receipt.rows_arrived);
        rows.push((
            "store",
            format!("{}: {} rows deleted, {arrived} arrived later, {state}", receipt.store, receipt.rows_deleted),
        ));
    }
    if let Some(work) = &status.work {
        rows.extend(work_rows(work));
    }
    output.one(&status, rows)
}

/// What keeps a request that is in progress.
fn work_rows(work: &Work) -> Vec<(&'static str, String)> {
    let state = if work.leased {
        "leased".to_owned()
    } else if work.attempts == 0 {
        "not begun".to_owned()
    } else {
        format!("next at {}", work.next_attempt_at)
    };
    let mut rows = vec![("work", format!("{} attempts, {state}", work.attempts))];
    if let Some(class) = &work.last_error {
        let hint = if work.needs_operator { "; waiting will not fix it" } else { "" };
        rows.push(("held up by", format!("{class}{hint}")));
    }
    if let Some(pause) = &work.pause {
        let (since, until, class) = (pause.since, pause.until, &pause.class);
        rows.push(("controller", format!("failing since {since}: {class}; not retried before {until}")));
    }
    rows
}

async fn cancel(db: &Db, target: &Target, output: Output) -> anyhow::Result<()> {
    // The scheduler wakes the couriers: this command works while the broker is away.
    let (outcomes, _) = requests::cancel(db, &[target.pair()], Overtaking::Refuse).await?;
    match outcomes.first() {
        Some(Cancellation::Cancelled { received_at, .. }) => {
            let shown = serde_json::json!({"subject_request_id": target.id, "status": "cancelled", "received_time": received_at});
            output.one(&shown, vec![("cancelled", target.id.to_string()), ("received", received_at.to_string())])
        }
        Some(Cancellation::TooLate(status)) => {
            bail!("the request is already {status} and can no longer be cancelled")
        }
        _ => bail!("controller {} has no request {}", target.controller, target.id),
    }
}
