//! The controllers' servers: they take callbacks and verify every signature. One of them fails for a while.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpListener;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A callback as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) callback_id: String,
    pub(crate) url: String,
    pub(crate) subject_request_id: String,
    pub(crate) status: String,
    pub(crate) results_count: Option<i64>,
    pub(crate) results_url: Option<String>,
    pub(crate) signed: bool,
}

#[derive(Clone)]
pub(crate) struct Receiver {
    /// Base of the URLs of the server that always works.
    pub(crate) steady: String,
    /// Base of the URLs of the server that answers 503 at first.
    pub(crate) flaky: String,
    state: Arc<Shared>,
}

struct Shared {
    received: Mutex<Vec<Received>>,
    public_key: Vec<u8>,
    refused: AtomicUsize,
}

/// So many callbacks the flaky server refuses before it recovers.
const REFUSALS: usize = 60;

impl Receiver {
    pub(crate) async fn start(certificate: &Path) -> anyhow::Result<Self> {
        let der = CertificateDer::from_pem_file(certificate).context("the signing certificate cannot be read")?;
        let (_, parsed) = X509Certificate::from_der(&der).context("the signing certificate is no certificate")?;
        let public_key = parsed.public_key().subject_public_key.data.to_vec();
        let state = Arc::new(Shared { received: Mutex::default(), public_key, refused: AtomicUsize::new(0) });
        let steady = serve(Router::new().route("/{*path}", post(take)).with_state(state.clone())).await?;
        let flaky = serve(Router::new().route("/{*path}", post(take_or_refuse)).with_state(state.clone())).await?;
        Ok(Self { steady, flaky, state })
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.state.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn refused(&self) -> usize {
        self.state.refused.load(Ordering::Relaxed).min(REFUSALS)
    }
}

async fn serve(router: Router) -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let base = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(base)
}

async fn take_or_refuse(state: State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    if state.refused.fetch_add(1, Ordering::Relaxed) < REFUSALS {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    take(state, headers, body).await
}

async fn take(State(state): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let Ok(parsed) = serde_json::from_slice::<serde_json::Value>(&body) else { return StatusCode::BAD_REQUEST };
    let text = |field: &str| parsed[field].as_str().unwrap_or_default().to_owned();
    let signature = if text("api_version") == "1.0" { "X-OpenGDPR-Signature" } else { "X-OpenDSR-Signature" };
    let signature = STANDARD.decode(header(signature)).unwrap_or_default();
    let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &state.public_key);
    let received = Received {
        callback_id: header("X-Lethe-Callback-Id"),
        url: text("status_callback_url"),
        subject_request_id: text("subject_request_id"),
        status: text("request_status"),
        results_count: parsed["results_count"].as_i64(),
        results_url: parsed["results_url"].as_str().map(str::to_owned),
        signed: key.verify(&body, &signature).is_ok(),
    };
    state.received.lock().unwrap_or_else(PoisonError::into_inner).push(received);
    StatusCode::ACCEPTED
}
