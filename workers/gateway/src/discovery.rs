//! What the processor supports, and the certificates that verify its signatures. No credentials needed.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use lethe_domain::opendsr::{ApiVersion, IdentityFormat, IdentityType};
use lethe_domain::request::RequestType;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use serde::Serialize;
use utoipa::ToSchema;

use crate::refusal::Refusal;
use crate::state::Gateway;

/// Answer to a discovery.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Discovery {
    #[schema(value_type = String, example = "3.0")]
    api_version: ApiVersion,
    supported_identities: Vec<SupportedIdentity>,
    #[schema(value_type = Vec<String>)]
    supported_subject_request_types: Vec<RequestType>,
    /// The address of the chain that verifies signatures.
    #[schema(format = Uri)]
    processor_certificate: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SupportedIdentity {
    identity_type: &'static str,
    identity_format: &'static str,
}

/// What is supported.
#[utoipa::path(get, path = "/v3/discovery", tag = "discovery", operation_id = "discovery",
    responses((status = 200, description = "What is supported", body = Discovery)))]
pub(crate) async fn discovery(
    State(gateway): State<Arc<Gateway>>,
    Extension(version): Extension<ApiVersion>,
) -> Response {
    let standard = IdentityType::ALL.iter().filter(|one| one.is_standard());
    let supported_identities = standard.flat_map(|identity_type| {
        IdentityFormat::ALL
            .iter()
            .map(|format| SupportedIdentity { identity_type: identity_type.as_str(), identity_format: format.as_str() })
    });
    let base = gateway.processor.public_url.as_str().trim_end_matches('/');
    let discovery = Discovery {
        api_version: version,
        supported_identities: supported_identities.collect(),
        supported_subject_request_types: RequestType::ALL.to_vec(),
        processor_certificate: format!("{base}/opendsr_cert.pem"),
    };
    // Plain fields only: there is nothing in it that cannot be serialised.
    let body = serde_json::to_vec(&discovery).unwrap_or_default();
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// The chain that verifies what is signed now with RSA.
#[utoipa::path(get, path = "/opendsr_cert.pem", tag = "discovery", operation_id = "certificate",
    responses((status = 200, description = "X.509 chain, PEM", body = String, content_type = "application/x-pem-file")))]
pub(crate) async fn certificate(State(gateway): State<Arc<Gateway>>) -> Result<Response, Refusal> {
    chain(&gateway, SignatureAlgorithm::RsaPkcs1v15)
}

/// The same for ECDSA.
pub(crate) async fn ec_certificate(State(gateway): State<Arc<Gateway>>) -> Result<Response, Refusal> {
    chain(&gateway, SignatureAlgorithm::EcdsaP256)
}

fn chain(gateway: &Gateway, algorithm: SignatureAlgorithm) -> Result<Response, Refusal> {
    let certificate = gateway.processor.signer.certificate(algorithm);
    let certificate = certificate.ok_or_else(|| Refusal::new(404, "this processor has no such key"))?;
    Ok(([(CONTENT_TYPE, "application/x-pem-file")], certificate.chain.clone()).into_response())
}
