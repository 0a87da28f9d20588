//! What the raw programs share: a request read as far as it must be, and statements on the raw tables.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe_domain::opendsr::{IdentityFormat, IdentityType};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature::Signer;
use lethe_signing::signing_keys::SigningKeys;
use serde::Deserialize;
use uuid::Uuid;

use crate::bench::Bench;
use crate::people::IDENTITIES;

/// A request as the raw intake sees it.
pub(crate) struct RawRequest {
    pub(crate) id: Uuid,
    pub(crate) controller: String,
    pub(crate) body: Vec<u8>,
    /// What its identities are found by, in the order of [`IDENTITIES`].
    pub(crate) keys: Vec<Uuid>,
    pub(crate) reply_to: Option<String>,
}

#[derive(Deserialize)]
struct Body {
    subject_request_id: Uuid,
    subject_identities: std::collections::HashMap<String, Identity>,
}

#[derive(Deserialize)]
struct Identity {
    value: String,
}

impl RawRequest {
    /// Reads the id and the identities, and nothing else.
    pub(crate) fn read(body: Vec<u8>, controller: &str, reply_to: Option<String>) -> Self {
        let read: Body = serde_json::from_slice(&body).unwrap();
        let keys = IDENTITIES
            .iter()
            .filter_map(|(kind, _, _)| {
                let value = read.subject_identities.get(*kind)?.value.clone();
                let identity = lethe_domain::opendsr::Identity {
                    identity_type: IdentityType::named(kind).unwrap(),
                    format: IdentityFormat::Raw,
                    value,
                };
                Some(identity.key().unwrap().1)
            })
            .collect();
        Self { id: read.subject_request_id, controller: controller.to_owned(), body, keys, reply_to }
    }
}

/// The key of this run, read as workers read it.
pub(crate) fn signer(bench: &Bench) -> std::sync::Arc<Signer> {
    let files = &bench.world.files;
    std::sync::Arc::new(Signer::new(SigningKeys::load(&files.key, &files.certificate).unwrap()))
}

/// Signs many bodies at once, on both cores.
pub(crate) async fn sign_all(signer: &std::sync::Arc<Signer>, bodies: Vec<Vec<u8>>) -> Vec<(Vec<u8>, String)> {
    let share = bodies.len().div_ceil(std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    let mut bodies = bodies.into_iter().peekable();
    let mut shares = Vec::new();
    while bodies.peek().is_some() {
        let (signer, mine) = (signer.clone(), bodies.by_ref().take(share).collect::<Vec<_>>());
        shares.push(tokio::task::spawn_blocking(move || {
            let sign = |body: Vec<u8>| {
                let signature = signer.sign(SignatureAlgorithm::RsaPkcs1v15, &body).unwrap();
                (body, signature)
            };
            mine.into_iter().map(sign).collect::<Vec<_>>()
        }));
    }
    let mut all = Vec::new();
    for share in shares {
        all.extend(share.await.unwrap());
    }
    all
}

/// A body as long as Lethe's answer: the request once more in base64, and some fields.
pub(crate) fn answer(request: &RawRequest) -> Vec<u8> {
    format!(
        r#"{{"controller_id":"people","expected_completion_time":"2026-12-09T12:30:00Z","received_time":"2026-12-09T12:30:00Z","encoded_request":"{}","subject_request_id":"{}"}}"#,
        STANDARD.encode(&request.body),
        request.id
    )
    .into_bytes()
}
