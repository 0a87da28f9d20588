//! `lethe callback`.

use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use lethe_db::callback_list::{self, CallbackRow, Filter};
use lethe_domain::request::{CallbackId, CallbackState, ControllerId, SubjectRequestId};

use crate::context::database;
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the latest callbacks, with the outcome of the last attempt
    List {
        /// Only this controller
        #[arg(long, value_name = "ID")]
        controller: Option<ControllerId>,
        /// Only those in this state: waiting, ready, delivered or exhausted
        #[arg(long, value_parser = among(CallbackState::ALL))]
        state: Option<CallbackState>,
        /// Only those for this request
        #[arg(long, value_name = "SUBJECT_REQUEST_ID")]
        request: Option<SubjectRequestId>,
        /// At most this many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
    },
    /// Send exhausted (or delivered) callbacks again, with the same id, out of order
    Replay {
        /// Only these, as `lethe callback list` shows them
        #[arg(value_name = "CALLBACK_ID", required_unless_present = "controller")]
        callbacks: Vec<uuid::Uuid>,
        /// Only this controller
        #[arg(long, value_name = "ID")]
        controller: Option<ControllerId>,
        /// Callbacks in this state: exhausted or delivered
        #[arg(long, default_value = "exhausted", value_parser = among(&[CallbackState::Exhausted, CallbackState::Delivered]))]
        state: CallbackState,
        /// At most this many
        #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
        limit: i64,
    },
}

/// The names of these states.
fn among(states: &[CallbackState]) -> impl TypedValueParser<Value = CallbackState> + use<> {
    PossibleValuesParser::new(states.iter().map(|state| state.as_str())).try_map(|name| name.parse())
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let (filter, limit) = match self {
            Self::List { controller, state, request, limit } => {
                (Filter { controller_id: controller, state, request }, limit)
            }
            Self::Replay { callbacks, controller, state, limit } => {
                return replay(output, callbacks, controller.as_ref(), state, limit).await;
            }
        };
        let session = database().await?.session().await?;
        let rows = callback_list::list(&session, &filter, limit).await?;
        let headings =
            ["callback", "controller", "request", "reports", "state", "attempts", "due", "endpoint", "last outcome"];
        output.list(&rows, &headings, |row| {
            vec![
                row.callback_id.to_string(),
                row.controller_id.to_string(),
                row.subject_request_id.to_string(),
                row.request_status.to_string(),
                row.state.to_string(),
                row.attempts.to_string(),
                row.next_attempt_at.to_string(),
                row.endpoint.clone(),
                last_outcome(row),
            ]
        })
    }
}

/// The outcome of the last attempt, and why there is none to come.
fn last_outcome(row: &CallbackRow) -> String {
    let last = match (&row.last_error_class, row.last_status_code) {
        (None, Some(code)) => code.to_string(),
        (Some(class), Some(code)) => format!("{class} ({code})"),
        (class, None) => or_dash(class.as_ref()),
    };
    let reason = row.last_reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
    // That the time of a callback is used up is what exhausted means.
    let because = row.exhausted_because.as_ref().filter(|because| *because != "time_used_up");
    let because = because.map_or_else(String::new, |because| format!(" [{because}]"));
    format!("{last}{reason}{because}")
}

async fn replay(
    output: Output,
    callbacks: Vec<uuid::Uuid>,
    controller_id: Option<&ControllerId>,
    state: CallbackState,
    limit: i64,
) -> anyhow::Result<()> {
    let wanted = callbacks.len();
    let callbacks: Vec<CallbackId> = callbacks.into_iter().map(CallbackId).collect();
    let only = (!callbacks.is_empty()).then_some(callbacks.as_slice());
    let what = callback_list::Replay { callbacks: only, controller_id, state, limit };
    // The scheduler wakes the couriers: this command works while the broker is away.
    let (replayed, _) = callback_list::replay(&database().await?, &what).await?;
    output.one(&serde_json::json!({"replayed": replayed}), vec![("replayed", replayed.len().to_string())])?;
    if replayed.len() < wanted {
        anyhow::bail!("{} of these callbacks are not {state}, or belong to a purged request", wanted - replayed.len());
    }
    Ok(())
}
