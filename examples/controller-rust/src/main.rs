//! A controller: makes one request of Lethe, receives its callbacks, and downloads the result.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use clap::Parser;
use jiff::Timestamp;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use uuid::Uuid;

/// The receiver kit: copy its function `verify` into your own code.
#[path = "../../../docs/guide/receiver-kit/verify.rs"]
#[expect(dead_code, clippy::print_stdout, unreachable_pub, reason = "elsewhere it is a program")]
mod verify;

/// A body has a few kilobytes at most.
const LONGEST_BODY: usize = 64 * 1024;

/// Makes one request of Lethe, receives its callbacks, and downloads the result
#[derive(Debug, Parser)]
#[command(name = "controller")]
struct Options {
    /// Where the gateway serves, as `LETHE_PUBLIC_URL`
    #[arg(long, value_name = "URL")]
    gateway: String,
    /// The processor to trust, as `LETHE_PROCESSOR_DOMAIN`
    #[arg(long)]
    domain: String,
    /// A copy of <https://DOMAIN/opendsr_cert.pem>
    #[arg(long)]
    certificate: PathBuf,
    /// Whom the request is about
    #[arg(long)]
    email: String,
    /// What is asked for
    #[arg(long = "type", default_value = "access", value_parser = ["access", "portability", "erasure"])]
    kind: String,
    /// Withdraw the request again
    #[arg(long)]
    cancel: bool,
    /// Where callbacks are received
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    listen: SocketAddr,
    /// How Lethe reaches that, if not by http at the same address
    #[arg(long, value_name = "URL")]
    callback_url: Option<String>,
    /// How long to wait for each callback
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// `lethe controller add` prints it
    #[arg(long, env = "LETHE_API_KEY", hide_env_values = true)]
    api_key: String,
    /// `lethe controller add` prints it
    #[arg(long, env = "LETHE_API_SECRET", hide_env_values = true)]
    api_secret: String,
}

/// What the server that Lethe calls works with.
struct Receiver {
    domain: String,
    certificate: Vec<u8>,
    request_id: String,
    /// At least once: what came before is answered again, and not worked on again. A program that goes on for longer keeps
    /// the ids where they outlive it.
    seen: Mutex<HashSet<String>>,
    callbacks: mpsc::UnboundedSender<Value>,
}

async fn receive(State(receiver): State<Arc<Receiver>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let text = |value: &axum::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let headers: BTreeMap<String, String> =
        headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
    // The signature is over these bytes: parse them only afterwards.
    let verified = verify::verify(&receiver.certificate, &receiver.domain, &headers, &body, Timestamp::now(), None);
    if let Err(refusal) = verified {
        eprintln!("refused a callback: {refusal}");
        return StatusCode::UNAUTHORIZED;
    }
    let Ok(callback) = serde_json::from_slice::<Value>(&body) else { return StatusCode::BAD_REQUEST };
    // The processor signs for all its controllers with one key.
    if callback["subject_request_id"] != receiver.request_id.as_str() {
        return StatusCode::NOT_FOUND;
    }
    let id = headers.get("x-lethe-callback-id").cloned().unwrap_or_default();
    if receiver.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(id) {
        let _ = receiver.callbacks.send(callback);
    }
    StatusCode::ACCEPTED
}

/// Calls Lethe; the body of its answer, or what it says against the call.
async fn call(request: RequestBuilder) -> anyhow::Result<Bytes> {
    let answer = request.send().await.map_err(reqwest::Error::without_url).context("Lethe cannot be reached")?;
    let status = answer.status();
    let body = answer.bytes().await.map_err(reqwest::Error::without_url)?;
    if !status.is_success() {
        bail!("the call was answered {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(body)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let request_id = Uuid::new_v4().to_string();
    let (callbacks, mut verified) = mpsc::unbounded_channel();
    let receiver = Receiver {
        domain: options.domain.clone(),
        certificate: std::fs::read(&options.certificate)
            .with_context(|| format!("{} cannot be read", options.certificate.display()))?,
        request_id: request_id.clone(),
        seen: Mutex::default(),
        callbacks,
    };
    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    let routes = Router::new()
        .route("/callbacks", post(receive))
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .with_state(Arc::new(receiver));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    eprintln!("listening on {address}");

    let client = reqwest::Client::builder().timeout(Duration::from_mins(1)).build()?;
    let requests = format!("{}/v3/requests", options.gateway.trim_end_matches('/'));
    let to_lethe =
        |method, url: &str| client.request(method, url).basic_auth(&options.api_key, Some(&options.api_secret));
    let body = json!({
        "api_version": "3.0",
        "regulation": "gdpr",
        "subject_request_id": request_id,
        "subject_request_type": options.kind,
        "submitted_time": Timestamp::now().to_string(),
        "subject_identities": {"email": {"value": options.email, "encoding": "raw"}},
        "status_callback_urls": [options.callback_url.clone().unwrap_or_else(|| format!("http://{address}/callbacks"))],
    });
    let request = to_lethe(Method::POST, &requests).header("Content-Type", "application/json").body(body.to_string());
    call(request).await?;
    eprintln!("requested {} as {request_id}", options.kind);
    if options.cancel {
        call(to_lethe(Method::DELETE, &format!("{requests}/{request_id}"))).await?;
    }
    let last = loop {
        let wait = Duration::from_secs(options.timeout);
        let callback = tokio::time::timeout(wait, verified.recv()).await.with_context(|| {
            format!("no callback for {} s; the request goes on, ask GET {requests}/{request_id}", options.timeout)
        })?;
        let callback = callback.context("the receiver has ended")?;
        let status = callback["request_status"].as_str().unwrap_or_default();
        eprintln!("{status}, expected by {}", callback["expected_completion_time"].as_str().unwrap_or_default());
        if matches!(status, "completed" | "cancelled") {
            break callback;
        }
    };
    // Nothing matched, or it was not about data: then there is no link.
    if let Some(link) = last["results_url"].as_str() {
        // Whoever has the link can read the file: it is neither shown nor logged.
        let result = call(client.get(link)).await?;
        let file = format!("{request_id}.result");
        std::fs::write(&file, &result)?;
        eprintln!("downloaded {} lines, {} bytes, into {file}", last["results_count"], result.len());
    }
    Ok(())
}
