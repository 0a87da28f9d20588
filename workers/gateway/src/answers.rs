//! From answers to HTTP responses: signatures, headers.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, LINK};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use lethe_domain::opendsr::ApiVersion;
use lethe_intake::{Answer, Unanswered};

use crate::authentication::Caller;
use crate::groups::Outcome;
use crate::refusal::{JSON, from_database};
use crate::state::Gateway;

/// Whether the same answer may be given again, to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// It is of this call only.
    Once,
    /// Whoever asks again may get it again.
    Again,
}

/// The signed answer to an authenticated caller. `version` is that of the path: it decides on the names of the headers.
pub(crate) async fn signed(
    gateway: &Gateway,
    caller: &Caller,
    version: ApiVersion,
    outcome: Outcome,
    given: Given,
) -> Response {
    let (answer, headers) = match outcome {
        Ok(answer) => (answer, Vec::new()),
        Err(Unanswered::Later(error) | Unanswered::Poison(error)) => {
            let (error, headers) = from_database(&error).into_parts();
            (Answer::error(&error, version), headers)
        }
    };
    // What is too large is answered without a signature (contract 9), however it was found out.
    let signature = match answer.status {
        413 => None,
        _ if given == Given::Again => Some(gateway.signatures.again(caller.algorithm, &answer.body).await),
        _ => Some(gateway.signatures.once(caller.algorithm, &answer.body).await),
    };
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().extend(headers.into_iter().map(|(name, value)| (Some(name), value)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, JSON);
    match signature {
        Some(Ok(signature)) => {
            insert(headers, version.domain_header(), &gateway.processor.domain);
            insert(headers, version.signature_header(), &signature);
        }
        // What was done is done: an unsigned answer tells more than none.
        Some(Err(error)) => tracing::error!(%error, controller = %caller.controller_id, "an answer cannot be signed"),
        None => {}
    }
    response
}

fn insert(headers: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
        headers.insert(name, value);
    }
}

/// Says where a list continues.
pub(crate) fn link_to_next(response: &mut Response, url: &str) {
    insert(response.headers_mut(), LINK.as_str(), &format!("<{url}>; rel=\"next\""));
}
