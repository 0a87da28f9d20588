//! What a certificate of an erasure tells.

use jiff::Timestamp;

use super::pool::Session;
use super::{DbError, statements};
use lethe_domain::request::{RequestKey, RequestStatus, RequestType};

use super::requests::Target;

statements! {
    FACTS = "
        SELECT r.request_key, r.status, r.request_type, r.regulation, r.api_version, r.content_digest, r.submitted_time,
               r.received_at, r.lane, r.batch_id, b.runs_at, r.in_progress_at, r.completed_at
          FROM lethe.requests r LEFT JOIN lethe.batches b USING (batch_id)
         WHERE r.controller_id = $1 AND r.subject_request_id = $2";
}

/// A request as a certificate tells of it.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The internal key.
    pub request_key: RequestKey,
    /// Where it stands.
    pub status: RequestStatus,
    /// What was asked for.
    pub request_type: RequestType,
    /// `gdpr` or `ccpa`.
    pub regulation: Option<String>,
    /// The version in which it was asked.
    pub api_version: String,
    /// Keyed digest of the parsed request.
    pub content_digest: Vec<u8>,
    /// When the data subject asked the controller.
    pub submitted_time: Timestamp,
    /// When the controller asked us.
    pub received_at: Timestamp,
    /// The kind of batch.
    pub lane: String,
    /// The batch.
    pub batch_id: Option<i64>,
    /// When the batch was to run.
    pub runs_at: Option<Timestamp>,
    /// When the execution began.
    pub in_progress_at: Option<Timestamp>,
    /// When it was complete.
    pub completed_at: Option<Timestamp>,
}

/// The facts of a request.
///
/// # Errors
/// [`DbError`].
pub async fn facts(session: &Session, target: &Target) -> Result<Option<Facts>, DbError> {
    let Some(row) = session.query_opt(FACTS, &[&target.0, &target.1]).await? else { return Ok(None) };
    let unexpected = || DbError::Unexpected { place: "requests" };
    Ok(Some(Facts {
        request_key: row.get(0),
        status: row.get::<_, &str>(1).parse().map_err(|_| unexpected())?,
        request_type: row.get::<_, &str>(2).parse().map_err(|_| unexpected())?,
        regulation: row.get(3),
        api_version: row.get(4),
        content_digest: row.get(5),
        submitted_time: row.get(6),
        received_at: row.get(7),
        lane: row.get(8),
        batch_id: row.get(9),
        runs_at: row.get(10),
        in_progress_at: row.get(11),
        completed_at: row.get(12),
    }))
}
