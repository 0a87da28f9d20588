//! The one HTTP client of a courier: guarded addresses, no redirects, no proxies, bodies that are not read.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper_util::client::legacy::connect::HttpInfo;
use jiff::Timestamp;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::redirect::Policy;
use tokio::time::Instant;

use lethe_domain::backoff::parse_retry_after;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::opendsr::callback_url::AddressPolicy;
use lethe_process::settings::ConfigError;

/// A delivery that takes longer has failed (contract 6).
pub const DELIVERY_TIMEOUT: Duration = Duration::from_secs(30);
/// An answer's body is read up to here, so that the connection can be kept; a longer one is cut off.
const BODY_LIMIT: usize = 16 * 1024;
/// How long the rest of a body is waited for, likewise.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may be idle before it is closed.
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);
/// Some receivers send hundreds; the library reads a hundred unless it is told otherwise.
const MAX_HEADERS: usize = 2_048;
/// Characters of a reason at most.
const REASON_LIMIT: usize = 200;

/// How names are looked up.
pub type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, std::io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// The system's resolver.
#[must_use]
pub fn system_lookup() -> Lookup {
    Arc::new(|name| async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }.boxed())
}

/// A name resolves to an address that callbacks must not reach.
#[derive(Debug, thiserror::Error)]
#[error("the name resolves to an address that is not public")]
pub struct AddressRefused;

/// Resolves names, and refuses one as soon as any of its addresses is not allowed. What it hands on is what is
/// connected to, so that a name cannot be checked with one address and reached at another.
struct GuardedResolver {
    policy: AddressPolicy,
    lookup: Lookup,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (policy, lookup) = (self.policy.clone(), self.lookup.clone());
        async move {
            let addresses = lookup(name.as_str().to_owned()).await?;
            if addresses.iter().any(|address| !policy.allows(address.ip())) {
                return Err(AddressRefused.into());
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        }
        .boxed()
    }
}

/// What counts as an answer is its status line: whatever else in it can be read in more than one way, or not at all, is
/// passed over.
fn builder(resolver: GuardedResolver) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(concat!("Lethe/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::none())
        // A proxy of the environment would connect on our behalf to what we did not check.
        .no_proxy()
        .referer(false)
        .http1_only()
        .http1_allow_obsolete_multiline_headers_in_responses(true)
        .http1_allow_spaces_after_header_name_in_responses(true)
        .http1_ignore_invalid_headers_in_responses(true)
        .http1_max_headers(MAX_HEADERS)
        .dns_resolver(Arc::new(resolver))
        .connect_timeout(Duration::from_secs(10))
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_keepalive(Duration::from_secs(30))
}

/// Sends callbacks.
#[derive(Clone, Debug)]
pub struct CallbackClient {
    client: reqwest::Client,
    /// For the second try of an attempt, which must not meet another kept connection.
    unpooled: reqwest::Client,
    kept: Arc<Kept>,
    policy: AddressPolicy,
    timeout: Duration,
}

/// What is sent.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Where to.
    pub url: String,
    /// The exact bytes that were signed.
    pub body: Vec<u8>,
    /// Beside `Content-Type`.
    pub headers: Vec<(&'static str, String)>,
}

impl CallbackClient {
    /// A client under `policy`. `extra_ca` is a PEM file of further trusted certificates.
    ///
    /// # Errors
    /// [`ConfigError`] where the certificates cannot be read.
    pub fn new(policy: AddressPolicy, lookup: Lookup, extra_ca: Option<&Path>) -> Result<Self, ConfigError> {
        let mut trusted = Vec::new();
        if let Some(path) = extra_ca {
            let invalid =
                |error: String| ConfigError::new("LETHE_CALLBACK_CA_FILE", format!("{}: {error}", path.display()));
            let pem = std::fs::read(path).map_err(|error| invalid(error.to_string()))?;
            trusted = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| invalid(error.to_string()))?;
        }
        let build = |lookup, kept_per_host| {
            let resolver = GuardedResolver { policy: policy.clone(), lookup };
            let builder = builder(resolver).pool_max_idle_per_host(kept_per_host).tls_certs_merge(trusted.clone());
            builder.build().map_err(|error| ConfigError::new("LETHE_CALLBACK_CA_FILE", error))
        };
        let (client, unpooled) = (build(lookup.clone(), 16)?, build(lookup, 0)?);
        Ok(Self { client, unpooled, kept: Arc::default(), policy, timeout: DELIVERY_TIMEOUT })
    }

    /// With another time limit, for tests.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Delivers once. Never fails: the attempt says what happened, as soon as that is known.
    pub async fn deliver(&self, delivery: &Delivery) -> DeliveryAttempt {
        let started = Instant::now();
        let mut attempt = match tokio::time::timeout(self.timeout, self.send(delivery)).await {
            Err(_) => DeliveryAttempt::failed("timeout", true),
            Ok(Err(attempt)) => attempt,
            Ok(Ok(response)) => {
                let attempt = judge(&response);
                self.kept.answered(&response);
                leave(response);
                attempt
            }
        };
        attempt.duration = started.elapsed();
        attempt
    }

    async fn send(&self, delivery: &Delivery) -> Result<reqwest::Response, DeliveryAttempt> {
        // Literal addresses never reach the resolver; the rules may have changed since intake.
        if self.policy.check(&delivery.url).is_err() {
            return Err(DeliveryAttempt::failed("address_refused", false));
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in &delivery.headers {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                headers.insert(name, value);
            }
        }
        let post = |client: &reqwest::Client| {
            client.post(&delivery.url).headers(headers.clone()).body(delivery.body.clone()).send()
        };
        let mut sent = post(&self.client).await;
        // The receiver closed a connection that we had kept, as it may at any time. What was sent carries its id.
        if let Err(error) = &sent
            && self.kept.broke(error).await
        {
            metrics::counter!("lethe_callback_connections_replaced_total").increment(1);
            sent = post(&self.unpooled).await;
        }
        sent.map_err(|error| failure(&error))
    }
}

