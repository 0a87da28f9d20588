//! Slices: claiming work under a lease, recording what was done, finishing or trying again later.
//!
//! Every write of a holder goes through [`hold`], which checks the token of the lease and renews it. A holder whose
//! lease was taken over (a process that was stopped and woke up) is refused there by the database.

use std::collections::BTreeMap;

use jiff::Timestamp;

pub use super::leases::{
    Claimed, LEASE, Trouble, Turn, claim, give_back, hold, keep_alive, keep_writers, to_wake, went_well, writers,
};
use super::pool::Session;
use super::{Db, DbError, Tx, callbacks, statements};
use lethe_domain::request::{BatchId, EndpointId, Mpid, RequestKey, RequestStatus, SliceId, SubjectRequestId};
use lethe_process::fault;

statements! {
    MEMBERS = "
        SELECT r.request_key, r.subject_request_id, r.request_type,
               ARRAY (SELECT m.mpid FROM lethe.request_mpids m WHERE m.request_key = r.request_key ORDER BY m.mpid) AS mpids
          FROM lethe.slice_members r
         WHERE r.slice_id = $1 AND r.status = 'in_progress' ORDER BY r.request_key";
    /// The first rows that are deleted open the receipt; the verification or the first failure does, where none are.
    RECORD_DELETED = "
        INSERT INTO lethe.erasure_receipts AS e (request_key, store, as_of, rows_deleted)
        SELECT request_key, $3, $4, rows FROM unnest($1::bigint[], $2::bigint[]) AS q (request_key, rows)
        ON CONFLICT (request_key, store) DO UPDATE SET rows_deleted = e.rows_deleted + excluded.rows_deleted";
    OPEN_RECEIPTS = "
        INSERT INTO lethe.erasure_receipts (request_key, store, as_of)
        SELECT key, $2, $3 FROM unnest($1::bigint[]) AS key
         WHERE NOT EXISTS (SELECT FROM lethe.erasure_receipts e WHERE e.request_key = key AND e.store = $2)
        ON CONFLICT (request_key, store) DO NOTHING";
    VERIFY = "
        INSERT INTO lethe.erasure_receipts AS e (request_key, store, as_of, rows_arrived, verified_at)
        SELECT request_key, $3, $4, arrived, (SELECT lethe.now())
          FROM unnest($1::bigint[], $2::bigint[]) AS q (request_key, arrived)
        ON CONFLICT (request_key, store) DO UPDATE
           SET verified_at = excluded.verified_at, rows_arrived = excluded.rows_arrived, failure = NULL
         WHERE e.verified_at IS NULL";
    RECORD_FAILURE = "
        UPDATE lethe.erasure_receipts SET failure = $3
         WHERE request_key = ANY ($1) AND store = $2 AND verified_at IS NULL AND failure IS DISTINCT FROM $3";
    /// Only requests whose every store has verified; the others stay in progress.
    COMPLETE_ERASED = "
        UPDATE lethe.requests r SET status = 'completed', completed_at = (SELECT lethe.now())
         WHERE r.request_key = ANY ($3) AND r.slice_id = $1 AND r.status = 'in_progress' AND cardinality($2::text[]) > 0
           AND (SELECT count(*) FROM lethe.erasure_receipts e
                 WHERE e.request_key = r.request_key AND e.store = ANY ($2) AND e.verified_at IS NOT NULL) = cardinality($2)
        RETURNING r.request_key";
    COMPLETE_COMPILED = "
        UPDATE lethe.requests r SET status = 'completed', completed_at = (SELECT lethe.now())
         WHERE r.request_key = $2 AND r.slice_id = $1 AND r.status = 'in_progress'
           AND EXISTS (SELECT FROM lethe.results s WHERE s.request_key = r.request_key)
        RETURNING r.request_key";
    FINISH = "
        UPDATE lethe.slices s
           SET state = 'completed', completed_at = lethe.now(), lease_token = NULL, lease_expires_at = NULL, last_error = NULL
         WHERE s.slice_id = $1 AND s.lease_token = $2 AND s.state = 'ready'
           AND NOT EXISTS (SELECT FROM lethe.slice_members m WHERE m.slice_id = $1 AND m.status = 'in_progress')";
    /// Of a slice that is not done. A lease that ends later than a lease lasts was given by a clock that was ahead.
    WORK = "
        SELECT s.attempts, s.next_attempt_at, s.last_error, s.needs_operator,
               coalesce(s.lease_expires_at BETWEEN lethe.now() AND lethe.now() + make_interval(secs => $2), false) AS leased,
               p.class, p.since, p.paused_until
          FROM lethe.slices s
          LEFT JOIN lethe.pauses p ON p.stage = s.stage AND p.controller_id = s.controller_id
         WHERE s.slice_id = $1 AND s.state = 'ready'";
    HINDRANCES = "
        SELECT controller_id, class, needs_operator, count(*) AS slices, min(next_attempt_at) AS next_attempt_at FROM (
            SELECT s.controller_id, coalesce(s.last_error, p.class) AS class, s.needs_operator, s.next_attempt_at
              FROM lethe.slices s
              LEFT JOIN lethe.pauses p ON p.stage = s.stage AND p.controller_id = s.controller_id
             WHERE s.batch_id = $1 AND s.state = 'ready') open
         WHERE class IS NOT NULL GROUP BY 1, 2, 3 ORDER BY 3 DESC, 4 DESC, 1, 2 LIMIT $2";
}

