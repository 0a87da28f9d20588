//! From answers to HTTP responses: the error object, signatures, headers.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, LINK, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use lethe_db::DbError;
use lethe_domain::disposition::Disposition;
use lethe_domain::opendsr::{ApiError, ApiVersion};
use lethe_intake::{Answer, Unanswered};
use lethe_signing::Processor;
use lethe_signing::signature::{self, Signer};
use lethe_signing::signing_keys::SigningError;

use crate::authentication::Caller;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// When it is worth asking again while PostgreSQL, a store or a free place is missing.
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

    fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    pub(crate) fn unauthorized(domain: &str) -> Self {
        let challenge = format!("Basic realm=\"{domain}\", charset=\"UTF-8\"");
        Self::new(401, "send the API key and secret of a controller by Basic authentication")
            .with(WWW_AUTHENTICATE, &challenge)
    }

    pub(crate) fn too_many(wait: Duration) -> Self {
        Self::new(429, "too many calls; wait as long as Retry-After says").with(RETRY_AFTER, &whole_seconds(wait))
    }

    pub(crate) fn later(message: &str) -> Self {
        Self::new(503, message).with(RETRY_AFTER, &whole_seconds(LATER))
    }

    /// The whole file has `size` bytes, and the range that was asked for is not within it.
    pub(crate) fn range(size: u64) -> Self {
        let name = axum::http::header::CONTENT_RANGE;
        Self::new(416, "the file does not have these bytes").with(name, &format!("bytes */{size}"))
    }
}

impl From<DbError> for Refusal {
    fn from(error: DbError) -> Self {
        from_database(&error)
    }
}

fn from_database(error: &DbError) -> Refusal {
    tracing::warn!(%error, "a call could not be answered");
    if matches!(error, DbError::NoCalendar) {
        Refusal::later("no scheduler has stored a calendar yet; nothing was done, try again")
    } else if error.disposition() == Disposition::Transient {
        Refusal::later("the database cannot be reached just now; nothing was done, try again")
    } else {
        Refusal::new(500, "the call could not be answered; nothing was done, the operator finds why in the log")
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

/// What a call of an authenticated caller came to.
pub(crate) type Outcome = Result<Answer, Unanswered>;

/// The signed answer to an authenticated caller. `version` is that of the path: it decides on the names of the headers.
pub(crate) async fn signed(processor: &Processor, caller: &Caller, version: ApiVersion, outcome: Outcome) -> Response {
    let (answer, headers) = match outcome {
        Ok(answer) => (answer, Vec::new()),
        Err(Unanswered::Later(error) | Unanswered::Poison(error)) => {
            let refusal = from_database(&error);
            (Answer::error(&refusal.error, version), refusal.headers)
        }
    };
    // What is too large is answered without a signature (contract 9), however it was found out.
    let signature = match answer.status {
        413 => None,
        _ => Some(sign(&processor.signer, caller, &answer.body).await),
    };
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().extend(headers.into_iter().map(|(name, value)| (Some(name), value)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, JSON);
    match signature {
        Some(Ok(signature)) => {
            insert(headers, version.domain_header(), &processor.domain);
            insert(headers, version.signature_header(), &signature);
        }
        // What was done is done: an unsigned answer tells more than none.
        Some(Err(error)) => tracing::error!(%error, controller = %caller.controller_id, "an answer was not signed"),
        None => {}
    }
    response
}

async fn sign(signer: &Arc<Signer>, caller: &Caller, body: &[u8]) -> Result<String, SigningError> {
    let (signer, algorithm, body) = (signer.clone(), caller.algorithm, body.to_vec());
    signature::off_thread(move || signer.sign(algorithm, &body)).await
}

fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
        headers.insert(name, value);
    }
}

/// Says where a list goes on.
pub(crate) fn link_to_next(response: &mut Response, url: &str) {
    insert(response.headers_mut(), LINK.as_str(), &format!("<{url}>; rel=\"next\""));
}
