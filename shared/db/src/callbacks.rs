//! Callbacks: claiming those of an endpoint, recording what came of them, and the breaker.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::pool::{Column, Session};
use super::reporting::Reporting;
use super::{Db, DbError, Tx, statements, stored_result};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::crypto::Keys;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::request::{
    CallbackId, CallbackState, ControllerId, EndpointId, RequestKey, RequestStatus, SubjectRequestId,
};
use lethe_domain::result_link::StoredResult;
use lethe_domain::signature_algorithm::SignatureAlgorithm;

statements! {
    ADD_CALLBACKS = "SELECT * FROM lethe.add_callbacks($1, $2, $3)";
    CLAIM = "
        SELECT callback_id, url_no, request_status, expected_completion_time, attempt, started_at, controller_id,
               subject_request_id, sealed_request, signature_algorithm, result_id, token_salt, lines, replay, endpoint_id,
               sealed_reporting, api_version
          FROM lethe.claim_due_callbacks($1, $2, $3, $4, $5)";
    PUT_OFF = "
        UPDATE lethe.callbacks
           SET lease_token = NULL, lease_expires_at = NULL, next_attempt_at = lethe.now() + interval '1 hour'
         WHERE callback_id = ANY ($1) AND lease_token = $2";
    /// The requests of these were purged: nothing of theirs can be sent any more. As the purge does it.
    EXHAUST_PURGED = "
        WITH open AS MATERIALIZED (
            SELECT callback_id FROM lethe.callbacks
             WHERE request_key = ANY (ARRAY (SELECT r.request_key FROM lethe.callbacks c
                                               JOIN lethe.requests r USING (request_key)
                                              WHERE c.callback_id = ANY ($1) AND c.lease_token = $2
                                                -- Counted, so that it is asked one by one.
                                                AND (SELECT count(*) FROM lethe.request_details d
                                                      WHERE d.week = r.details_week
                                                        AND d.request_key = r.request_key) = 0))
               AND state IN ('waiting', 'ready') ORDER BY callback_id FOR UPDATE)
        UPDATE lethe.callbacks c
           SET state = 'exhausted', finished_at = lethe.now(), lease_token = NULL, lease_expires_at = NULL,
               exhausted_because = 'retention'
          FROM open WHERE c.callback_id = open.callback_id";
    /// Only the holder of the lease records. In the order of the key, as everyone who locks several callbacks.
    FINISH = "
        UPDATE lethe.callbacks c
           SET state = q.state, lease_token = NULL, lease_expires_at = NULL,
               retrying_for = c.retrying_for + make_interval(secs => q.used),
               next_attempt_at = (SELECT lethe.now()) + make_interval(secs => q.delay),
               exhausted_because = CASE WHEN q.state = 'exhausted' THEN 'time_used_up' END,
               finished_at = CASE WHEN q.state = 'ready' THEN NULL ELSE (SELECT lethe.now()) END
          FROM (SELECT u.* FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::float8[], $5::float8[])
                       AS u (callback_id, token, state, used, delay)
                  JOIN lethe.callbacks l USING (callback_id) ORDER BY l.callback_id FOR UPDATE OF l) q
         WHERE c.callback_id = q.callback_id AND c.lease_token = q.token
        RETURNING c.callback_id, c.state, c.endpoint_id";
    /// How long each of these has been retried; the give-up looks at time used, not at time held back.
    RETRIED = "
        SELECT callback_id, extract(epoch FROM retrying_for)::float8 AS retrying_for FROM lethe.callbacks WHERE callback_id = ANY ($1)";
    /// Not of callbacks that are gone: a failover has lost them, or their records have been removed.
    LOG_ATTEMPTS = "
        INSERT INTO lethe.callback_attempts (callback_id, attempt, started_at, duration, status_code, error_class, reason)
        SELECT callback_id, attempt, started_at, make_interval(secs => seconds), status_code, error_class, reason
          FROM unnest($1::uuid[], $2::int[], $3::timestamptz[], $4::float8[], $5::smallint[], $6::text[], $7::text[])
               AS q (callback_id, attempt, started_at, seconds, status_code, error_class, reason)
         WHERE EXISTS (SELECT FROM lethe.callbacks c WHERE c.callback_id = q.callback_id)
        ON CONFLICT DO NOTHING
        RETURNING callback_id, attempt";
    RELEASE_SUCCESSORS = "SELECT lethe.release_successors($1)";
    /// In the order of the key, as everyone who locks several endpoints. One that is well is written once a minute, so
    /// that operators see when it last answered.
    LOCK_ENDPOINTS = "
        SELECT endpoint_id FROM lethe.endpoints
         WHERE endpoint_id = ANY ($2)
            OR endpoint_id = ANY ($1)
               AND (consecutive_failures > 0 OR open_until IS NOT NULL OR last_answer_at IS NULL
                    OR last_answer_at <= (SELECT lethe.now()) - interval '1 minute')
         ORDER BY endpoint_id FOR NO KEY UPDATE";
    CLOSE_BREAKERS = "
        UPDATE lethe.endpoints
           SET consecutive_failures = 0, open_until = NULL, last_answer_at = lethe.now(), unanswered_since = NULL,
               unanswered_at = NULL, unanswered_for = '0', given_up_at = NULL
         WHERE endpoint_id = ANY ($1)";
    /// Time without an answer is what passed between attempts, up to the longest pause that couriers make.
    COUNT_FAILURES = "
        UPDATE lethe.endpoints e
           SET consecutive_failures = e.consecutive_failures + q.failures,
               last_answer_at = CASE WHEN q.answered THEN q.instant ELSE e.last_answer_at END,
               unanswered_since = CASE WHEN NOT q.answered THEN coalesce(e.unanswered_since, q.since) END,
               unanswered_at = CASE WHEN NOT q.answered THEN q.instant END,
               unanswered_for = CASE WHEN q.answered THEN '0' ELSE e.unanswered_for
                   + least(greatest(q.instant - coalesce(e.unanswered_at, q.since), '0'), make_interval(secs => $5)) END,
               given_up_at = CASE WHEN NOT q.answered THEN e.given_up_at END
          FROM (SELECT u.*, (SELECT lethe.now()) AS instant
                  FROM unnest($1::bigint[], $2::int[], $3::bool[], $4::timestamptz[])
                       AS u (endpoint_id, failures, answered, since)) q
         WHERE e.endpoint_id = q.endpoint_id
        RETURNING e.endpoint_id, e.consecutive_failures, extract(epoch FROM e.unanswered_for)::float8 AS unanswered_for";
    OPEN_BREAKER = "
        UPDATE lethe.endpoints SET open_until = lethe.now() + make_interval(secs => $2) WHERE endpoint_id = $1";
}

