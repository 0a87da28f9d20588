//! What an erasure certificate says.

use jiff::Timestamp;

use super::pool::{Column, Session};
use super::{DbError, statements};
use lethe_domain::opendsr::{ApiVersion, Regulation};
use lethe_domain::request::{BatchId, Lane, RequestKey, RequestStatus, RequestType};

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
    /// The law under which it was made.
    pub regulation: Option<Regulation>,
    /// The version in which it was asked.
    pub api_version: ApiVersion,
    /// Keyed digest of the parsed request.
    pub content_digest: Vec<u8>,
    /// When the data subject asked the controller.
    pub submitted_time: Timestamp,
    /// When the controller asked us.
    pub received_at: Timestamp,
    /// The kind of batch.
    pub lane: Lane,
    /// The batch.
    pub batch_id: Option<BatchId>,
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
    Ok(Some(Facts {
        request_key: row.get("request_key"),
        status: row.column("status")?,
        request_type: row.column("request_type")?,
        regulation: row.column("regulation")?,
        api_version: row.column("api_version")?,
        content_digest: row.get("content_digest"),
        submitted_time: row.get("submitted_time"),
        received_at: row.get("received_at"),
        lane: row.column("lane")?,
        batch_id: row.get("batch_id"),
        runs_at: row.get("runs_at"),
        in_progress_at: row.get("in_progress_at"),
        completed_at: row.get("completed_at"),
    }))
}
