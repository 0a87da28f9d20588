//! Callbacks as operators see them, and sending them once more. Each list is served by an index, whatever the number of
//! callbacks.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::pool::{Column, Session};
use super::{Db, DbError, statements};
use lethe_domain::request::{CallbackId, CallbackState, ControllerId, EndpointId, RequestStatus, SubjectRequestId};

/// The columns of a list, for the callbacks that a CTE `chosen` names.
macro_rules! listed {
    ($($chosen:tt)*) => {
        concat!(
            "WITH RECURSIVE ", $($chosen)*,
            "SELECT c.callback_id, r.controller_id, r.subject_request_id, c.request_status, c.state, c.attempts,
                    c.next_attempt_at, e.scheme || '://' || e.host || ':' || e.port AS endpoint, a.status_code, a.error_class,
                    c.created_at, c.finished_at, a.reason, c.exhausted_because
               FROM chosen
               JOIN lethe.callbacks c ON c.callback_id = chosen.callback_id
               JOIN lethe.requests r ON r.request_key = c.request_key
               JOIN lethe.endpoints e ON e.endpoint_id = c.endpoint_id
               -- The last one that has ended: another one may be under way.
               LEFT JOIN LATERAL (
                    SELECT * FROM lethe.callback_attempts l WHERE l.callback_id = c.callback_id
                     ORDER BY l.attempt DESC LIMIT 1) a ON true
              ORDER BY chosen.place"
        )
    };
}

/// The latest of one state over the endpoints of `found`. First the latest one of each endpoint: the latest `$2` of all
/// lie with the `$2` endpoints that come first then.
macro_rules! latest_of_endpoints {
    () => {
        "firsts AS MATERIALIZED (
            SELECT found.endpoint_id, latest.created_at FROM found
             CROSS JOIN LATERAL (
                SELECT c.created_at FROM lethe.callbacks c
                 WHERE c.endpoint_id = found.endpoint_id AND c.state = $1 AND c.state <> 'delivered'
                 ORDER BY c.created_at DESC LIMIT 1) latest
             ORDER BY latest.created_at DESC LIMIT $2),
        chosen AS MATERIALIZED (
            SELECT c.callback_id, row_number() OVER (ORDER BY c.created_at DESC, c.callback_id) AS place
              FROM firsts
             CROSS JOIN LATERAL (
                SELECT c.callback_id, c.created_at FROM lethe.callbacks c
                 WHERE c.endpoint_id = firsts.endpoint_id AND c.state = $1 AND c.state <> 'delivered'
                 ORDER BY c.created_at DESC LIMIT $2) c
             ORDER BY c.created_at DESC, c.callback_id LIMIT $2) "
    };
}

