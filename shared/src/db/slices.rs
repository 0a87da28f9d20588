//! Slices: claiming work under a lease, recording what was done, finishing or trying again later.
//!
//! Every write of a holder goes through [`hold`], which checks the token of the lease and renews it. A holder whose
//! lease was taken over (a process that was stopped and woke up) is refused there by the database.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::pool::Session;
use super::requests::ADD_CALLBACKS;
use super::{Db, DbError, Tx, statements};
use crate::fault;
use crate::request::{ControllerId, EndpointId, Mpid, RequestKey, RequestStatus, SliceId, SubjectRequestId};

statements! {
    /// The start of the execution is set by the first claim and kept by all others.
    CLAIM = "
        UPDATE lethe.slices
           SET lease_token = gen_random_uuid(), lease_expires_at = lethe.now() + make_interval(secs => $3),
               attempts = attempts + 1, started_at = coalesce(started_at, lethe.now())
         WHERE slice_id = $1 AND stage = $2 AND state = 'ready' AND next_attempt_at <= lethe.now()
           AND (lease_expires_at IS NULL OR lease_expires_at <= lethe.now())
        RETURNING controller_id, lease_token, attempts, started_at";
    HOLD = "
        UPDATE lethe.slices SET lease_expires_at = lethe.now() + make_interval(secs => $3)
         WHERE slice_id = $1 AND lease_token = $2 AND state = 'ready'";
    MEMBERS = "
        SELECT r.request_key, r.subject_request_id, r.request_type,
               ARRAY (SELECT m.mpid FROM lethe.request_mpids m WHERE m.request_key = r.request_key ORDER BY m.mpid)
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
         WHERE request_key = ANY ($1) AND store = $2 AND verified_at IS NULL";
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
    RETRY_LATER = "
        UPDATE lethe.slices
           SET lease_token = NULL, lease_expires_at = NULL, last_error = $4, last_nudged_at = '-infinity', nudges = 0,
               next_attempt_at = lethe.now() + make_interval(secs => $3)
         WHERE slice_id = $1 AND lease_token = $2 AND state = 'ready'";
    /// Due, in nobody's hand, and not nudged for a while; the pause doubles with each nudge, up to five minutes.
    NUDGE = "
        UPDATE lethe.slices SET last_nudged_at = lethe.now(), nudges = nudges + 1
         WHERE slice_id IN (
            SELECT slice_id FROM lethe.slices
             WHERE stage = $1 AND state = 'ready' AND next_attempt_at <= (SELECT lethe.now())
               AND (lease_expires_at IS NULL OR lease_expires_at <= (SELECT lethe.now()))
               AND last_nudged_at <= (SELECT lethe.now()) - make_interval(secs => least($2 * power(2, least(nudges, 10)), 300))
             ORDER BY next_attempt_at LIMIT $3 FOR UPDATE SKIP LOCKED)
        RETURNING slice_id";
}

/// How long a lease lasts; it is renewed by every step, and by [`keep_alive`] during long ones.
pub const LEASE: Duration = Duration::from_mins(1);

/// The stages of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Erase profiles.
    Erasure,
    /// Compile a result file.
    Compilation,
}

impl Stage {
    /// As in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Erasure => "erasure",
            Self::Compilation => "compilation",
        }
    }
}

/// A slice in our hand.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Which one.
    pub slice_id: SliceId,
    /// Whose requests.
    pub controller_id: ControllerId,
    /// The start of its execution: what was received up to here is covered.
    pub as_of: Timestamp,
    /// This claim included.
    pub attempts: i32,
    token: Uuid,
}

impl Claimed {
    /// The token of this lease, a fresh one for every claim.
    #[must_use]
    pub const fn token(&self) -> Uuid {
        self.token
    }
}

/// Claims a slice; `None` where it is done, not due, or in somebody else's hand.
///
/// # Errors
/// [`DbError`].
pub async fn claim(session: &Session, slice_id: SliceId, stage: Stage) -> Result<Option<Claimed>, DbError> {
    let row = session.query_opt(CLAIM, &[&slice_id, &stage.as_str(), &LEASE.as_secs_f64()]).await?;
    row.map(|row| {
        let controller_id = row.get::<_, &str>(0).parse();
        Ok(Claimed {
            slice_id,
            controller_id: controller_id.map_err(|_| DbError::Unexpected { place: "slices.controller_id" })?,
            token: row.get(1),
            attempts: row.get(2),
            as_of: row.get(3),
        })
    })
    .transpose()
}

/// Checks that the lease is still ours, renews it, and keeps others from taking it until the transaction ends.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn hold(session: &Session, claimed: &Claimed) -> Result<(), DbError> {
    match session.execute(HOLD, &[&claimed.slice_id, &claimed.token, &LEASE.as_secs_f64()]).await? {
        1 => Ok(()),
        _ if fault::defect("no_lease_check") => Ok(()),
        _ => Err(DbError::LeaseLost),
    }
}

/// Renews the lease again and again. Ends only with an error: when the lease is lost, or cannot be renewed in time.
/// Run it beside the work and stop the work when it ends.
pub async fn keep_alive(db: &Db, claimed: &Claimed) -> DbError {
    let mut last = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(LEASE / 4).await;
        let renewed = async { hold(&db.session().await?, claimed).await }.await;
        match renewed {
            Ok(()) => last = tokio::time::Instant::now(),
            Err(DbError::LeaseLost) => return DbError::LeaseLost,
            Err(error) if last.elapsed() > LEASE * 3 / 4 => return error,
            Err(_) => {}
        }
    }
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
            request_key: row.get(0),
            subject_request_id: row.get(1),
            request_type: row.get(2),
            mpids: row.get(3),
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
        let rows = tx.query(COMPLETE_ERASED, &[&claimed.slice_id, &stores, &members]).await?;
        let completed: Vec<RequestKey> = rows.iter().map(|row| row.get(0)).collect();
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
pub async fn finish_compilation(tx: &Tx, claimed: &Claimed, request: RequestKey) -> Result<Finished, DbError> {
    let rows = tx.query(COMPLETE_COMPILED, &[&claimed.slice_id, &request]).await?;
    let completed: Vec<RequestKey> = rows.iter().map(|row| row.get(0)).collect();
    finish(tx, claimed, completed).await
}

async fn finish(tx: &Tx, claimed: &Claimed, completed: Vec<RequestKey>) -> Result<Finished, DbError> {
    let status = RequestStatus::Completed;
    let endpoints = if completed.is_empty() {
        Vec::new()
    } else {
        let rows = tx.query(ADD_CALLBACKS, &[&completed, &status.as_str(), &status.sequence()]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    };
    let slice_done = tx.execute(FINISH, &[&claimed.slice_id, &claimed.token]).await? == 1;
    Ok(Finished { completed: completed.len(), slice_done, endpoints })
}

/// Gives a slice back, to be tried again after `delay`; zero hands it to the next one at once.
///
/// # Errors
/// [`DbError`].
pub async fn retry_later(
    session: &Session,
    claimed: &Claimed,
    delay: Duration,
    class: Option<&str>,
) -> Result<(), DbError> {
    session.execute(RETRY_LATER, &[&claimed.slice_id, &claimed.token, &delay.as_secs_f64(), &class]).await?;
    Ok(())
}

/// Slices of a stage that are due and untouched, at most `limit`; none twice within the pause, which grows.
///
/// # Errors
/// [`DbError`].
pub async fn nudge(session: &Session, stage: Stage, pause_seconds: f64, limit: i64) -> Result<Vec<SliceId>, DbError> {
    let rows = session.query(NUDGE, &[&stage.as_str(), &pause_seconds, &limit]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
