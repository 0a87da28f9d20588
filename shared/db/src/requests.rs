//! Requests after their receipt: cancellation, status, lists, approval.

use std::collections::HashMap;

use jiff::Timestamp;
use tokio_postgres::Row;

use super::batches::{Intake, begin_intake, open_batch};
use super::calendar::CalendarCache;
use super::leader::{self, Term};
use super::leases::LEASE;
use super::pool::{Column, Session};
use super::{Db, DbError, Tx, callbacks, statements, stored_result};
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::request::{
    Approval, BatchId, ControllerId, EndpointId, Lane, RequestKey, RequestStatus, RequestType, SliceId,
    SubjectRequestId,
};
use lethe_domain::result_link::StoredResult;

statements! {
    /// Locks in the order of the key, as the release does: the two can wait for each other, never in a circle.
    CANCEL = "
        WITH wanted AS MATERIALIZED (
            SELECT r.request_key FROM lethe.requests r
              JOIN unnest($1::text[], $2::uuid[]) AS q (controller_id, subject_request_id)
             USING (controller_id, subject_request_id)
             WHERE r.status = 'pending' ORDER BY r.request_key FOR UPDATE OF r)
        UPDATE lethe.requests r
           SET status = 'cancelled', cancelled_at = lethe.now(), cancellation_received_at = lethe.now()
          FROM wanted WHERE r.request_key = wanted.request_key AND r.status = 'pending'
        RETURNING r.request_key";
    CANCELLATION_OUTCOMES = "
        SELECT q.ord, coalesce(r.status, p.status) AS status, coalesce(r.api_version, p.api_version) AS api_version,
               coalesce(r.cancellation_received_at, p.cancellation_received_at) AS received_at
          FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS q (controller_id, subject_request_id, ord)
          LEFT JOIN lethe.requests r USING (controller_id, subject_request_id)
          LEFT JOIN lethe.past_requests p USING (controller_id, subject_request_id)
         ORDER BY q.ord";
    /// Waits for every intake under way; those that come later see what is remembered here.
    LOCK_OUT_INTAKE = "SELECT pg_advisory_xact_lock(lethe.calendar_lock())";
    /// The first time of receipt stays, also when it is asked again. Repetitions in one burst are one row before the clock
    /// is read: the clock differs from row to row, and a row cannot be updated twice.
    REMEMBER_CANCELLATION = "
        INSERT INTO lethe.early_cancellations AS e (controller_id, subject_request_id, received_at, expires_at)
        SELECT controller_id, subject_request_id, lethe.now(),
               lethe.now() + (SELECT waiting_period FROM lethe.calendars ORDER BY version DESC LIMIT 1)
          FROM (SELECT DISTINCT * FROM unnest($1::text[], $2::uuid[])) AS q (controller_id, subject_request_id)
         WHERE EXISTS (SELECT FROM lethe.calendars)
        ON CONFLICT (controller_id, subject_request_id)
        DO UPDATE SET received_at = CASE WHEN e.expires_at > lethe.now() THEN e.received_at ELSE excluded.received_at END,
                      expires_at = greatest(e.expires_at, excluded.expires_at)
        RETURNING controller_id, subject_request_id, received_at";
    RUN_OUT = "SELECT EXISTS (SELECT FROM lethe.early_cancellations WHERE expires_at <= (SELECT lethe.now()))";
    /// Bounded: intake waits meanwhile.
    FORGET_CANCELLATIONS = "
        DELETE FROM lethe.early_cancellations
         WHERE ctid = ANY (ARRAY (SELECT ctid FROM lethe.early_cancellations
                                   WHERE expires_at <= (SELECT lethe.now()) ORDER BY expires_at LIMIT $1))";
    /// What is sealed only where there is a group: that is all that an answer needs of it.
    STATUS = "
        SELECT q.ord, r.request_key, r.controller_id, r.subject_request_id, r.api_version, r.request_type, r.status,
               r.expected_completion_time, d.sealed_reporting, s.result_id, s.token_salt, s.lines, r.received_at, r.approval,
               r.batch_id, r.slice_id, w.week IS NULL AS is_purged,
               CASE WHEN d.sealed_reporting IS NULL THEN d.sealed_request END AS sealed_request
          FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS q (controller_id, subject_request_id, ord)
          JOIN lethe.requests r ON r.controller_id = q.controller_id AND r.subject_request_id = q.subject_request_id
          LEFT JOIN lethe.detail_weeks w ON w.week = r.details_week
          LEFT JOIN LATERAL (SELECT sealed_reporting, sealed_request FROM lethe.request_details d
                              WHERE r.group_digest IS NOT NULL AND d.week = r.details_week
                                AND d.request_key = r.request_key OFFSET 0) d ON true
          LEFT JOIN lethe.results s ON s.request_key = r.request_key";
    /// What is left of those whose records were removed.
    PAST_STATUS = "
        SELECT q.ord, request_key, controller_id, subject_request_id, api_version, request_type, status,
               expected_completion_time, NULL::bytea AS sealed_reporting, NULL::uuid AS result_id, NULL::bytea AS token_salt,
               NULL::bigint AS lines, received_at, 'not_needed' AS approval, NULL::bigint AS batch_id, NULL::bigint AS slice_id,
               true AS is_purged, NULL::bytea AS sealed_request
          FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS q (controller_id, subject_request_id, ord)
          JOIN lethe.past_requests USING (controller_id, subject_request_id)";
    /// Nothing sealed: whoever asks has named the group, and the rest is in clear.
    GROUP = "
        SELECT r.request_key, r.controller_id, r.subject_request_id, r.api_version, r.request_type, r.status,
               r.expected_completion_time, NULL::bytea AS sealed_reporting, s.result_id, s.token_salt, s.lines, r.received_at, r.approval,
               r.batch_id, r.slice_id, w.week IS NULL AS is_purged, NULL::bytea AS sealed_request
          FROM lethe.requests r
          LEFT JOIN lethe.detail_weeks w ON w.week = r.details_week
          LEFT JOIN lethe.results s ON s.request_key = r.request_key
         WHERE r.controller_id = $1 AND r.group_digest = $2 AND r.request_key > $3
         ORDER BY r.request_key LIMIT $4";
    FIND_UNAPPROVED = "
        SELECT request_key, request_type FROM lethe.requests
         WHERE controller_id = $1 AND subject_request_id = $2 AND status = 'pending' AND approval = 'needed'
           FOR UPDATE";
    APPROVE = "
        UPDATE lethe.requests
           SET approval = 'approved', approved_at = $2, lane = $3, batch_id = $4, expected_completion_time = $5
         WHERE request_key = $1";
    RECEIPTS = "
        SELECT e.store, e.as_of, e.rows_deleted, e.rows_arrived, e.verified_at, e.failure
          FROM lethe.requests r
          JOIN lethe.erasure_receipts e ON e.slice_id = r.slice_id AND e.request_key = r.request_key
         WHERE r.request_key = $1 ORDER BY e.store";
    MPID_SOURCES = "
        SELECT m.source, m.profiles::bigint
          FROM lethe.requests r
          JOIN lethe.request_details d ON d.week = r.details_week AND d.request_key = r.request_key
         CROSS JOIN LATERAL (VALUES ('named', cardinality(d.named)), ('receipt', cardinality(d.at_receipt)),
                                    ('release', cardinality(d.at_release))) AS m (source, profiles)
         WHERE r.request_key = $1 AND m.profiles > 0 ORDER BY m.source";
    /// The work of a request that failed is tried again at once, as the first of its controller's.
    RETRY = "
        UPDATE lethe.slices s
           SET next_attempt_at = least(s.created_at, lethe.now()), last_nudged_at = '-infinity', nudges = 0
          FROM lethe.requests r
         WHERE r.controller_id = $1 AND r.subject_request_id = $2 AND r.status = 'in_progress'
           AND s.slice_id = r.slice_id AND s.state = 'ready'
           AND (s.lease_expires_at IS NULL
                OR s.lease_expires_at NOT BETWEEN lethe.now() AND lethe.now() + make_interval(secs => $3))
        RETURNING s.slice_id, r.request_key, s.stage";
    END_PAUSE = "
        UPDATE lethe.pauses SET paused_until = lethe.now() WHERE stage = $1 AND controller_id = $2";
}

