//! Giving up on endpoints: what has gone unanswered for too long is exhausted, in steps, so that it ends (ADR 0030).

use std::time::Duration;

use jiff::Timestamp;

use super::callbacks::RELEASE_SUCCESSORS;
use super::{Db, DbError, Tx, statements};
use lethe_domain::request::{CallbackId, ControllerId, EndpointId};

/// Callbacks of a step at most.
pub const STEP: i64 = 500;

statements! {
    /// Chosen by age, locked in the order of the key, as by everyone who locks several callbacks. One that is under way
    /// is left to its courier, one that an operator has sent again counts from then on.
    EXHAUST = "
        WITH instant AS MATERIALIZED (SELECT lethe.now() AS now),
        chosen AS MATERIALIZED (
            SELECT l.callback_id FROM lethe.callbacks l
             WHERE l.callback_id = ANY (ARRAY (
                SELECT c.callback_id FROM lethe.callbacks c
                 WHERE c.endpoint_id = $1 AND c.state = 'ready' AND c.state <> 'delivered'
                   AND c.created_at <= $2
                   AND (c.replayed_at IS NULL OR c.replayed_at <= $2)
                   AND (c.lease_expires_at IS NULL OR c.lease_expires_at <= (SELECT now FROM instant))
                 ORDER BY c.created_at LIMIT $3))
               AND l.state = 'ready' AND (l.lease_expires_at IS NULL OR l.lease_expires_at <= (SELECT now FROM instant))
             ORDER BY l.callback_id FOR UPDATE SKIP LOCKED)
        UPDATE lethe.callbacks c
           SET state = 'exhausted', lease_token = NULL, lease_expires_at = NULL, exhausted_because = $4,
               finished_at = (SELECT now FROM instant)
          FROM chosen WHERE c.callback_id = chosen.callback_id
        RETURNING c.callback_id";
    CUTOFF = "SELECT lethe.now() - make_interval(secs => $1)";
    ENDPOINT = "
        SELECT controller_id, scheme || '://' || host || ':' || port AS endpoint, given_up_at IS NOT NULL AS was_given_up,
               extract(epoch FROM unanswered_for)::float8 AS unanswered_for
          FROM lethe.endpoints WHERE endpoint_id = $1 FOR NO KEY UPDATE";
    MARK = "
        UPDATE lethe.endpoints SET given_up_at = lethe.now() WHERE endpoint_id = $1 AND given_up_at IS NULL";
}

/// Who gives an endpoint up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenUpBy {
    /// A courier, while the endpoint has not answered for the time after which a callback is given up.
    Courier {
        /// That time.
        after: Duration,
    },
    /// An operator, whatever the endpoint does.
    Operator {
        /// Only callbacks that are older.
        older_than: Duration,
    },
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Callbacks that are exhausted now.
    pub exhausted: usize,
    /// The endpoint was not given up before.
    pub first: bool,
}

impl GivenUpBy {
    const fn age(self) -> Duration {
        match self {
            Self::Courier { after } => after,
            Self::Operator { older_than } => older_than,
        }
    }

    const fn reason(self) -> &'static str {
        match self {
            Self::Courier { .. } => "endpoint_given_up",
            Self::Operator { .. } => "given_up_by_operator",
        }
    }
}

/// Up to when a callback must have been created for all the steps of one giving up. Read once: what comes while they are
/// under way is left alone, and they come to an end.
///
/// # Errors
/// [`DbError`].
pub async fn cutoff(db: &Db, by: GivenUpBy) -> Result<Timestamp, DbError> {
    db.session().await?.value(CUTOFF, &[&by.age().as_secs_f64()]).await
}

/// Exhausts the oldest callbacks of an endpoint from before the [`cutoff`], [`STEP`] at most, in one transaction, and
/// records that the endpoint is given up. Their successors are then ready, and the next step takes those that are old
/// enough. A process that dies between two steps leaves complete ones behind: the next failed attempt starts again.
///
/// `None` where the endpoint is unknown, or has answered since.
///
/// # Errors
/// [`DbError`].
pub async fn step(
    db: &Db,
    endpoint_id: EndpointId,
    by: GivenUpBy,
    cutoff: Timestamp,
    is_first: bool,
) -> Result<Option<Step>, DbError> {
    super::retrying(|| async {
        let tx = db.begin("give_up_endpoint").await?;
        let rows = tx.query(EXHAUST, &[&endpoint_id, &cutoff, &STEP, &by.reason()]).await?;
        let exhausted: Vec<CallbackId> = rows.iter().map(|row| row.get("callback_id")).collect();
        if !exhausted.is_empty() {
            tx.query(RELEASE_SUCCESSORS, &[&exhausted]).await?;
        }
        // Endpoints are locked last.
        let Some(first) = mark(&tx, endpoint_id, by, is_first, exhausted.len()).await? else {
            tx.rollback().await;
            return Ok(None);
        };
        lethe_process::fault::point("give_up.before_commit");
        tx.commit().await?;
        lethe_process::fault::point("give_up.after_commit");
        Ok(Some(Step { exhausted: exhausted.len(), first }))
    })
    .await
}

/// Whether it was not given up before; `None` where it is not to be.
async fn mark(
    tx: &Tx,
    endpoint_id: EndpointId,
    by: GivenUpBy,
    is_first: bool,
    exhausted: usize,
) -> Result<Option<bool>, DbError> {
    let Some(row) = tx.query_opt(ENDPOINT, &[&endpoint_id]).await? else { return Ok(None) };
    let (was_given_up, unanswered): (bool, f64) = (row.get("was_given_up"), row.get("unanswered_for"));
    let (first, told) = match by {
        GivenUpBy::Courier { after } if unanswered < after.as_secs_f64() => return Ok(None),
        GivenUpBy::Courier { .. } => {
            tx.execute(MARK, &[&endpoint_id]).await?;
            (!was_given_up, !was_given_up)
        }
        // An operator gives up what is there, not what is to come.
        GivenUpBy::Operator { .. } => (is_first, is_first),
    };
    if told {
        let controller_id: ControllerId = row.get("controller_id");
        let details = serde_json::json!({
            "endpoint_id": endpoint_id, "endpoint": row.get::<_, &str>("endpoint"), "because": by.reason(),
            "older_than_seconds": by.age().as_secs(), "callbacks_of_first_step": exhausted,
        });
        super::audit::record(tx, Some(&controller_id), None, "endpoint.given_up", &details).await?;
    }
    Ok(Some(first))
}