statements! {
    /// What is delivered, or everything: of the latest requests.
    LATEST = listed!(
        "chosen AS MATERIALIZED (
            SELECT c.callback_id,
                   row_number() OVER (ORDER BY c.request_key DESC, c.url_no DESC, c.sequence DESC) AS place
              FROM lethe.callbacks c WHERE $1::text IS NULL OR c.state = $1
             ORDER BY c.request_key DESC, c.url_no DESC, c.sequence DESC LIMIT $2) "
    );
    /// The same of one controller; not further back than its latest hundred thousand requests, should they have no
    /// callbacks.
    LATEST_OF_CONTROLLER = listed!(
        "chosen AS MATERIALIZED (
            SELECT c.callback_id,
                   row_number() OVER (ORDER BY c.request_key DESC, c.url_no DESC, c.sequence DESC) AS place
              FROM (SELECT r.request_key FROM lethe.requests r WHERE r.controller_id = $3
                     ORDER BY r.request_key DESC LIMIT 100000) latest
              JOIN lethe.callbacks c ON c.request_key = latest.request_key
             WHERE $1::text IS NULL OR c.state = $1
             ORDER BY c.request_key DESC, c.url_no DESC, c.sequence DESC LIMIT $2) "
    );
    /// What is not delivered. The endpoints that have such are found one after the other, each by one look into the index.
    UNDELIVERED = listed!(
        "found AS (
            (SELECT c.endpoint_id FROM lethe.callbacks c
              WHERE c.state <> 'delivered' ORDER BY c.endpoint_id LIMIT 1)
            UNION ALL
            SELECT next.endpoint_id FROM found
             CROSS JOIN LATERAL (
                SELECT c.endpoint_id FROM lethe.callbacks c
                 WHERE c.endpoint_id > found.endpoint_id AND c.state <> 'delivered'
                 ORDER BY c.endpoint_id LIMIT 1) next), ",
        latest_of_endpoints!()
    );
    UNDELIVERED_OF_CONTROLLER = listed!(
        "found AS (SELECT e.endpoint_id FROM lethe.endpoints e WHERE e.controller_id = $3), ",
        latest_of_endpoints!()
    );
    OF_REQUEST = listed!(
        "chosen AS MATERIALIZED (
            SELECT c.callback_id, row_number() OVER (ORDER BY c.created_at DESC, c.callback_id) AS place
              FROM lethe.controllers k
              JOIN lethe.requests r ON r.controller_id = k.controller_id AND r.subject_request_id = $4
              JOIN lethe.callbacks c ON c.request_key = r.request_key
             WHERE ($3::text IS NULL OR k.controller_id = $3) AND ($1::text IS NULL OR c.state = $1)
             ORDER BY c.created_at DESC, c.callback_id LIMIT $2) "
    );
    /// What a controller has that can be sent once more; the others are on their way still. What was purged has no URL
    /// any more.
    EXHAUSTED_TO_REPLAY = "
        SELECT c.callback_id FROM lethe.endpoints e
         CROSS JOIN LATERAL (
            SELECT c.callback_id FROM lethe.callbacks c JOIN lethe.requests r ON r.request_key = c.request_key
             WHERE c.endpoint_id = e.endpoint_id AND c.state = 'exhausted' AND c.state <> 'delivered'
               AND EXISTS (SELECT FROM lethe.detail_weeks w WHERE w.week = r.details_week)
             ORDER BY c.created_at DESC LIMIT $2) c
         WHERE e.controller_id = $1 LIMIT $2";
    DELIVERED_TO_REPLAY = "
        SELECT c.callback_id FROM (
            SELECT r.request_key FROM lethe.requests r
             WHERE (r.controller_id, r.request_key) >= ($1, 0)
               AND (r.controller_id, r.request_key) <= ($1, 9223372036854775807)
               AND EXISTS (SELECT FROM lethe.detail_weeks w WHERE w.week = r.details_week)
             ORDER BY r.controller_id DESC, r.request_key DESC) latest
         CROSS JOIN LATERAL (
            SELECT c.callback_id FROM lethe.callbacks c
             WHERE c.request_key = latest.request_key AND c.state = 'delivered') c
         LIMIT $2";
    /// The requests and their weeks are locked as well: what a purge is under way with is waited for, and has nothing to
    /// send then.
    REPLAY = "
        WITH wanted AS MATERIALIZED (
            SELECT c.callback_id FROM lethe.requests r
              JOIN lethe.callbacks c USING (request_key)
              JOIN lethe.detail_weeks w ON w.week = r.details_week
             WHERE c.callback_id = ANY ($1) AND ($2::text IS NULL OR r.controller_id = $2) AND c.state = $3
             ORDER BY c.callback_id LIMIT $4 FOR KEY SHARE OF w FOR SHARE OF r FOR UPDATE OF c)
        UPDATE lethe.callbacks c
           SET state = 'ready', replays = c.replays + 1, retrying_for = '0', next_attempt_at = lethe.now(),
               replayed_at = lethe.now(), exhausted_because = NULL, finished_at = NULL
          FROM wanted WHERE c.callback_id = wanted.callback_id
        RETURNING c.callback_id, c.endpoint_id";
    AUDIT_REPLAYS = "
        INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
        SELECT r.controller_id, r.request_key, 'callback.replayed',
               jsonb_build_object('subject_request_id', r.subject_request_id, 'callback_id', c.callback_id,
                                  'request_status', c.request_status, 'database_user', session_user)
          FROM lethe.callbacks c JOIN lethe.requests r USING (request_key)
         WHERE c.callback_id = ANY ($1) ORDER BY c.callback_id";
}

