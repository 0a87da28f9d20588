//! Errors as a controller sees them (contract 4): they name the field and the rule, never a value.

use serde::Serialize;
use serde_json::{Value, json};

/// One thing that is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// The field, as a path such as `subject_identities[2].identity_value`.
    #[serde(skip)]
    pub field: String,
    /// Always `Validation`.
    pub domain: &'static str,
    /// The rule that was broken, for programs.
    pub reason: &'static str,
    /// The rule that was broken, for people; begins with the field.
    pub message: String,
}

impl FieldError {
    /// `field` broke the rule `reason`; `rule` completes a sentence that begins with the field's name.
    pub fn new(field: impl Into<String>, reason: &'static str, rule: &str) -> Self {
        let field = field.into();
        let message = format!("{field} {rule}");
        Self { field, domain: "Validation", reason, message }
    }
}

/// An answer that is not a success: the HTTP status and the error object of OpenDSR.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// The HTTP status, also over AMQP (header `status`).
    pub code: u16,
    /// One sentence that says what to do.
    pub message: String,
    /// What is wrong with which field; may be empty.
    pub errors: Vec<FieldError>,
}

impl ApiError {
    /// An error without fields.
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errors: Vec::new() }
    }

    /// 400 for the given fields.
    #[must_use]
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let message = errors.first().map_or_else(|| "the request is invalid".to_owned(), |first| first.message.clone());
        Self { code: 400, message, errors }
    }

    /// 403: who publishes is not who the message says.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, message)
    }

    /// 404: there is no such request of this controller.
    #[must_use]
    pub fn unknown_request() -> Self {
        Self::new(404, "this controller has no request with this subject_request_id")
    }

    /// The error object of OpenDSR.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let errors = if self.errors.is_empty() {
            json!([{ "domain": "Request", "reason": reason_of(self.code), "message": self.message }])
        } else {
            json!(self.errors)
        };
        json!({ "error": { "code": self.code, "message": self.message, "errors": errors } })
    }

    /// A short name of the cause, for the header `error-code` and for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.errors.first().map_or_else(|| reason_of(self.code), |first| first.reason)
    }
}

const fn reason_of(code: u16) -> &'static str {
    match code {
        400 => "bad_request",
        401 => "unauthorized",
        403 => "forbidden",
        404 => "not_found",
        405 => "method_not_allowed",
        408 => "too_slow",
        409 => "conflict",
        410 => "gone",
        413 => "too_large",
        415 => "unsupported_media_type",
        416 => "range_not_satisfiable",
        429 => "too_many_calls",
        503 => "unavailable",
        _ => "error",
    }
}
