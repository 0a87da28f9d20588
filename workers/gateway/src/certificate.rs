//! The signed certificate of a completed erasure.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use lethe_audit::certificate::{Document, IssueError, NoCertificate, issue};
use lethe_domain::opendsr::{ApiError, ApiVersion};
use lethe_intake::{Answer, Unanswered};

use crate::answers::{Given, signed};
use crate::authentication::Caller;
use crate::calls::target;
use crate::refusal::Refusal;
use crate::schemas::ErrorAnswer;
use crate::state::Gateway;

/// The signed certificate of a completed erasure: a file that `lethe certificate verify` checks offline.
#[utoipa::path(get, path = "/v3/requests/{id}/certificate", tag = "requests", operation_id = "erasure_certificate",
    security(("basic" = [])),
    params(("id" = String, Path, format = Uuid, description = "The `subject_request_id`")),
    responses(
        (status = 200, description = "The certificate", body = Document),
        (status = 400, description = "Not a UUID version 4", body = ErrorAnswer),
        (status = 401, description = "No valid credentials", body = ErrorAnswer),
        (status = 404, description = "This controller has no such request, or it is not an erasure", body = ErrorAnswer),
        (status = 409, description = "It is not completed, or was completed seconds ago", body = ErrorAnswer),
        (status = 429, description = "Too many calls", body = ErrorAnswer),
        (status = 503, description = "Temporarily unavailable", body = ErrorAnswer)))]
pub(crate) async fn certificate(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    let outcome = match target(&caller, id) {
        Ok(target) => {
            let db = gateway.db.acting_for(&caller.controller_id);
            match issue(&db, &gateway.signatory, &target).await {
                Ok(Ok(document)) => Ok(Answer::written(200, version, document.into_bytes())),
                Ok(Err(reason)) => Ok(Answer::error(&why_none(reason), version)),
                Err(IssueError::Db(error)) => Err(Unanswered::from(error)),
                Err(IssueError::Signing(error)) => {
                    tracing::error!(%error, "a certificate cannot be signed");
                    return Err(Refusal::new(500, "the certificate could not be signed"));
                }
            }
        }
        Err(refusal) => Ok(Answer::error(&refusal, version)),
    };
    Ok(signed(&gateway, &caller, version, outcome, Given::Once).await)
}

fn why_none(reason: NoCertificate) -> ApiError {
    let code = match reason {
        NoCertificate::Unknown => return ApiError::unknown_request(),
        NoCertificate::NoErasure => 404,
        NoCertificate::NotCompleted(_) | NoCertificate::NotSealed => 409,
    };
    ApiError::new(code, reason.to_string())
}