/// What became of a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// The request is cancelled: now, or by an earlier cancellation.
    Cancelled {
        /// When the first cancellation was received.
        received_at: Timestamp,
        /// The version of the request.
        api_version: ApiVersion,
    },
    /// The request is under way or done.
    TooLate(RequestStatus),
    /// The request has not arrived yet; it will be cancelled as it arrives, within one waiting period.
    Remembered {
        /// When the first cancellation was received.
        received_at: Timestamp,
    },
    /// There is no such request, and the cancellation was not to be remembered.
    Unknown,
}

/// What to do with a cancellation whose request is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overtaking {
    /// It may have overtaken its request on the way: remember it.
    Remember,
    /// The caller asks for an answer: unknown.
    Refuse,
}

/// A controller's request.
pub type Target = (ControllerId, SubjectRequestId);

/// Cancels those of the given requests that are still pending; one outcome for each, and the endpoints to wake.
///
/// # Errors
/// [`DbError`]: then nothing is cancelled.
pub async fn cancel(
    db: &Db,
    targets: &[Target],
    overtaking: Overtaking,
) -> Result<(Vec<Cancellation>, Vec<EndpointId>), DbError> {
    super::retrying(|| async {
        let tx = db.begin("cancel_requests").await?;
        let (mut outcomes, mut endpoints) = cancel_known(&tx, targets).await?;
        lethe_process::fault::point("cancel.before_commit");
        tx.commit().await?;
        let unknown: Vec<usize> =
            outcomes.iter().enumerate().filter(|(_, one)| **one == Cancellation::Unknown).map(|(i, _)| i).collect();
        if overtaking == Overtaking::Remember && !unknown.is_empty() {
            let targets: Vec<Target> = unknown.iter().filter_map(|index| targets.get(*index).cloned()).collect();
            let (remembered, more) = remember(db, &targets).await?;
            for (index, outcome) in unknown.into_iter().zip(remembered) {
                if let Some(slot) = outcomes.get_mut(index) {
                    *slot = outcome;
                }
            }
            endpoints.extend(more);
        }
        Ok((outcomes, endpoints))
    })
    .await
}