/// Adds the callbacks of requests that have reached `status`; the endpoints that have something to do now.
pub(super) async fn add(tx: &Tx, requests: &[RequestKey], status: RequestStatus) -> Result<Vec<EndpointId>, DbError> {
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    tx.values(ADD_CALLBACKS, &[&requests, &status, &status.sequence()]).await
}

/// How long a callback that cannot be read is put off.
pub const UNREADABLE: Duration = Duration::from_hours(1);

/// A callback under a lease of this process.
#[derive(Clone, Debug)]
pub struct ClaimedCallback {
    /// The same on every attempt.
    pub callback_id: CallbackId,
    /// The endpoint it goes to.
    pub endpoint_id: EndpointId,
    /// From 1.
    pub attempt: i32,
    /// When this attempt began.
    pub started_at: Timestamp,
    /// Whose request it is about.
    pub controller_id: ControllerId,
    /// How it is signed.
    pub algorithm: SignatureAlgorithm,
    /// The status that it reports.
    pub status: RequestStatus,
    /// When the request was expected to be completed as the status was reached.
    pub expected_completion_time: Timestamp,
    /// The request that it is about.
    pub subject_request_id: SubjectRequestId,
    /// The version of that request.
    pub api_version: ApiVersion,
    /// The group of that request.
    pub group_id: Option<String>,
    /// Where it goes.
    pub url: String,
    /// The result, where the request is completed: its id, the salt of its token, and its lines.
    pub result: Option<StoredResult>,
    /// An operator has it sent once more.
    pub replay: bool,
    token: Uuid,
}

/// Limits of an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct EndpointLimits {
    /// Deliveries in flight at most, over all couriers.
    pub in_flight: i32,
    /// How long a claim is ours; longer than a delivery can take.
    pub lease: Duration,
}

