//! Lists of requests for operators. No index names the status of a request, since that would make each change of status a
//! change of all indexes (ADR 0024): each list goes by an index that leads to its requests.

use super::pool::Session;
use super::requests::{RequestRow, read_request};
use super::{DbError, statements};
use lethe_domain::request::{BatchState, ControllerId, RequestKey, RequestStatus};

statements! {
    LATEST = "
        SELECT request_key FROM lethe.requests ORDER BY request_key DESC LIMIT $1";
    /// In the order of the index that leads to the controller's: a plan that is kept must not look for them among all.
    LATEST_OF_CONTROLLER = "
        SELECT request_key FROM lethe.requests
         WHERE (controller_id, request_key) >= ($2, 0) AND (controller_id, request_key) <= ($2, 9223372036854775807)
         ORDER BY controller_id DESC, request_key DESC LIMIT $1";
    CANCELLED = "
        SELECT request_key FROM lethe.requests WHERE cancelled_at IS NOT NULL ORDER BY request_key DESC LIMIT $1";
    CANCELLED_OF_CONTROLLER = "
        SELECT request_key FROM lethe.requests
         WHERE (controller_id, request_key) >= ($2, 0) AND (controller_id, request_key) <= ($2, 9223372036854775807)
           AND cancelled_at IS NOT NULL
         ORDER BY controller_id DESC, request_key DESC LIMIT $1";
    AWAITING_APPROVAL = "
        SELECT request_key FROM lethe.requests
         WHERE approval = 'needed' AND cancelled_at IS NULL AND ($2::text IS NULL OR controller_id = $2)
         ORDER BY request_key DESC LIMIT $1";
    /// By the slices that are not done: each has at least one of them.
    IN_PROGRESS = "
        SELECT r.request_key
          FROM (SELECT slice_id, batch_id, controller_id, first_request, last_request FROM lethe.slices
                 WHERE state = 'ready' AND ($2::text IS NULL OR controller_id = $2)
                 ORDER BY last_request DESC LIMIT $1) s
         CROSS JOIN LATERAL (
            SELECT r.request_key FROM lethe.requests r
             WHERE r.batch_id = s.batch_id AND r.controller_id = s.controller_id
               AND r.request_key BETWEEN s.first_request AND s.last_request
               AND r.slice_id = s.slice_id AND r.status = 'in_progress'
             ORDER BY r.request_key DESC LIMIT $1) r
         LIMIT $1";
    /// By the batches that can hold them, the latest first.
    BY_BATCH = "
        SELECT r.request_key
          FROM (SELECT batch_id FROM lethe.batches WHERE state = ANY ($4) ORDER BY batch_id DESC) b
         CROSS JOIN LATERAL (
            SELECT r.request_key FROM lethe.requests r
             WHERE r.batch_id = b.batch_id AND ($2::text IS NULL OR r.controller_id = $2) AND r.status = $3
             ORDER BY r.controller_id DESC, r.request_key DESC LIMIT $1) r
         LIMIT $1";
    BY_KEYS = "
        SELECT r.request_key, r.controller_id, r.subject_request_id, r.api_version, r.request_type, r.status,
               r.expected_completion_time, NULL::bytea AS sealed_reporting, s.result_id, s.token_salt, s.lines, r.received_at, r.approval,
               r.batch_id, r.slice_id, w.week IS NULL AS is_purged, NULL::bytea AS sealed_request
          FROM lethe.requests r
          LEFT JOIN lethe.detail_weeks w ON w.week = r.details_week
          LEFT JOIN lethe.results s ON s.request_key = r.request_key
         WHERE r.request_key = ANY ($1) ORDER BY r.request_key DESC";
}

/// What a list is narrowed to.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this controller's.
    pub controller_id: Option<ControllerId>,
    /// Only in this status.
    pub status: Option<RequestStatus>,
    /// Only those that wait for an approval.
    pub awaiting_approval: bool,
}

/// Requests that fit, at most `limit`, latest first. Where more fit, those that are pending, in progress or completed are
/// taken from the latest batches and slices.
///
/// # Errors
/// [`DbError`].
pub async fn list(session: &Session, filter: &Filter, limit: i64) -> Result<Vec<RequestRow>, DbError> {
    let mut keys = keys(session, filter, limit).await?;
    keys.sort_unstable_by(|a, b| b.cmp(a));
    keys.dedup();
    keys.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    session.query(BY_KEYS, &[&keys]).await?.iter().map(read_request).collect()
}

async fn keys(session: &Session, filter: &Filter, limit: i64) -> Result<Vec<RequestKey>, DbError> {
    let controller = &filter.controller_id;
    let awaiting = async || session.query(AWAITING_APPROVAL, &[&limit, controller]).await;
    let by_batch = async |status: RequestStatus, states: &[BatchState]| {
        session.query(BY_BATCH, &[&limit, controller, &status, &states]).await
    };
    let rows = match (filter.status, filter.awaiting_approval) {
        (None | Some(RequestStatus::Pending), true) => awaiting().await?,
        (Some(_), true) => Vec::new(),
        (None, false) if controller.is_none() => session.query(LATEST, &[&limit]).await?,
        (None, false) => session.query(LATEST_OF_CONTROLLER, &[&limit, controller]).await?,
        (Some(RequestStatus::Cancelled), false) if controller.is_none() => session.query(CANCELLED, &[&limit]).await?,
        (Some(RequestStatus::Cancelled), false) => {
            session.query(CANCELLED_OF_CONTROLLER, &[&limit, controller]).await?
        }
        (Some(status @ RequestStatus::Pending), false) => {
            let mut rows = awaiting().await?;
            rows.extend(by_batch(status, &[BatchState::Open, BatchState::Closed]).await?);
            rows
        }
        (Some(RequestStatus::InProgress), false) => session.query(IN_PROGRESS, &[&limit, controller]).await?,
        (Some(status @ RequestStatus::Completed), false) => {
            by_batch(status, &[BatchState::Closed, BatchState::Released, BatchState::Completed]).await?
        }
    };
    Ok(rows.iter().map(|row| row.get("request_key")).collect())
}
