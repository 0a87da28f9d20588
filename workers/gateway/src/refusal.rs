//! Calls that end before anything was done: the error object of OpenDSR, unsigned.

use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use lethe_db::DbError;
use lethe_domain::disposition::Disposition;
use lethe_domain::opendsr::ApiError;

pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// After how long it is worth asking again while PostgreSQL, a store or a place is not available.
const LATER: Duration = Duration::from_secs(2);

/// A call that ends before anything was done: the error object, unsigned.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    error: ApiError,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    pub(crate) fn new(code: u16, message: &str) -> Self {
        Self { error: ApiError::new(code, message), headers: Vec::new() }
    }

    /// What it says, and with which headers.
    pub(crate) fn into_parts(self) -> (ApiError, Vec<(HeaderName, HeaderValue)>) {
        (self.error, self.headers)
    }

    fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    pub(crate) fn unauthorized(domain: &str) -> Self {
        let challenge = format!("Basic realm=\"{domain}\", charset=\"UTF-8\"");
        Self::new(401, "send the API key and secret of a controller with Basic authentication")
            .with(WWW_AUTHENTICATE, &challenge)
    }

    pub(crate) fn too_many(wait: Duration) -> Self {
        Self::new(429, "too many calls; wait for the time in Retry-After").with(RETRY_AFTER, &whole_seconds(wait))
    }

    pub(crate) fn later(message: &str) -> Self {
        Self::new(503, message).with(RETRY_AFTER, &whole_seconds(LATER))
    }

    /// The whole file has `size` bytes, and the range that was asked for is not within it.
    pub(crate) fn range(size: u64) -> Self {
        let name = axum::http::header::CONTENT_RANGE;
        Self::new(416, "the requested range is outside the file").with(name, &format!("bytes */{size}"))
    }
}

impl From<DbError> for Refusal {
    fn from(error: DbError) -> Self {
        from_database(&error)
    }
}

pub(crate) fn from_database(error: &DbError) -> Refusal {
    tracing::warn!(%error, "a call could not be answered");
    if matches!(error, DbError::NoCalendar) {
        Refusal::later("no scheduler has stored a calendar yet; nothing was done, try again")
    } else if error.disposition() == Disposition::Transient {
        Refusal::later("the database cannot be reached at the moment; nothing was done, try again")
    } else {
        Refusal::new(500, "the call could not be answered; nothing was done; the log tells the operator why")
    }
}

fn whole_seconds(wait: Duration) -> String {
    wait.as_millis().div_ceil(1_000).max(1).to_string()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::new(Body::from(self.error.to_json().to_string()));
        *response.status_mut() = status;
        response.headers_mut().extend(self.headers.into_iter().map(|(name, value)| (Some(name), value)));
        response.headers_mut().insert(CONTENT_TYPE, JSON);
        response
    }
}