/// Claims due callbacks of endpoints, of each up to as many as are wanted, as its limit and its breaker allow. Each
/// endpoint is named once.
///
/// # Errors
/// [`DbError`].
pub async fn claim(
    session: &Session,
    keys: &Keys,
    limits: EndpointLimits,
    wanted: &[(EndpointId, i32)],
) -> Result<Vec<ClaimedCallback>, DbError> {
    let token = Uuid::new_v4();
    let (endpoints, wanted): (Vec<EndpointId>, Vec<i32>) = wanted.iter().copied().unzip();
    let params: [&(dyn ToSql + Sync); 5] =
        [&endpoints, &wanted, &token, &limits.lease.as_secs_f64(), &limits.in_flight];
    let rows = session.query(CLAIM, &params).await?;
    // One that cannot be read (sealed under another master key, say) must not hold up the others of its endpoint.
    let (mut unreadable, mut purged): (Vec<CallbackId>, Vec<CallbackId>) = (Vec::new(), Vec::new());
    let mut claimed = Vec::with_capacity(rows.len());
    for row in &rows {
        if row.get::<_, Option<&[u8]>>("sealed_request").is_none()
            && row.get::<_, Option<&[u8]>>("sealed_reporting").is_none()
        {
            purged.push(row.get("callback_id"));
            continue;
        }
        match read_claimed(row, keys, token) {
            Ok(callback) => claimed.push(callback),
            Err(error) => {
                let callback: CallbackId = row.get("callback_id");
                tracing::error!(%error, %callback, "a callback cannot be read; it is put off for an hour");
                unreadable.push(callback);
            }
        }
    }
    if !unreadable.is_empty() {
        session.execute(PUT_OFF, &[&unreadable, &token]).await?;
    }
    if !purged.is_empty() {
        let callbacks = session.execute(EXHAUST_PURGED, &[&purged, &token]).await?;
        tracing::warn!(callbacks, "gave up on callbacks: their requests were purged");
        metrics::counter!("lethe_callbacks_given_up_total", "reason" => "retention").increment(callbacks);
    }
    Ok(claimed)
}

fn read_claimed(row: &Row, keys: &Keys, token: Uuid) -> Result<ClaimedCallback, DbError> {
    let unexpected = || DbError::Unexpected { place: "callbacks" };
    let controller_id: ControllerId = row.get("controller_id");
    let subject_request_id: SubjectRequestId = row.get("subject_request_id");
    let reporting = Reporting::open(
        keys,
        &controller_id,
        subject_request_id,
        row.get("sealed_reporting"),
        row.get("sealed_request"),
    )?;
    let mut reporting = reporting.ok_or_else(unexpected)?;
    let url_no = usize::try_from(row.get::<_, i16>("url_no")).map_err(|_| unexpected())?;
    if url_no >= reporting.status_callback_urls.len() {
        return Err(unexpected());
    }
    let status: RequestStatus = row.column("request_status")?;
    Ok(ClaimedCallback {
        callback_id: row.get("callback_id"),
        endpoint_id: row.get("endpoint_id"),
        attempt: row.get("attempt"),
        started_at: row.get("started_at"),
        controller_id,
        algorithm: row.column("signature_algorithm")?,
        status,
        expected_completion_time: row.get("expected_completion_time"),
        subject_request_id,
        api_version: row.column("api_version")?,
        group_id: reporting.group_id,
        // The other URLs are of no use here.
        url: reporting.status_callback_urls.swap_remove(url_no),
        result: stored_result::read(row).filter(|_| status == RequestStatus::Completed),
        replay: row.get("replay"),
        token,
    })
}

/// How failures are treated.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// The wait after each failure.
    pub backoff: BackoffPolicy,
    /// Time used by attempts and waits after which a callback is exhausted; and time without any answer after which an
    /// endpoint is given up.
    pub give_up: Duration,
    /// Consecutive failures of an endpoint that open its breaker.
    pub breaker_threshold: i32,
    /// The waits between the probes of an open breaker.
    pub probe: BackoffPolicy,
    /// If more than this passes between two attempts, nobody has tried the endpoint meanwhile: the excess does not
    /// count as time without an answer.
    pub longest_pause: Duration,
}

