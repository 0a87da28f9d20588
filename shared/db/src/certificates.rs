//! What an erasure certificate says.

use jiff::Timestamp;

use super::pool::{Column, Session};
use super::{DbError, statements};
use lethe_domain::request::{RequestKey, RequestStatus, RequestType};

use super::requests::Target;

statements! {
    FACTS = "
        SELECT r.request_key, r.status, r.request_type, b.runs_at
          FROM lethe.requests r LEFT JOIN lethe.batches b USING (batch_id)
         WHERE r.controller_id = $1 AND r.subject_request_id = $2";
}

/// What a certificate needs to know of a request beside what the trail tells.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The internal key.
    pub request_key: RequestKey,
    /// Where it stands.
    pub status: RequestStatus,
    /// What was asked for.
    pub request_type: RequestType,
    /// When the batch was to run.
    pub runs_at: Option<Timestamp>,
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
        runs_at: row.get("runs_at"),
    }))
}
