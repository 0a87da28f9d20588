//! The `OpenAPI` document, and the page that renders it.

use axum::Router;
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::opendsr::answer::{CancellationReceived, RequestReceived, StatusAnswer};
use serde::Serialize;
use utoipa::openapi::path::{HttpMethod, Operation, PathItem};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{OpenApi as Document, Ref, RefOr};
use utoipa::{Modify, OpenApi, ToSchema};
use utoipa_swagger_ui::SwaggerUi;

use crate::calls::{self, requests_path};
use crate::discovery::{self, Discovery};
use crate::downloads;

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

#[derive(OpenApi)]
#[openapi(
    info(title = "Lethe", description = "OpenDSR for controllers: hand requests in, follow them, cancel them, download results."),
    paths(calls::submit, calls::group, calls::status, calls::cancel, crate::certificate::certificate, discovery::discovery, discovery::certificate, downloads::download),
    components(schemas(SubjectRequestV2, RequestReceived, StatusAnswer, CancellationReceived, Discovery, ErrorAnswer)),
    modifiers(&Complete)
)]
struct Described;

/// Adds what the attributes do not say: the credentials, and the paths of the older versions.
struct Complete;

impl Modify for Complete {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("basic", SecurityScheme::Http(Http::new(HttpAuthScheme::Basic)));
        let status = document.paths.paths.get("/v3/requests/{id}").and_then(|item| item.get.clone());
        if let Some(operation) = status {
            let operation = renamed(operation, "status_by_its_other_path");
            document.paths.add_path_operation("/v3/status/{id}", vec![HttpMethod::Get], operation);
        }
        let newest: Vec<(String, PathItem)> = document.paths.paths.clone().into_iter().collect();
        for version in [ApiVersion::V1, ApiVersion::V2] {
            for (path, item) in &newest {
                let Some(rest) = path.strip_prefix("/v3") else { continue };
                let rest = rest.replacen("/requests", requests_path(version), 1);
                let item = of_version(item.clone(), version);
                document.paths.paths.insert(format!("/{}{rest}", version.path()), item);
            }
        }
    }
}

fn renamed(mut operation: Operation, id: &str) -> Operation {
    operation.operation_id = Some(id.to_owned());
    operation
}

fn of_version(mut item: PathItem, version: ApiVersion) -> PathItem {
    for operation in [&mut item.get, &mut item.post, &mut item.delete].into_iter().flatten() {
        let id = operation.operation_id.take().unwrap_or_default();
        operation.operation_id = Some(format!("{id}_{}", version.path()));
        if let Some(RefOr::T(body)) = &mut operation.request_body {
            for content in body.content.values_mut() {
                if let RefOr::T(content) = content {
                    content.schema = Some(RefOr::Ref(Ref::from_schema_name("SubjectRequestV2")));
                }
            }
        }
    }
    item
}

/// The document.
pub(crate) fn document() -> Document {
    Described::openapi()
}

/// `/openapi.json`, and `/docs` with assets of its own.
pub(crate) fn pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::from(SwaggerUi::new("/docs").url("/openapi.json", document()))
}
