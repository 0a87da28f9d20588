//! The controllers' receivers of callbacks: one that is well, one that misbehaves in every known way until the harm is
//! over, one that is dead until it is revived.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, Uri};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// How a receiver behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mood {
    /// Answers 202.
    Steady,
    /// Misbehaves at random until it is calmed.
    Flaky,
    /// Never answers until it is revived.
    Dead,
}

/// Where the receivers listen.
#[derive(Clone, Debug)]
pub struct Addresses(BTreeMap<Mood, String>);

impl Addresses {
    /// The base of the URLs of one.
    pub fn of(&self, mood: Mood) -> &str {
        &self.0[&mood]
    }
}

/// A callback that came in.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// `X-Lethe-Callback-Id`.
    pub callback_id: String,
    /// The full URL it came to.
    pub url: String,
    /// The body as JSON; `Null` where it is none.
    pub body: Value,
    /// Whether the signature is over exactly the bytes of the body, with the header of the request's version.
    pub is_signed: bool,
    /// When it came.
    pub at: Instant,
    /// When a 2xx was given, where one was given in time.
    pub accepted_at: Option<Instant>,
}

impl Arrival {
    /// A field of the body as text.
    pub fn text(&self, field: &str) -> &str {
        self.body[field].as_str().unwrap_or_default()
    }
}

struct Shared {
    base: String,
    mood: Mood,
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    random: Mutex<StdRng>,
    calm: Arc<AtomicBool>,
    revived: Arc<AtomicBool>,
    completed: mpsc::UnboundedSender<String>,
}

/// All receivers.
pub struct Receivers {
    /// Where they listen.
    pub addresses: Addresses,
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    calm: Arc<AtomicBool>,
    revived: Arc<AtomicBool>,
    servers: Vec<tokio::task::JoinHandle<()>>,
}

impl Receivers {
    /// Listens. The ids of requests that are said to be completed go to `completed` at once.
    pub async fn start(seed: u64, completed: mpsc::UnboundedSender<String>) -> Self {
        let (arrivals, calm, revived) = (Arc::default(), Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (mut addresses, mut servers) = (BTreeMap::new(), Vec::new());
        for (number, mood) in (2..).zip([Mood::Steady, Mood::Flaky, Mood::Dead]) {
            let listener = TcpListener::bind((format!("127.0.0.{number}"), 0)).await.unwrap();
            let base = format!("http://{}", listener.local_addr().unwrap());
            addresses.insert(mood, base.clone());
            let shared = Shared {
                base,
                mood,
                arrivals: Arc::clone(&arrivals),
                random: Mutex::new(StdRng::seed_from_u64(seed ^ 0xCA11)),
                calm: calm.clone(),
                revived: revived.clone(),
                completed: completed.clone(),
            };
            let router = Router::new().fallback(receive).with_state(Arc::new(shared));
            servers.push(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
        }
        Self { addresses: Addresses(addresses), arrivals, calm, revived, servers }
    }

    /// From now on the flaky one is well, and lets go of what it held.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::SeqCst);
    }

    /// From now on the dead one is well.
    pub fn revive(&self) {
        self.revived.store(true, Ordering::SeqCst);
    }

    /// Everything that came in, in order.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals.lock().unwrap().clone()
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
    }
}

enum Reply {
    Status(u16),
    RetryAfter,
    Slow,
    Hang,
    Reset,
    Endless,
}

fn reply(shared: &Shared) -> Reply {
    let calm = shared.calm.load(Ordering::SeqCst);
    match shared.mood {
        Mood::Dead if !shared.revived.load(Ordering::SeqCst) => Reply::Hang,
        Mood::Flaky if !calm => match shared.random.lock().unwrap().random_range(0..100) {
            0..60 => Reply::Status(202),
            60..75 => Reply::Status(500),
            75..79 => Reply::RetryAfter,
            79..82 => Reply::Status(404),
            82..90 => Reply::Reset,
            90..95 => Reply::Slow,
            95..98 => Reply::Hang,
            _ => Reply::Endless,
        },
        _ => Reply::Status(202),
    }
}

async fn receive(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let reply = reply(&shared);
    let number = record(&shared, &uri, &headers, &body);
    let answer = Response::builder();
    match reply {
        Reply::Status(status) => {
            if (200..300).contains(&status) {
                accepted(&shared, number);
            }
            answer.status(status).body(Body::empty()).unwrap()
        }
        Reply::RetryAfter => answer.status(503).header("retry-after", "1").body(Body::empty()).unwrap(),
        Reply::Slow => {
            tokio::time::sleep(Duration::from_millis(400)).await;
            accepted(&shared, number);
            answer.status(202).body(Body::empty()).unwrap()
        }
        Reply::Hang => {
            // Until the client gives up, which drops this, or the harm is over; the answer then comes too late for
            // whoever has gone meanwhile.
            while !over(&shared) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            std::panic::resume_unwind(Box::new("reset"))
        }
        // The server drops a connection whose handler panics; resume_unwind does so without a message.
        Reply::Reset => std::panic::resume_unwind(Box::new("reset")),
        Reply::Endless => {
            accepted(&shared, number);
            let chunks = futures_util::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 4096])));
            answer.status(200).body(Body::from_stream(chunks)).unwrap()
        }
    }
}

fn over(shared: &Shared) -> bool {
    if shared.mood == Mood::Dead { shared.revived.load(Ordering::SeqCst) } else { shared.calm.load(Ordering::SeqCst) }
}

fn accepted(shared: &Shared, number: usize) {
    shared.arrivals.lock().unwrap()[number].accepted_at = Some(Instant::now());
}

fn record(shared: &Shared, uri: &Uri, headers: &HeaderMap, bytes: &Bytes) -> usize {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let body: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let name = if body["api_version"] == "1.0" { "X-OpenGDPR-Signature" } else { "X-OpenDSR-Signature" };
    let is_signed = lethe_testing::signing::verifies(SignatureAlgorithm::RsaPkcs1v15, header(name), bytes);
    if body["request_status"] == "completed" {
        let _ = shared.completed.send(body["subject_request_id"].as_str().unwrap_or_default().to_owned());
    }
    let arrival = Arrival {
        callback_id: header("X-Lethe-Callback-Id").to_owned(),
        url: format!("{}{}", shared.base, uri.path()),
        body,
        is_signed,
        at: Instant::now(),
        accepted_at: None,
    };
    let mut arrivals = shared.arrivals.lock().unwrap();
    arrivals.push(arrival);
    arrivals.len() - 1
}