async fn cancel_known(tx: &Tx, targets: &[Target]) -> Result<(Vec<Cancellation>, Vec<EndpointId>), DbError> {
    let controllers: Vec<&str> = targets.iter().map(|(controller, _)| controller.as_str()).collect();
    let ids: Vec<SubjectRequestId> = targets.iter().map(|(_, id)| *id).collect();
    let mut cancelled: Vec<RequestKey> = Vec::new();
    let outcomes = loop {
        cancelled.extend(tx.values::<RequestKey>(CANCEL, &[&controllers, &ids]).await?);
        let outcomes = tx.query(CANCELLATION_OUTCOMES, &[&controllers, &ids]).await?;
        // A request that was committed between the two statements is seen by the second only: once more, then.
        let outcomes: Vec<Cancellation> = outcomes.iter().map(read_cancellation).collect::<Result<_, _>>()?;
        if !outcomes.contains(&Cancellation::TooLate(RequestStatus::Pending)) {
            break outcomes;
        }
    };
    let endpoints = callbacks::add(tx, &cancelled, RequestStatus::Cancelled).await?;
    Ok((outcomes, endpoints))
}

fn read_cancellation(row: &Row) -> Result<Cancellation, DbError> {
    Ok(match row.column("status")? {
        None => Cancellation::Unknown,
        Some(RequestStatus::Cancelled) => {
            Cancellation::Cancelled { received_at: row.column("received_at")?, api_version: row.column("api_version")? }
        }
        Some(status) => Cancellation::TooLate(status),
    })
}

/// Remembers cancellations of requests that are not there, unless they have come meanwhile.
async fn remember(db: &Db, targets: &[Target]) -> Result<(Vec<Cancellation>, Vec<EndpointId>), DbError> {
    let tx = db.begin("remember_cancellations").await?;
    tx.query(LOCK_OUT_INTAKE, &[]).await?;
    let (mut outcomes, endpoints) = cancel_known(&tx, targets).await?;
    // One statement for all: intake waits meanwhile.
    let unknown = targets.iter().zip(&outcomes).filter(|(_, outcome)| **outcome == Cancellation::Unknown);
    let (controllers, ids): (Vec<&str>, Vec<SubjectRequestId>) =
        unknown.map(|((controller, id), _)| (controller.as_str(), *id)).unzip();
    let rows = tx.query(REMEMBER_CANCELLATION, &[&controllers, &ids]).await?;
    let remembered: HashMap<(&str, SubjectRequestId), Timestamp> = rows
        .iter()
        .map(|row| ((row.get("controller_id"), row.get("subject_request_id")), row.get("received_at")))
        .collect();
    for ((controller, id), outcome) in targets.iter().zip(&mut outcomes) {
        if *outcome == Cancellation::Unknown {
            let received_at = *remembered.get(&(controller.as_str(), *id)).ok_or(DbError::NoCalendar)?;
            *outcome = Cancellation::Remembered { received_at };
        }
    }
    tx.commit().await?;
    Ok((outcomes, endpoints))
}