/// What the recording of a group led to.
#[derive(Debug, Default)]
pub struct RecordedAttempts {
    /// Callbacks by the state they are in now; one that is missing was no longer ours.
    pub states: BTreeMap<CallbackState, usize>,
    /// Breakers that were opened.
    pub breakers_opened: usize,
    /// Endpoints that have not answered for the time after which one is given up ([`super::give_up`]).
    pub unanswered: Vec<EndpointId>,
}

/// Records a group of attempts in one transaction: states, log, successors, breakers. `jitter` in `0.0..1.0`.
///
/// # Errors
/// [`DbError`]: then nothing is recorded, the leases run out, and the callbacks are sent once more.
pub async fn record(
    db: &Db,
    policy: &RetryPolicy,
    group: &[(ClaimedCallback, DeliveryAttempt)],
    jitter: impl Fn() -> f64,
) -> Result<RecordedAttempts, DbError> {
    let randoms: Vec<f64> = group.iter().map(|_| jitter()).collect();
    let probe_jitter = jitter();
    super::retrying(|| record_once(db, policy, group, &randoms, probe_jitter)).await
}

async fn record_once(
    db: &Db,
    policy: &RetryPolicy,
    group: &[(ClaimedCallback, DeliveryAttempt)],
    randoms: &[f64],
    probe_jitter: f64,
) -> Result<RecordedAttempts, DbError> {
    let tx = db.begin("record_attempts").await?;
    let ids: Vec<CallbackId> = group.iter().map(|(claimed, _)| claimed.callback_id).collect();
    let tokens: Vec<Uuid> = group.iter().map(|(claimed, _)| claimed.token).collect();
    let retried: BTreeMap<CallbackId, f64> = if group.iter().any(|(_, attempt)| attempt.error_class.is_some()) {
        tx.query(RETRIED, &[&ids]).await?.iter().map(|row| (row.get("callback_id"), row.get("retrying_for"))).collect()
    } else {
        BTreeMap::new()
    };
    let (mut states, mut used, mut delays) = (Vec::new(), Vec::new(), Vec::new());
    for ((claimed, attempt), random) in group.iter().zip(randoms) {
        let spent = attempt.duration.as_secs_f64();
        if attempt.error_class.is_none() {
            states.push(CallbackState::Delivered);
            used.push(spent);
            delays.push(0.0);
            continue;
        }
        let failures = u32::try_from(claimed.attempt).unwrap_or(1);
        let delay = policy.backoff.delay_after(failures, *random, attempt.retry_after).as_secs_f64();
        let total = retried.get(&claimed.callback_id).copied().unwrap_or(0.0) + spent + delay;
        let is_over = total > policy.give_up.as_secs_f64();
        states.push(if is_over { CallbackState::Exhausted } else { CallbackState::Ready });
        used.push(spent + delay);
        delays.push(delay);
    }
    let rows = tx.query(FINISH, &[&ids, &tokens, &states, &used, &delays]).await?;
    let mut recorded = RecordedAttempts::default();
    let mut ended: Vec<CallbackId> = Vec::new();
    let mut ours: BTreeSet<CallbackId> = BTreeSet::new();
    for row in &rows {
        let state: CallbackState = row.column("state")?;
        *recorded.states.entry(state).or_default() += 1;
        ours.insert(row.get("callback_id"));
        if state != CallbackState::Ready {
            ended.push(row.get("callback_id"));
        }
    }
    // What is no longer ours was sent all the same: the log tells of every attempt.
    let new = log_attempts(&tx, group).await?;
    if !ended.is_empty() {
        tx.query(RELEASE_SUCCESSORS, &[&ended]).await?;
    }
    move_breakers(&tx, policy, group, &ours, &new, probe_jitter, &mut recorded).await?;
    lethe_process::fault::point("record.before_commit");
    tx.commit().await?;
    Ok(recorded)
}

