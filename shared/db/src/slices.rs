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
               coalesce(d.named, '{}') || coalesce(d.at_receipt, '{}') || coalesce(d.at_release, '{}') AS mpids
          FROM lethe.slice_members r
          -- Without its details a request cannot be executed, and must not end.
         CROSS JOIN LATERAL (SELECT named, at_receipt, at_release FROM lethe.request_details d
                              WHERE d.week = r.details_week AND d.request_key = r.request_key OFFSET 0) d
         WHERE r.slice_id = $1 AND r.status = 'in_progress' ORDER BY r.request_key";
    /// With a place for each request of the slice, completed or not.
    OPEN_RECEIPTS = "
        WITH opened AS (
            INSERT INTO lethe.slice_receipts (slice_id, store, as_of, request_keys, rows_deleted, rows_arrived, verified_at,
                                              failures)
            SELECT $1, $2, $3, keys, array_fill(0::bigint, size), array_fill(NULL::bigint, size),
                   array_fill(NULL::timestamptz, size), array_fill(NULL::text, size)
              FROM (SELECT array_agg(m.request_key ORDER BY m.request_key) AS keys, ARRAY[count(*)::integer] AS size
                      FROM lethe.slice_members m WHERE m.slice_id = $1 HAVING count(*) > 0) members
             WHERE NOT EXISTS (SELECT FROM lethe.slice_receipts e WHERE e.slice_id = $1 AND e.store = $2)
            ON CONFLICT (slice_id, store) DO NOTHING
            RETURNING request_keys)
        SELECT request_keys FROM opened
        UNION ALL
        SELECT request_keys FROM lethe.slice_receipts WHERE slice_id = $1 AND store = $2";
    /// Numbers and receipts meet by their places: a plan that is kept must not compare each with each.
    RECORD_DELETED = "
        UPDATE lethe.slice_receipts e
           SET rows_deleted = ARRAY (SELECT u.before + coalesce(u.rows, 0)
                                       FROM unnest(e.rows_deleted, $3::bigint[]) WITH ORDINALITY AS u (before, rows, place)
                                      ORDER BY u.place)
         WHERE e.slice_id = $1 AND e.store = $2";
    /// The first verification stays, and what arrived with it; a failure of before is over.
    VERIFY = "
        UPDATE lethe.slice_receipts e
           SET (verified_at, rows_arrived, failures) = (
                SELECT array_agg(CASE WHEN is_new THEN instant.now ELSE u.verified_at END ORDER BY u.place),
                       array_agg(CASE WHEN is_new THEN u.arrived ELSE u.before END ORDER BY u.place),
                       array_agg(CASE WHEN is_new THEN NULL ELSE u.failure END ORDER BY u.place)
                  FROM (SELECT lethe.now() AS now) AS instant
                 CROSS JOIN unnest(e.verified_at, e.rows_arrived, e.failures, $3::bigint[])
                            WITH ORDINALITY AS u (verified_at, before, failure, arrived, place)
                 CROSS JOIN LATERAL (SELECT u.verified_at IS NULL AND u.arrived IS NOT NULL AS is_new) verified)
         WHERE e.slice_id = $1 AND e.store = $2";
    RECORD_FAILURE = "
        UPDATE lethe.slice_receipts e
           SET failures = ARRAY (SELECT CASE WHEN u.verified_at IS NULL AND u.fails THEN $4 ELSE u.failure END
                                   FROM unnest(e.verified_at, e.failures, $3::bool[])
                                        WITH ORDINALITY AS u (verified_at, failure, fails, place)
                                  ORDER BY u.place)
         WHERE e.slice_id = $1 AND e.store = $2";
    /// Only requests whose every store has verified; the others stay in progress.
    COMPLETE_ERASED = "
        UPDATE lethe.requests r SET status = 'completed', completed_at = (SELECT lethe.now())
         WHERE r.request_key = ANY (ARRAY (
                SELECT u.request_key FROM lethe.slice_receipts e
                 CROSS JOIN LATERAL unnest(e.request_keys, e.verified_at) AS u (request_key, verified_at)
                 WHERE e.slice_id = $1 AND e.store = ANY ($2) AND u.verified_at IS NOT NULL AND u.request_key = ANY ($3)
                 GROUP BY u.request_key HAVING count(*) = cardinality($2::text[])))
           AND r.slice_id = $1 AND r.status = 'in_progress'
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
    /// The profiles that it is executed on, in order.
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
        .map(|row| {
            let mut mpids: Vec<Mpid> = row.get("mpids");
            mpids.sort_unstable();
            Member {
                request_key: row.get("request_key"),
                subject_request_id: row.get("subject_request_id"),
                request_type: row.get("request_type"),
                mpids,
            }
        })
        .collect())
}