/// Forgets cancellations whose request never came within the waiting period, at most `limit`; returns how many. Waits for
/// every intake under way: what counts is when a request was received, not when its transaction gets to look.
///
/// # Errors
/// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
pub async fn forget_cancellations(db: &Db, term: &Term, limit: i64) -> Result<u64, DbError> {
    if !db.session().await?.value::<bool>(RUN_OUT, &[]).await? {
        return Ok(0);
    }
    let tx = db.begin("forget_cancellations").await?;
    leader::assert_term(&tx, term).await?;
    tx.query(LOCK_OUT_INTAKE, &[]).await?;
    let forgotten = tx.execute(FORGET_CANCELLATIONS, &[&limit]).await?;
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(forgotten)
}

/// A request as status queries and lists show it.
#[derive(Clone, Debug)]
pub struct RequestRow {
    /// The internal key.
    pub request_key: RequestKey,
    /// Whose request it is.
    pub controller_id: ControllerId,
    /// The controller's own id of it.
    pub subject_request_id: SubjectRequestId,
    /// The version in which it was made.
    pub api_version: ApiVersion,
    /// What is asked for.
    pub request_type: RequestType,
    /// Where it stands.
    pub status: RequestStatus,
    /// When it is expected to be completed.
    pub expected_completion_time: Timestamp,
    /// What was personal in it is gone.
    pub is_purged: bool,
    /// What status answers need of it, sealed; `None` in lists, without a group, after the purge, and for requests of old.
    pub sealed_reporting: Option<Vec<u8>>,
    /// The sealed request, for a request of old only.
    pub sealed_request: Option<Vec<u8>>,
    /// The result, once there is one.
    pub result: Option<StoredResult>,
    /// When it was received.
    pub received_at: Timestamp,
    /// Whether an operator has to agree to it.
    pub approval: Approval,
    /// Its batch, where it has one.
    pub batch_id: Option<BatchId>,
    /// Its slice, once released.
    pub slice_id: Option<SliceId>,
}

pub(super) fn read_request(row: &Row) -> Result<RequestRow, DbError> {
    Ok(RequestRow {
        request_key: row.get("request_key"),
        controller_id: row.get("controller_id"),
        subject_request_id: row.get("subject_request_id"),
        api_version: row.column("api_version")?,
        request_type: row.column("request_type")?,
        status: row.column("status")?,
        expected_completion_time: row.get("expected_completion_time"),
        is_purged: row.get("is_purged"),
        sealed_reporting: row.get("sealed_reporting"),
        sealed_request: row.get("sealed_request"),
        result: stored_result::read(row),
        received_at: row.get("received_at"),
        approval: row.column("approval")?,
        batch_id: row.get("batch_id"),
        slice_id: row.get("slice_id"),
    })
}

/// A request of a controller.
///
/// # Errors
/// [`DbError`].
pub async fn find(session: &Session, target: &Target) -> Result<Option<RequestRow>, DbError> {
    find_all(session, std::slice::from_ref(target)).await?.pop().flatten().transpose()
}

/// Requests by controller and id, in the order of the targets. A row that cannot be read is an error of that one alone.
///
/// # Errors
/// [`DbError`].
pub async fn find_all(
    session: &Session,
    targets: &[Target],
) -> Result<Vec<Option<Result<RequestRow, DbError>>>, DbError> {
    let mut found: Vec<Option<Result<RequestRow, DbError>>> = targets.iter().map(|_| None).collect();
    for statement in [STATUS, PAST_STATUS] {
        let open: Vec<(usize, &Target)> =
            targets.iter().enumerate().filter(|(place, _)| found.get(*place).is_some_and(Option::is_none)).collect();
        if open.is_empty() {
            break;
        }
        let controllers: Vec<&str> = open.iter().map(|(_, (controller, _))| controller.as_str()).collect();
        let ids: Vec<SubjectRequestId> = open.iter().map(|(_, (_, id))| *id).collect();
        for row in session.query(statement, &[&controllers, &ids]).await? {
            let ord: i64 = row.get("ord");
            let place = usize::try_from(ord - 1).ok().and_then(|ord| open.get(ord));
            let slot = place.and_then(|(place, _)| found.get_mut(*place));
            *slot.ok_or(DbError::Unexpected { place: "requests" })? = Some(read_request(&row));
        }
    }
    Ok(found)
}