/// A callback as operators see it. No path: only the endpoint.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CallbackRow {
    /// The same on every attempt.
    pub callback_id: CallbackId,
    /// Whose request it is about.
    pub controller_id: ControllerId,
    /// Which request.
    pub subject_request_id: SubjectRequestId,
    /// The status that it reports.
    pub request_status: RequestStatus,
    /// Where it stands.
    pub state: CallbackState,
    /// Attempts so far.
    pub attempts: i32,
    /// When it is due.
    pub next_attempt_at: Timestamp,
    /// Scheme, host and port.
    pub endpoint: String,
    /// The answer to the last attempt.
    pub last_status_code: Option<i16>,
    /// Why the last attempt failed.
    pub last_error_class: Option<String>,
    /// What exactly failed, where the class does not tell.
    pub last_reason: Option<String>,
    /// Why it is exhausted: `time_used_up`, `endpoint_given_up`, `given_up_by_operator` or `retention`.
    pub exhausted_because: Option<String>,
    /// When the status was reached.
    pub created_at: Timestamp,
    /// When it was delivered or exhausted.
    pub finished_at: Option<Timestamp>,
}

/// What a list is narrowed to.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this controller's.
    pub controller_id: Option<ControllerId>,
    /// Only those in this state.
    pub state: Option<CallbackState>,
    /// Only those of this request.
    pub request: Option<SubjectRequestId>,
}

/// The latest callbacks, latest first; what is delivered, or in any state, in the order of the requests, and of one
/// controller out of its latest hundred thousand requests.
///
/// # Errors
/// [`DbError`].
pub async fn list(session: &Session, filter: &Filter, limit: i64) -> Result<Vec<CallbackRow>, DbError> {
    let (controller, state) = (&filter.controller_id, filter.state);
    let undelivered = state.is_some_and(|state| state != CallbackState::Delivered);
    let rows = match (filter.request, controller) {
        (Some(request), _) => session.query(OF_REQUEST, &[&state, &limit, controller, &request]).await?,
        (None, Some(_)) if undelivered => {
            session.query(UNDELIVERED_OF_CONTROLLER, &[&state, &limit, controller]).await?
        }
        (None, None) if undelivered => session.query(UNDELIVERED, &[&state, &limit]).await?,
        (None, Some(_)) => session.query(LATEST_OF_CONTROLLER, &[&state, &limit, controller]).await?,
        (None, None) => session.query(LATEST, &[&state, &limit]).await?,
    };
    rows.iter()
        .map(|row| {
            Ok(CallbackRow {
                callback_id: row.get("callback_id"),
                controller_id: row.get("controller_id"),
                subject_request_id: row.get("subject_request_id"),
                request_status: row.column("request_status")?,
                state: row.column("state")?,
                attempts: row.get("attempts"),
                next_attempt_at: row.get("next_attempt_at"),
                endpoint: row.get("endpoint"),
                last_status_code: row.get("status_code"),
                last_error_class: row.get("error_class"),
                last_reason: row.get("reason"),
                exhausted_because: row.get("exhausted_because"),
                created_at: row.get("created_at"),
                finished_at: row.get("finished_at"),
            })
        })
        .collect()
}

/// What is to be sent once more.
#[derive(Clone, Debug)]
pub struct Replay<'a> {
    /// Only these; without them whatever the controller has.
    pub callbacks: Option<&'a [CallbackId]>,
    /// Only this controller's.
    pub controller_id: Option<&'a ControllerId>,
    /// Exhausted or delivered.
    pub state: CallbackState,
    /// At most so many.
    pub limit: i64,
}

/// Lets callbacks that have ended be sent once more, and records it in the audit trail; the callbacks, and the endpoints
/// to wake.
///
/// # Errors
/// [`DbError`].
pub async fn replay(db: &Db, what: &Replay<'_>) -> Result<(Vec<CallbackId>, BTreeSet<EndpointId>), DbError> {
    super::retrying(|| async {
        let tx = db.begin("replay_callbacks").await?;
        let wanted: Vec<CallbackId> = if let Some(callbacks) = what.callbacks {
            callbacks.to_vec()
        } else {
            let found = if what.state == CallbackState::Exhausted { EXHAUSTED_TO_REPLAY } else { DELIVERED_TO_REPLAY };
            tx.values(found, &[&what.controller_id, &what.limit]).await?
        };
        let rows = tx.query(REPLAY, &[&wanted, &what.controller_id, &what.state, &what.limit]).await?;
        let callbacks: Vec<CallbackId> = rows.iter().map(|row| row.get("callback_id")).collect();
        tx.execute(AUDIT_REPLAYS, &[&callbacks]).await?;
        tx.commit().await?;
        Ok((callbacks, rows.iter().map(|row| row.get("endpoint_id")).collect()))
    })
    .await
}