/// A request of a slice that is still in progress.
#[derive(Clone, Debug)]
pub struct Member {
    /// The internal key.
    pub request_key: RequestKey,
    /// The controller's own id of it.
    pub subject_request_id: SubjectRequestId,
    /// `erasure`, `access` or `portability`.
    pub request_type: String,
    /// The profiles that it is executed on.
    pub mpids: Vec<Mpid>,
}

/// The requests of a slice that are still in progress.
///
/// # Errors
/// [`DbError`].
pub async fn members(session: &Session, slice_id: SliceId) -> Result<Vec<Member>, DbError> {
    let rows = session.query(MEMBERS, &[&slice_id]).await?;
    Ok(rows
        .iter()
        .map(|row| Member {
            request_key: row.get("request_key"),
            subject_request_id: row.get("subject_request_id"),
            request_type: row.get("request_type"),
            mpids: row.get("mpids"),
        })
        .collect())
}

/// Adds rows deleted to the receipts of a store, each request once; part of the transaction that deletes them.
///
/// # Errors
/// [`DbError`].
pub async fn record_deleted(
    tx: &Tx,
    claimed: &Claimed,
    store: &str,
    deleted: &BTreeMap<RequestKey, i64>,
) -> Result<(), DbError> {
    let (keys, rows): (Vec<RequestKey>, Vec<i64>) = deleted.iter().unzip();
    tx.execute(RECORD_DELETED, &[&keys, &rows, &store, &claimed.as_of]).await?;
    Ok(())
}

/// Records which store failed for which requests.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn record_failure(
    db: &Db,
    claimed: &Claimed,
    store: &str,
    keys: &[RequestKey],
    class: &str,
) -> Result<(), DbError> {
    let tx = db.begin("record_store_failure").await?;
    hold(&tx, claimed).await?;
    tx.execute(OPEN_RECEIPTS, &[&keys, &store, &claimed.as_of]).await?;
    tx.execute(RECORD_FAILURE, &[&keys, &store, &class]).await?;
    tx.commit().await
}

/// What a store, asked again, holds nothing more of.
#[derive(Debug)]
pub struct Verified {
    /// The store.
    pub store: &'static str,
    /// The requests, each with the rows of its profiles that were received after the start of the execution.
    pub arrived: Vec<(RequestKey, i64)>,
}

/// What a finished attempt led to.
#[derive(Debug, Default)]
pub struct Finished {
    /// Requests that are completed now.
    pub completed: usize,
    /// The slice is done; otherwise some of its requests are still in progress.
    pub slice_done: bool,
    /// Endpoints that have callbacks now.
    pub endpoints: Vec<EndpointId>,
}

