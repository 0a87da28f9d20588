//! The calls of an authenticated controller (contract 9). Each is a few lines around the one intake.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::Response;
use lethe_db::requests::{Overtaking, Target};
use lethe_domain::opendsr::answer::{CancellationReceived, RequestReceived, StatusAnswer};
use lethe_domain::opendsr::{ApiError, ApiVersion, MAX_BODY};
use lethe_intake::{Answer, Unanswered};
use url::form_urlencoded;

use crate::answers::{Given, link_to_next, signed};
use crate::authentication::Caller;
use crate::groups::{AskStatus, Outcome, Submit};
use crate::refusal::Refusal;
use crate::schemas::{ErrorAnswer, SubjectRequestV3};
use crate::state::Gateway;

/// What requests are called in the paths of a version.
pub(crate) const fn requests_path(version: ApiVersion) -> &'static str {
    match version {
        ApiVersion::V1 => "/opengdpr_requests",
        ApiVersion::V2 | ApiVersion::V3 => "/requests",
    }
}

/// Submits a request. 201: it is recorded for good.
#[utoipa::path(post, path = "/v3/requests", tag = "requests", operation_id = "submit", security(("basic" = [])),
    request_body(content((SubjectRequestV3 = "application/json"))),
    responses(
        (status = 201, description = "Recorded", body = RequestReceived),
        (status = 400, description = "A field is invalid; `errors` says which", body = ErrorAnswer),
        (status = 401, description = "No valid credentials", body = ErrorAnswer),
        (status = 408, description = "The body took too long", body = ErrorAnswer),
        (status = 409, description = "The id is already used by a request with different content", body = ErrorAnswer),
        (status = 413, description = "More than 1 MiB, or more than 5,000 identities", body = ErrorAnswer),
        (status = 415, description = "Not JSON", body = ErrorAnswer),
        (status = 429, description = "Too many calls", body = ErrorAnswer),
        (status = 503, description = "Temporarily unavailable; nothing was done", body = ErrorAnswer)))]
pub(crate) async fn submit(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
    caller: Caller,
    request: Request,
) -> Result<Response, Refusal> {
    let body = read_json(&gateway, request).await?;
    let outcome = gateway.submits.take(&caller.controller_id, Submit { body, version }).await;
    Ok(signed(&gateway, &caller, version, outcome, Given::Once).await)
}

/// Where a request stands.
#[utoipa::path(get, path = "/v3/requests/{id}", tag = "requests", operation_id = "status", security(("basic" = [])),
    params(("id" = String, Path, format = Uuid, description = "The `subject_request_id`")),
    responses(
        (status = 200, description = "Where it stands", body = StatusAnswer),
        (status = 400, description = "Not a UUID version 4", body = ErrorAnswer),
        (status = 401, description = "No valid credentials", body = ErrorAnswer),
        (status = 404, description = "This controller has no such request", body = ErrorAnswer),
        (status = 429, description = "Too many calls", body = ErrorAnswer),
        (status = 503, description = "Temporarily unavailable", body = ErrorAnswer)))]
pub(crate) async fn status(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let outcome = match target(&caller, id) {
        Ok((controller_id, id)) => gateway.statuses.take(&controller_id, AskStatus(id)).await,
        Err(refusal) => Ok(Answer::error(&refusal, version)),
    };
    signed(&gateway, &caller, version, outcome, Given::Again).await
}

/// The requests of a group, in the order of receipt. `Link: rel="next"` leads to the next thousand.
#[utoipa::path(get, path = "/v3/requests", tag = "requests", operation_id = "group", security(("basic" = [])),
    params(("group_id" = String, Query, description = "As in the requests", max_length = 256),
           ("cursor" = Option<String>, Query, description = "From the link of an earlier answer")),
    responses(
        (status = 200, description = "At most 1,000 of them", body = [StatusAnswer]),
        (status = 400, description = "No group, or a cursor that is not from an earlier answer", body = ErrorAnswer),
        (status = 401, description = "No valid credentials", body = ErrorAnswer),
        (status = 429, description = "Too many calls", body = ErrorAnswer),
        (status = 503, description = "Temporarily unavailable", body = ErrorAnswer)))]