/// The receipts of a store for the requests of a slice.
#[derive(Clone, Debug)]
pub struct Receipts {
    slice_id: SliceId,
    /// The store.
    pub store: &'static str,
    /// In order; what is recorded of a request stands in its place.
    keys: Vec<RequestKey>,
}

impl Receipts {
    /// A value for each place.
    fn places<T>(&self, value: impl Fn(RequestKey) -> T) -> Vec<T> {
        self.keys.iter().map(|key| value(*key)).collect()
    }
}

/// The receipts of a store, opened where there are none yet.
///
/// # Errors
/// [`DbError`].
pub async fn open_receipts(session: &Session, claimed: &Claimed, store: &'static str) -> Result<Receipts, DbError> {
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&claimed.slice_id, &store, &claimed.as_of];
    let mut row = session.query_opt(OPEN_RECEIPTS, &params).await?;
    if row.is_none() {
        // Another one has opened them while the statement was under way; the next one sees them.
        row = session.query_opt(OPEN_RECEIPTS, &params).await?;
    }
    let row = row.ok_or(DbError::Unexpected { place: "slice_receipts" })?;
    Ok(Receipts { slice_id: claimed.slice_id, store, keys: row.get("request_keys") })
}

/// Adds rows deleted to receipts; part of the transaction that deletes them, which holds the lease.
///
/// # Errors
/// [`DbError`].
pub async fn record_deleted(tx: &Tx, receipts: &Receipts, deleted: &BTreeMap<RequestKey, i64>) -> Result<(), DbError> {
    let rows = receipts.places(|key| deleted.get(&key).copied().unwrap_or(0));
    tx.execute(RECORD_DELETED, &[&receipts.slice_id, &receipts.store, &rows]).await?;
    Ok(())
}

/// Records which store failed for which requests.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn record_failure(
    db: &Db,
    claimed: &Claimed,
    receipts: &Receipts,
    keys: &[RequestKey],
    class: &str,
) -> Result<(), DbError> {
    let fails = receipts.places(|key| keys.contains(&key));
    let tx = db.begin("record_store_failure").await?;
    hold(&tx, claimed).await?;
    tx.execute(RECORD_FAILURE, &[&receipts.slice_id, &receipts.store, &fails, &class]).await?;
    tx.commit().await
}

/// What a store, asked again, holds nothing more of.
#[derive(Debug)]
pub struct Verified {
    /// The receipts of the store.
    pub receipts: Receipts,
    /// The requests, each with the rows of its profiles that were received after the start of the execution.
    pub arrived: BTreeMap<RequestKey, i64>,
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

/// Records what the stores have verified, completes those of the members for which all have,
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
    let stores: Vec<&str> = verified.iter().map(|one| one.receipts.store).collect();
    let members: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
    super::retrying(|| async {
        let tx = db.begin("finish_erasure").await?;
        hold(&tx, claimed).await?;
        for Verified { receipts, arrived } in verified {
            let rows = receipts.places(|key| arrived.get(&key).copied());
            tx.execute(VERIFY, &[&receipts.slice_id, &receipts.store, &rows]).await?;
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