/// The connections that have given an answer, by their two addresses: one that breaks later was kept.
#[derive(Debug, Default)]
struct Kept(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    answered: HashMap<(SocketAddr, SocketAddr), Instant>,
    swept: Option<Instant>,
}

/// Connections that are remembered at most.
const REMEMBERED: usize = 65_536;
/// How often, and how long after one another, an answer is looked for that somebody else may be about to note.
const NOTED_WITHIN: usize = 5;
const NOTED_AFTER: Duration = Duration::from_millis(10);
/// Those that cannot be open any more are forgotten so often.
const SWEEP: Duration = Duration::from_secs(10);

impl Kept {
    fn answered(&self, response: &reqwest::Response) {
        let Some(info) = response.extensions().get::<HttpInfo>() else { return };
        let now = Instant::now();
        let mut connections = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.swept.is_none_or(|swept| now - swept > SWEEP) {
            connections.swept = Some(now);
            connections.answered.retain(|_, answered| now - *answered <= IDLE_TIMEOUT + DELIVERY_TIMEOUT);
        }
        if connections.answered.len() < REMEMBERED {
            connections.answered.insert((info.local_addr(), info.remote_addr()), now);
        }
    }

    /// Whether it was a kept connection that broke before an answer.
    async fn broke(&self, error: &reqwest::Error) -> bool {
        let Some(connection) = find::<hyper_util::client::legacy::Error>(error).and_then(|error| error.connect_info())
        else {
            return false;
        };
        let mut extensions = http::Extensions::new();
        connection.get_extras(&mut extensions);
        let Some(info) = extensions.get::<HttpInfo>().filter(|_| is_broken(error)) else { return false };
        let addresses = (info.local_addr(), info.remote_addr());
        // A connection is free for the next delivery as soon as it has answered, and whoever got the answer may not have
        // come to note it yet.
        for _ in 0..NOTED_WITHIN {
            if self.forget(addresses) {
                return true;
            }
            tokio::time::sleep(NOTED_AFTER).await;
        }
        false
    }

    /// Forgets a connection; whether it had given an answer.
    fn forget(&self, addresses: (SocketAddr, SocketAddr)) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).answered.remove(&addresses).is_some()
    }
}

/// The connection ended, rather than that something wrong came over it.
fn is_broken(error: &reqwest::Error) -> bool {
    find::<hyper::Error>(error).is_some_and(|error| {
        error.is_incomplete_message()
            || error.is_closed()
            || error.is_canceled()
            || find::<std::io::Error>(error).is_some()
    })
}

fn judge(response: &reqwest::Response) -> DeliveryAttempt {
    let status = response.status();
    let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|value| parse_retry_after(value, Timestamp::now()));
    let (error_class, endpoint_trouble) = match status.as_u16() {
        200..300 => (None, false),
        300..400 => (Some("redirect"), false),
        429 => (Some("status_429"), true),
        400..500 => (Some("status_4xx"), false),
        _ => (Some("status_5xx"), true),
    };
    DeliveryAttempt {
        duration: Duration::ZERO,
        status_code: Some(status.as_u16()),
        error_class,
        reason: None,
        endpoint_trouble,
        retry_after,
    }
}

/// Reads what is left of an answer, so that the connection can be used again, while the outcome is recorded. A body that is
/// long, or does not end, is cut off, and the connection with it.
fn leave(response: reqwest::Response) {
    let mut rest = Box::pin(read_out(response));
    // Most bodies are empty, or came with the header.
    if rest.as_mut().now_or_never().is_none() {
        tokio::spawn(tokio::time::timeout(BODY_TIMEOUT, rest));
    }
}

async fn read_out(mut response: reqwest::Response) {
    let mut read = 0;
    while let Ok(Some(chunk)) = response.chunk().await {
        read += chunk.len();
        if read > BODY_LIMIT {
            return;
        }
    }
}

/// The first error of this type among an error and its causes. What an I/O error wraps is not among its causes, and is
/// looked at as well.
fn find<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(found) = cause.downcast_ref() {
            return Some(found);
        }
        let wrapped = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => cause.source(),
        };
    }
    None
}

/// Words of the libraries about an answer or a handshake, fit for a log and a terminal: a certificate of the receiver may
/// be quoted in them.
fn reason_of(error: &dyn std::error::Error) -> String {
    error
        .to_string()
        .chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
        .take(REASON_LIMIT)
        .collect()
}

/// Why nothing, or nothing that is HTTP, came back.
fn failure(error: &reqwest::Error) -> DeliveryAttempt {
    if find::<AddressRefused>(error).is_some() {
        return DeliveryAttempt::failed("address_refused", false);
    }
    if let Some(cause) = find::<rustls::Error>(error) {
        return DeliveryAttempt { reason: Some(reason_of(cause)), ..DeliveryAttempt::failed("tls", true) };
    }
    if error.is_timeout() {
        return DeliveryAttempt::failed("timeout", true);
    }
    if error.is_connect() {
        return DeliveryAttempt::failed("connect", true);
    }
    match find::<hyper::Error>(error).filter(|error| error.is_parse()) {
        Some(cause) => {
            DeliveryAttempt { reason: Some(reason_of(cause)), ..DeliveryAttempt::failed("bad_answer", true) }
        }
        None => DeliveryAttempt::failed("connection_lost", true),
    }
}
