//! The bodies of answers and callbacks (contract 6 and 9). Times always end in `Z`; null fields are never left out,
//! since clients check for their presence.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::request::ApiVersion;
use crate::request::{ControllerId, RequestStatus, SubjectRequestId};

/// Answer to a request: 201.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RequestReceived {
    /// Whose request it is.
    #[schema(value_type = String)]
    pub controller_id: ControllerId,
    /// When it will be done at the latest.
    #[schema(value_type = String, format = DateTime)]
    pub expected_completion_time: Timestamp,
    /// When it was first received.
    #[schema(value_type = String, format = DateTime)]
    pub received_time: Timestamp,
    /// The request's body, base64.
    pub encoded_request: String,
    /// Lower-case.
    #[schema(value_type = String, format = Uuid)]
    pub subject_request_id: SubjectRequestId,
}

impl RequestReceived {
    /// The base64 form of a body.
    #[must_use]
    pub fn encode(body: &[u8]) -> String {
        STANDARD.encode(body)
    }
}

/// Answer to a cancellation: 202.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CancellationReceived {
    /// Whose request it is.
    #[schema(value_type = String)]
    pub controller_id: ControllerId,
    /// When the cancellation was first received.
    #[schema(value_type = String, format = DateTime)]
    pub received_time: Timestamp,
    /// Lower-case.
    #[schema(value_type = String, format = Uuid)]
    pub subject_request_id: SubjectRequestId,
    /// Always null: nothing will be done.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expected_completion_time: Option<Timestamp>,
    /// The version of the request; null where the request has not arrived yet.
    #[schema(value_type = Option<String>)]
    pub api_version: Option<ApiVersion>,
}

/// Answer to a status query: 200.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StatusAnswer {
    /// Whose request it is.
    #[schema(value_type = String)]
    pub controller_id: ControllerId,
    /// When it will be done at the latest.
    #[schema(value_type = String, format = DateTime)]
    pub expected_completion_time: Timestamp,
    /// Lower-case.
    #[schema(value_type = String, format = Uuid)]
    pub subject_request_id: SubjectRequestId,
    /// As in the request.
    pub group_id: Option<String>,
    /// Where it stands.
    #[schema(value_type = String)]
    pub request_status: RequestStatus,
    /// As in the request.
    #[schema(value_type = String)]
    pub api_version: ApiVersion,
    /// The download, for a completed access or portability request.
    pub results_url: Option<String>,
    /// The number of lines of the download.
    pub results_count: Option<i64>,
    /// Always null.
    #[schema(value_type = Option<String>)]
    pub extensions: Option<()>,
}

/// The body of a callback (contract 6).
#[derive(Clone, Debug, Serialize)]
pub struct CallbackBody<'a> {
    /// Whose request it is.
    pub controller_id: &'a ControllerId,
    /// When it will be done at the latest.
    pub expected_completion_time: Timestamp,
    /// The URL that this is sent to.
    pub status_callback_url: &'a str,
    /// Lower-case.
    pub subject_request_id: SubjectRequestId,
    /// As in the request.
    pub group_id: Option<&'a str>,
    /// The status that the request has reached.
    pub request_status: RequestStatus,
    /// As in the request.
    pub api_version: ApiVersion,
    /// The download, for a completed access or portability request.
    pub results_url: Option<String>,
    /// The number of lines of the download.
    pub results_count: Option<i64>,
    /// Always null.
    pub extensions: Option<()>,
}

impl CallbackBody<'_> {
    /// The exact bytes that are signed and sent: compact JSON, fields in the order of the contract, the same on every
    /// attempt.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Plain fields only: there is nothing in it that cannot be written.
        serde_json::to_vec(self).unwrap_or_default()
    }
}