pub(crate) async fn group(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Response {
    let query = query.unwrap_or_default();
    let parameter =
        |name| form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value);
    let Some(group_id) = parameter("group_id").filter(|value| (1..=256).contains(&value.chars().count())) else {
        let refusal = ApiError::new(400, "group_id is required (1 to 256 characters): requests are listed by group");
        return signed(&gateway, &caller, version, Ok(Answer::error(&refusal, version)), Given::Again).await;
    };
    let cursor = parameter("cursor");
    let intake = gateway.intake.acting_for(&caller.controller_id);
    let outcome: Outcome =
        intake.group(&caller.controller_id, &group_id, cursor.as_deref()).await.map_err(Unanswered::from);
    let next = outcome.as_ref().ok().and_then(|answer| answer.cursor.as_deref());
    let next = next.map(|cursor| next_page(&gateway, version, &group_id, cursor));
    let mut response = signed(&gateway, &caller, version, outcome, Given::Again).await;
    if let Some(url) = next {
        link_to_next(&mut response, &url);
    }
    response
}

fn next_page(gateway: &Gateway, version: ApiVersion, group_id: &str, cursor: &str) -> String {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("group_id", group_id)
        .append_pair("cursor", cursor)
        .finish();
    let base = gateway.processor.public_url.as_str().trim_end_matches('/');
    format!("{base}/{}{}?{query}", version.path(), requests_path(version))
}

/// Cancels a request that is still pending.
#[utoipa::path(delete, path = "/v3/requests/{id}", tag = "requests", operation_id = "cancel", security(("basic" = [])),
    params(("id" = String, Path, format = Uuid, description = "The `subject_request_id`")),
    responses(
        (status = 202, description = "Cancelled, now or before", body = CancellationReceived),
        (status = 400, description = "Not a UUID version 4", body = ErrorAnswer),
        (status = 401, description = "No valid credentials", body = ErrorAnswer),
        (status = 404, description = "This controller has no such request", body = ErrorAnswer),
        (status = 409, description = "It is under way or done", body = ErrorAnswer),
        (status = 429, description = "Too many calls", body = ErrorAnswer),
        (status = 503, description = "Temporarily unavailable; nothing was done", body = ErrorAnswer)))]
pub(crate) async fn cancel(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let outcome = match target(&caller, id) {
        Ok(target) => {
            let intake = gateway.intake.acting_for(&caller.controller_id);
            // Over HTTP a request is answered before it can be cancelled: if it is not known, it does not exist.
            let cancelled = intake.cancel(&[target], Overtaking::Refuse).await;
            cancelled.map_err(Unanswered::from).map(|mut answers| answers.remove(0))
        }
        Err(refusal) => Ok(Answer::error(&refusal, version)),
    };
    signed(&gateway, &caller, version, outcome, Given::Once).await
}

/// What is not text at all is not a UUID either.
pub(crate) fn target(caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<Target, ApiError> {
    let id = id.ok().and_then(|Path(id)| id.parse().ok());
    let id = id.ok_or_else(|| ApiError::new(400, "subject_request_id must be a UUID version 4"))?;
    Ok((caller.controller_id.clone(), id))
}

/// The body, if its type is JSON or not given; within its limits of size and time.
async fn read_json(gateway: &Gateway, request: Request) -> Result<Bytes, Refusal> {
    let (parts, body) = request.into_parts();
    if !is_json(&parts.headers) {
        return Err(Refusal::new(415, "Content-Type must be application/json, without Content-Encoding"));
    }
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > MAX_BODY) {
        return Err(too_large());
    }
    let read = tokio::time::timeout(gateway.body_timeout, read_within(body)).await;
    read.map_err(|_| Refusal::new(408, "the body took too long"))?
}

async fn read_within(body: Body) -> Result<Bytes, Refusal> {
    to_bytes(body, MAX_BODY).await.map_err(|error| {
        let too_long =
            std::error::Error::source(&error).is_some_and(|source| source.to_string().contains("length limit"));
        if too_long { too_large() } else { Refusal::new(400, "the body ended early") }
    })
}

fn too_large() -> Refusal {
    Refusal::new(413, "a request may have at most 1 MiB")
}

fn is_json(headers: &HeaderMap) -> bool {
    let plain = headers.get(CONTENT_ENCODING).is_none_or(|value| value == "identity");
    let Some(value) = headers.get(CONTENT_TYPE) else { return plain };
    let media_type = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let media_type = media_type.to_ascii_lowercase();
    plain
        && (media_type == "application/json"
            || (media_type.starts_with("application/") && media_type.ends_with("+json")))
}