/// Records what the stores have verified, one entry for each of them, completes those of the members for which all have,
/// and the slice if none is left.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn finish_erasure(
    db: &Db,
    claimed: &Claimed,
    members: &[Member],
    verified: &[Verified],
) -> Result<Finished, DbError> {
    let stores: Vec<&str> = verified.iter().map(|one| one.store).collect();
    let members: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
    super::retrying(|| async {
        let tx = db.begin("finish_erasure").await?;
        hold(&tx, claimed).await?;
        for Verified { store, arrived } in verified {
            let (keys, rows): (Vec<RequestKey>, Vec<i64>) = arrived.iter().copied().unzip();
            tx.execute(VERIFY, &[&keys, &rows, store, &claimed.as_of]).await?;
        }
        let completed = tx.values(COMPLETE_ERASED, &[&claimed.slice_id, &stores, &members]).await?;
        let finished = finish(&tx, claimed, completed).await?;
        fault::point("finish.before_commit");
        tx.commit().await?;
        Ok(finished)
    })
    .await
}

/// Completes the request of a compilation whose result was recorded in the same transaction.
///
/// # Errors
/// [`DbError`].
pub(crate) async fn finish_compilation(tx: &Tx, claimed: &Claimed, request: RequestKey) -> Result<Finished, DbError> {
    let completed = tx.values(COMPLETE_COMPILED, &[&claimed.slice_id, &request]).await?;
    finish(tx, claimed, completed).await
}

async fn finish(tx: &Tx, claimed: &Claimed, completed: Vec<RequestKey>) -> Result<Finished, DbError> {
    let endpoints = callbacks::add(tx, &completed, RequestStatus::Completed).await?;
    let slice_done = tx.execute(FINISH, &[&claimed.slice_id, &claimed.token()]).await? == 1;
    Ok(Finished { completed: completed.len(), slice_done, endpoints })
}

/// Where the work on a slice stands.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Work {
    /// Attempts so far.
    pub attempts: i32,
    /// Not before.
    pub next_attempt_at: Timestamp,
    /// What the last attempt failed with, a class.
    pub last_error: Option<String>,
    /// Waiting does not mend that.
    pub needs_operator: bool,
    /// Somebody works on it.
    pub leased: bool,
    /// Why nothing of its controller is worked on, or only one slice at a time.
    pub pause: Option<Pause>,
}

/// The work of a controller pauses.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Pause {
    /// What its work failed with, a class.
    pub class: String,
    /// Since when.
    pub since: Timestamp,
    /// Nothing is tried before.
    pub until: Timestamp,
}

/// Where the work on a slice stands; `None` once it is done.
///
/// # Errors
/// [`DbError`].
pub async fn work(session: &Session, slice_id: SliceId) -> Result<Option<Work>, DbError> {
    let row = session.query_opt(WORK, &[&slice_id, &LEASE.as_secs_f64()]).await?;
    Ok(row.map(|row| Work {
        attempts: row.get("attempts"),
        next_attempt_at: row.get("next_attempt_at"),
        last_error: row.get("last_error"),
        needs_operator: row.get("needs_operator"),
        leased: row.get("leased"),
        pause: row.get::<_, Option<String>>("class").map(|class| Pause {
            class,
            since: row.get("since"),
            until: row.get("paused_until"),
        }),
    }))
}

/// What keeps slices of a batch from their end.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Hindrance {
    /// Whose.
    pub controller_id: String,
    /// A class.
    pub class: String,
    /// Waiting does not mend it.
    pub needs_operator: bool,
    /// So many slices.
    pub slices: i64,
    /// When the first of them is tried again.
    pub next_attempt_at: Timestamp,
}

/// What keeps slices of a batch from their end, at most `limit` entries: first what needs an operator, then by number.
///
/// # Errors
/// [`DbError`].
pub async fn hindrances(session: &Session, batch_id: BatchId, limit: i64) -> Result<Vec<Hindrance>, DbError> {
    let rows = session.query(HINDRANCES, &[&batch_id, &limit]).await?;
    Ok(rows
        .iter()
        .map(|row| Hindrance {
            controller_id: row.get("controller_id"),
            class: row.get("class"),
            needs_operator: row.get("needs_operator"),
            slices: row.get("slices"),
            next_attempt_at: row.get("next_attempt_at"),
        })
        .collect())
}
