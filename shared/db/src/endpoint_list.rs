//! Endpoints as operators see them.

use jiff::Timestamp;

use super::pool::Session;
use super::{DbError, statements};
use lethe_domain::request::{ControllerId, EndpointId};

/// More callbacks than these are not counted.
pub const COUNTED: i64 = 10_000;

/// The columns of a list, for the endpoints that `$from` chooses.
macro_rules! listed {
    ($from:literal, $order:literal) => {
        concat!(
            "SELECT e.endpoint_id, e.controller_id, e.scheme || '://' || e.host || ':' || e.port AS endpoint, e.consecutive_failures,
                    e.open_until, e.last_answer_at, e.unanswered_since, extract(epoch FROM e.unanswered_for)::bigint AS unanswered_seconds,
                    e.given_up_at,
                    (SELECT count(*) FROM (
                        SELECT FROM lethe.callbacks c WHERE c.endpoint_id = e.endpoint_id AND c.state = 'ready'
                         LIMIT 10001) counted) AS ready,
                    (SELECT min(c.created_at) FROM lethe.callbacks c
                      WHERE c.endpoint_id = e.endpoint_id AND c.state = 'ready' AND c.state <> 'delivered') AS oldest_ready_at
               FROM (SELECT * FROM lethe.endpoints e WHERE ",
            $from,
            " ORDER BY ",
            $order,
            " LIMIT $3) e ORDER BY ",
            $order
        )
    };
}

statements! {
    LIST = listed!("$1::text IS NULL AND e.endpoint_id > $2", "e.endpoint_id");
    LIST_OF_CONTROLLER = listed!("e.controller_id = $1 AND e.endpoint_id > $2", "e.controller_id, e.scheme, e.host, e.port");
    LIST_IN_TROUBLE = listed!(
        "($1::text IS NULL OR e.controller_id = $1) AND e.endpoint_id > $2 AND e.consecutive_failures > 0",
        "e.controller_id, e.endpoint_id"
    );
    FIND = listed!("$1::text IS NULL AND e.endpoint_id = $2", "e.endpoint_id");
}

/// An endpoint, its breaker, and what waits for it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct EndpointRow {
    /// What `lethe endpoint give-up` takes.
    pub endpoint_id: EndpointId,
    /// Whose it is.
    pub controller_id: String,
    /// Scheme, host and port.
    pub endpoint: String,
    /// `well`, `failing`, `held` by its breaker, or `given_up`.
    pub state: &'static str,
    /// Failures in a row.
    pub consecutive_failures: i32,
    /// Until then its breaker lets nothing through; in the past: one at a time.
    pub open_until: Option<Timestamp>,
    /// The last answer of any kind, to the minute.
    pub last_answer_at: Option<Timestamp>,
    /// The first attempt without an answer since then.
    pub unanswered_since: Option<Timestamp>,
    /// Seconds during which it was tried without an answer.
    pub unanswered_seconds: i64,
    /// Since when its callbacks are given up as they reach the limit.
    pub given_up_at: Option<Timestamp>,
    /// Callbacks that are ready, [`COUNTED`] + 1 at most.
    pub ready: i64,
    /// When the oldest of them was created.
    pub oldest_ready_at: Option<Timestamp>,
}

/// What a list is narrowed to.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this controller's.
    pub controller_id: Option<ControllerId>,
    /// Only those that fail.
    pub in_trouble: bool,
}

/// Endpoints, at most `limit`.
///
/// # Errors
/// [`DbError`].
pub async fn list(session: &Session, filter: &Filter, limit: i64) -> Result<Vec<EndpointRow>, DbError> {
    let statement = match (&filter.controller_id, filter.in_trouble) {
        (_, true) => LIST_IN_TROUBLE,
        (Some(_), false) => LIST_OF_CONTROLLER,
        (None, false) => LIST,
    };
    let rows = session.query(statement, &[&filter.controller_id, &EndpointId(0), &limit]).await?;
    Ok(rows.iter().map(read).collect())
}

/// One endpoint.
///
/// # Errors
/// [`DbError`].
pub async fn find(session: &Session, endpoint_id: EndpointId) -> Result<Option<EndpointRow>, DbError> {
    let row = session.query_opt(FIND, &[&None::<&str>, &endpoint_id, &1_i64]).await?;
    Ok(row.as_ref().map(read))
}

fn read(row: &tokio_postgres::Row) -> EndpointRow {
    let (failures, open_until): (i32, Option<Timestamp>) = (row.get("consecutive_failures"), row.get("open_until"));
    let given_up_at: Option<Timestamp> = row.get("given_up_at");
    let state = match (given_up_at, open_until, failures) {
        (Some(_), ..) => "given_up",
        (None, Some(_), _) => "held",
        (None, None, 1..) => "failing",
        _ => "well",
    };
    EndpointRow {
        endpoint_id: row.get("endpoint_id"),
        controller_id: row.get("controller_id"),
        endpoint: row.get("endpoint"),
        state,
        consecutive_failures: failures,
        open_until,
        last_answer_at: row.get("last_answer_at"),
        unanswered_since: row.get("unanswered_since"),
        unanswered_seconds: row.get("unanswered_seconds"),
        given_up_at,
        ready: row.get("ready"),
        oldest_ready_at: row.get("oldest_ready_at"),
    }
}