/// The attempts that were not in the log before: a lost answer to a commit has the same group recorded twice.
async fn log_attempts(
    session: &Session,
    group: &[(ClaimedCallback, DeliveryAttempt)],
) -> Result<BTreeSet<(CallbackId, i32)>, DbError> {
    let ids: Vec<CallbackId> = group.iter().map(|(claimed, _)| claimed.callback_id).collect();
    let numbers: Vec<i32> = group.iter().map(|(claimed, _)| claimed.attempt).collect();
    let started: Vec<Timestamp> = group.iter().map(|(claimed, _)| claimed.started_at).collect();
    let seconds: Vec<f64> = group.iter().map(|(_, attempt)| attempt.duration.as_secs_f64()).collect();
    let codes: Vec<Option<i16>> =
        group.iter().map(|(_, attempt)| attempt.status_code.and_then(|code| i16::try_from(code).ok())).collect();
    let classes: Vec<Option<&str>> = group.iter().map(|(_, attempt)| attempt.error_class).collect();
    let reasons: Vec<Option<&str>> = group.iter().map(|(_, attempt)| attempt.reason.as_deref()).collect();
    let params: [&(dyn ToSql + Sync); 7] = [&ids, &numbers, &started, &seconds, &codes, &classes, &reasons];
    let rows = session.query(LOG_ATTEMPTS, &params).await?;
    Ok(rows.iter().map(|row| (row.get("callback_id"), row.get("attempt"))).collect())
}

/// What a group tells of an endpoint in trouble.
struct Trouble {
    failures: i32,
    /// Some answer came, if not a good one.
    answered: bool,
    since: Timestamp,
}

async fn move_breakers(
    session: &Session,
    policy: &RetryPolicy,
    group: &[(ClaimedCallback, DeliveryAttempt)],
    ours: &BTreeSet<CallbackId>,
    new: &BTreeSet<(CallbackId, i32)>,
    jitter: f64,
    recorded: &mut RecordedAttempts,
) -> Result<(), DbError> {
    let well: BTreeSet<EndpointId> = group
        .iter()
        // Only an answer shows that an endpoint is well; what was never sent shows nothing.
        .filter(|(claimed, attempt)| {
            !attempt.endpoint_trouble && attempt.status_code.is_some() && ours.contains(&claimed.callback_id)
        })
        .map(|(claimed, _)| claimed.endpoint_id)
        .collect();
    let mut troubled: BTreeMap<EndpointId, Trouble> = BTreeMap::new();
    for (claimed, attempt) in group {
        let is_new = new.contains(&(claimed.callback_id, claimed.attempt));
        if attempt.endpoint_trouble && is_new && !well.contains(&claimed.endpoint_id) {
            let trouble = troubled.entry(claimed.endpoint_id).or_insert(Trouble {
                failures: 0,
                answered: false,
                since: claimed.started_at,
            });
            trouble.failures += 1;
            trouble.answered |= attempt.status_code.is_some();
            trouble.since = trouble.since.min(claimed.started_at);
        }
    }
    let endpoints: Vec<EndpointId> = troubled.keys().copied().collect();
    let answering: Vec<EndpointId> = well.iter().copied().collect();
    let locked = session.query(LOCK_ENDPOINTS, &[&answering, &endpoints]).await?;
    let recovered: Vec<EndpointId> =
        locked.iter().map(|row| row.get("endpoint_id")).filter(|id| well.contains(id)).collect();
    if !recovered.is_empty() {
        session.execute(CLOSE_BREAKERS, &[&recovered]).await?;
    }
    if endpoints.is_empty() {
        return Ok(());
    }
    let failures: Vec<i32> = troubled.values().map(|one| one.failures).collect();
    let answered: Vec<bool> = troubled.values().map(|one| one.answered).collect();
    let since: Vec<Timestamp> = troubled.values().map(|one| one.since).collect();
    let pause = policy.longest_pause.as_secs_f64();
    for row in session.query(COUNT_FAILURES, &[&endpoints, &failures, &answered, &since, &pause]).await? {
        let (endpoint, failures, unanswered): (EndpointId, i32, f64) =
            (row.get("endpoint_id"), row.get("consecutive_failures"), row.get("unanswered_for"));
        if failures >= policy.breaker_threshold {
            let probes = u32::try_from(failures - policy.breaker_threshold).unwrap_or(0) + 1;
            session.execute(OPEN_BREAKER, &[&endpoint, &policy.probe.delay(probes, jitter).as_secs_f64()]).await?;
            recorded.breakers_opened += 1;
        }
        if unanswered >= policy.give_up.as_secs_f64() {
            recorded.unanswered.push(endpoint);
        }
    }
    Ok(())
}
