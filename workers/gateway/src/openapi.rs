//! The `OpenAPI` document, and the page that renders it.

use axum::Router;
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::opendsr::answer::{CancellationReceived, RequestReceived, StatusAnswer};
use utoipa::openapi::path::{HttpMethod, Operation, PathItem};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{OpenApi as Document, Ref, RefOr};
use utoipa::{Modify, OpenApi};
use utoipa_swagger_ui::SwaggerUi;

use crate::calls::{self, requests_path};
use crate::discovery::{self, Discovery};
use crate::downloads;
use crate::schemas::{ErrorAnswer, SubjectRequestV2};

#[derive(OpenApi)]
#[openapi(
    info(title = "Lethe", description = "OpenDSR for controllers: submit requests, follow them, cancel them, download results."),
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
