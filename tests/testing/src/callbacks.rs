//! A controller's receiver of callbacks: a real HTTP server that records everything and can be told to misbehave.

use std::collections::BTreeSet;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::signing;

/// How a POST is answered.
#[derive(Clone, Debug)]
pub enum Reply {
    /// 202, at once.
    Accept,
    /// This status.
    Status(u16),
    /// 302 to this place.
    Redirect(String),
    /// 503 and `Retry-After` in seconds.
    RetryAfter(u32),
    /// 202 after a while.
    Slow(Duration),
    /// Never.
    Hang,
    /// The connection is cut without an answer.
    Reset,
}

/// A POST that came in.
#[derive(Clone, Debug)]
pub struct Received {
    /// Path of the URL.
    pub path: String,
    /// `POST`, unless something is wrong.
    pub method: String,
    /// All headers.
    pub headers: HeaderMap,
    /// The exact bytes.
    pub body: Bytes,
    /// When it came in.
    pub at: Instant,
    /// Whether it was answered as delivered.
    pub accepted: bool,
}

impl Received {
    /// A header as text; empty where it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// `request_status`.
    pub fn status(&self) -> String {
        self.json()["request_status"].as_str().unwrap().to_owned()
    }

    /// Whether the signature in `header` is over exactly this body.
    pub fn is_signed_as(&self, header: &str, algorithm: SignatureAlgorithm) -> bool {
        signing::verifies(algorithm, self.header(header), &self.body)
    }

    /// Whether OpenDSR's own signature is right.
    pub fn is_signed(&self) -> bool {
        self.is_signed_as("X-OpenDSR-Signature", SignatureAlgorithm::RsaPkcs1v15)
    }
}

#[derive(Default)]
struct Shared {
    received: Mutex<Vec<Received>>,
    /// Replies by path; the last one stays.
    script: Mutex<HashMap<String, VecDeque<Reply>>>,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
}

/// The server.
pub struct Receiver {
    base: String,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

impl Receiver {
    /// Listens on a free port of 127.0.0.1.
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1").await
    }

    /// Listens on a free port of a loopback address, so that a test can have many endpoints.
    pub async fn start_on(address: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared::default());
        let router = Router::new().fallback(receive).with_state(shared.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { base, shared, server }
    }

    /// A URL of this server; `path` begins with a slash.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// From now on, POSTs to `path` are answered so, one after the other; the last reply stays.
    pub fn script(&self, path: &str, replies: impl IntoIterator<Item = Reply>) {
        self.shared.script.lock().unwrap().insert(path.to_owned(), replies.into_iter().collect());
    }

    /// Everything that came in, in order.
    pub fn all(&self) -> Vec<Received> {
        self.shared.received.lock().unwrap().clone()
    }

    /// What came in at `path`, in order.
    pub fn at(&self, path: &str) -> Vec<Received> {
        self.all().into_iter().filter(|one| one.path == path).collect()
    }

    /// The statuses that were taken at `path`, in order. A callback that comes again (it is scheduled at least once, and
    /// a clock that jumps ends its lease) counts where it came first.
    pub fn statuses(&self, path: &str) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let taken = self.at(path).into_iter().filter(|one| one.accepted);
        taken.filter(|one| seen.insert(one.header("x-lethe-callback-id").to_owned())).map(|one| one.status()).collect()
    }

    /// The most POSTs that were under way at the same time.
    pub fn most_in_flight(&self) -> usize {
        self.shared.most_in_flight.load(Ordering::SeqCst)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct InFlight(Arc<Shared>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let now = shared.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
    shared.most_in_flight.fetch_max(now, Ordering::SeqCst);
    let _in_flight = InFlight(shared.clone());
    let path = uri.path().to_owned();
    let reply = {
        let mut script = shared.script.lock().unwrap();
        match script.get_mut(&path) {
            Some(replies) if replies.len() > 1 => replies.pop_front().unwrap(),
            Some(replies) => replies.front().cloned().unwrap_or(Reply::Accept),
            None => Reply::Accept,
        }
    };
    let accepted = matches!(reply, Reply::Accept | Reply::Slow(_) | Reply::Status(200..300));
    let received = Received { path, method: method.to_string(), headers, body, at: Instant::now(), accepted };
    shared.received.lock().unwrap().push(received);
    let answer = Response::builder();
    let answer = match reply {
        Reply::Accept => answer.status(StatusCode::ACCEPTED),
        Reply::Status(status) => answer.status(status),
        Reply::Redirect(location) => answer.status(StatusCode::FOUND).header("location", location),
        Reply::RetryAfter(seconds) => answer.status(StatusCode::SERVICE_UNAVAILABLE).header("retry-after", seconds),
        Reply::Slow(wait) => {
            tokio::time::sleep(wait).await;
            answer.status(StatusCode::ACCEPTED)
        }
        Reply::Hang => std::future::pending().await,
        // The server drops a connection whose handler panics; resume_unwind does so without a message.
        Reply::Reset => std::panic::resume_unwind(Box::new("reset")),
    };
    answer.body(Body::empty()).unwrap()
}
