//! What bodies look like, for the `OpenAPI` document.

use serde::Serialize;
use utoipa::ToSchema;

/// The error object of OpenDSR.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorAnswer {
    error: ErrorObject,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorObject {
    /// The HTTP status.
    code: u16,
    /// What is wrong and what to do; never contains a value.
    message: String,
    errors: Vec<ErrorDetail>,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// `Validation` or `Request`.
    domain: String,
    /// The rule, for programs.
    reason: String,
    /// The rule, for people.
    message: String,
}

/// A request in the form of 3.0. Unknown fields are ignored.
#[derive(ToSchema)]
#[schema(example = json!({
    "regulation": "gdpr",
    "subject_request_id": "a7551968-d5d6-44b2-9831-815ac9017798",
    "subject_request_type": "erasure",
    "submitted_time": "2026-11-02T15:00:00Z",
    "subject_identities": {"email": {"value": "ada@example.com", "encoding": "raw"}},
    "api_version": "3.0"
}))]
#[expect(dead_code, reason = "describes what the parser reads; the parser itself is stricter than a schema can be")]
pub(crate) struct SubjectRequestV3 {
    #[schema(example = "gdpr")]
    regulation: RegulationName,
    /// Version 4.
    #[schema(format = Uuid)]
    subject_request_id: String,
    subject_request_type: RequestTypeName,
    /// RFC 3339, or an ISO date.
    #[schema(format = DateTime)]
    submitted_time: String,
    /// By type: the value and its encoding (raw, sha256, sha1, md5).
    subject_identities: Option<std::collections::BTreeMap<String, IdentityV3>>,
    #[schema(example = "3.0")]
    api_version: Option<String>,
    /// At most 16, public https.
    #[schema(max_items = 16)]
    status_callback_urls: Option<Vec<String>>,
    #[schema(max_length = 256)]
    group_id: Option<String>,
    /// By domain.
    extensions: Option<std::collections::BTreeMap<String, serde_json::Value>>,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what the parser reads")]
pub(crate) struct IdentityV3 {
    value: String,
    encoding: Option<String>,
}

/// A request in the form of 1.0 (without `regulation`) and 2.0. Unknown fields are ignored.
#[derive(ToSchema)]
#[schema(example = json!({
    "regulation": "gdpr",
    "subject_request_id": "0b2f3a86-5c1e-4d7a-9f43-6e1d2c7b8a90",
    "subject_request_type": "access",
    "submitted_time": "2026-11-02T15:00:00Z",
    "subject_identities": [{"identity_type": "email", "identity_value": "ada@example.com", "identity_format": "raw"}]
}))]
#[expect(dead_code, reason = "describes what the parser reads")]
pub(crate) struct SubjectRequestV2 {
    /// Required from 2.0.
    regulation: Option<RegulationName>,
    /// Version 4.
    #[schema(format = Uuid)]
    subject_request_id: String,
    subject_request_type: RequestTypeName,
    /// RFC 3339, or an ISO date.
    #[schema(format = DateTime)]
    submitted_time: String,
    subject_identities: Option<Vec<IdentityV2>>,
    api_version: Option<String>,
    /// At most 16, public https.
    #[schema(max_items = 16)]
    status_callback_urls: Option<Vec<String>>,
    #[schema(max_length = 256)]
    group_id: Option<String>,
    /// By domain.
    extensions: Option<std::collections::BTreeMap<String, serde_json::Value>>,
}

#[derive(ToSchema)]
#[expect(
    dead_code,
    clippy::struct_field_names,
    reason = "describes what the parser reads, under the names on the wire"
)]
pub(crate) struct IdentityV2 {
    #[schema(example = "email")]
    identity_type: String,
    identity_value: String,
    #[schema(example = "raw")]
    identity_format: Option<String>,
}

#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes what the parser reads")]
pub(crate) enum RegulationName {
    Gdpr,
    Ccpa,
}

#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes what the parser reads")]
pub(crate) enum RequestTypeName {
    Erasure,
    Access,
    Portability,
}