/// The requests of a group after the one with the key `after`, in the order of receipt.
///
/// # Errors
/// [`DbError`].
pub async fn of_group(
    session: &Session,
    controller_id: &ControllerId,
    group_digest: &[u8],
    after: RequestKey,
    limit: i64,
) -> Result<Vec<RequestRow>, DbError> {
    session.query(GROUP, &[controller_id, &group_digest, &after, &limit]).await?.iter().map(read_request).collect()
}

/// Approves a request that waits for it; the slot that it has now, or `None` if no such request waits.
///
/// # Errors
/// [`DbError`].
pub async fn approve(db: &Db, target: &Target) -> Result<Option<(Lane, lethe_domain::request::Slot)>, DbError> {
    let tx = db.begin("approve_request").await?;
    let Intake { received_at: now, calendar: version } = begin_intake(&tx).await?;
    let calendar = CalendarCache::default().get(&tx, version).await?;
    let Some(row) = tx.query_opt(FIND_UNAPPROVED, &[&target.0, &target.1]).await? else {
        tx.rollback().await;
        return Ok(None);
    };
    let lane = Lane::once_approved(row.column("request_type")?);
    let slot = calendar.calendar.slot(lane, now)?;
    let batch = open_batch(&tx, lane, slot, calendar.version).await?;
    let key: RequestKey = row.get("request_key");
    tx.execute(APPROVE, &[&key, &now, &lane, &batch, &slot.expected_completion_time]).await?;
    tx.commit().await?;
    Ok(Some((lane, slot)))
}

/// What a store did for a request.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Receipt {
    /// The store's name.
    pub store: String,
    /// What was received up to here was to be erased.
    pub as_of: Timestamp,
    /// Rows deleted.
    pub rows_deleted: i64,
    /// Rows received later, which stay.
    pub rows_arrived: Option<i64>,
    /// When the store, asked again, held nothing more of it.
    pub verified_at: Option<Timestamp>,
    /// The class of the last failure of this store.
    pub failure: Option<String>,
}

/// The receipts of a request, by store.
///
/// # Errors
/// [`DbError`].
pub async fn receipts(session: &Session, key: RequestKey) -> Result<Vec<Receipt>, DbError> {
    let rows = session.query(RECEIPTS, &[&key]).await?;
    Ok(rows
        .iter()
        .map(|row| Receipt {
            store: row.get("store"),
            as_of: row.get("as_of"),
            rows_deleted: row.get("rows_deleted"),
            rows_arrived: row.get("rows_arrived"),
            verified_at: row.get("verified_at"),
            failure: row.get("failure"),
        })
        .collect())
}

/// How many profiles a request is executed on, by the source of each: `named`, `receipt`, `release`.
///
/// # Errors
/// [`DbError`].
pub async fn mpid_sources(session: &Session, key: RequestKey) -> Result<Vec<(String, i64)>, DbError> {
    Ok(session.query(MPID_SOURCES, &[&key]).await?.iter().map(|row| (row.get("source"), row.get("profiles"))).collect())
}

/// Lets the work of a request that waits after a failure begin again at once, and records it; `false` where nothing waits.
///
/// # Errors
/// [`DbError`].
pub async fn retry(db: &Db, target: &Target) -> Result<bool, DbError> {
    let tx = db.begin("retry_request").await?;
    let Some(row) = tx.query_opt(RETRY, &[&target.0, &target.1, &LEASE.as_secs_f64()]).await? else {
        tx.rollback().await;
        return Ok(false);
    };
    tx.execute(END_PAUSE, &[&row.get::<_, &str>("stage"), &target.0]).await?;
    let details = serde_json::json!({"subject_request_id": target.1, "slice_id": row.get::<_, i64>("slice_id")});
    super::audit::record(&tx, Some(&target.0), Some(row.get("request_key")), "request.retried", &details).await?;
    tx.commit().await?;
    Ok(true)
}
