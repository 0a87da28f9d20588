//! The one HTTP client of a courier: guarded addresses, no redirects, no proxies, bodies that are not read.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::redirect::Policy;
use tokio::time::Instant;

use super::address::AddressPolicy;
use crate::backoff::parse_retry_after;
use crate::config::ConfigError;
use crate::db::callbacks::Attempt;

/// A delivery that takes longer has failed (contract 6).
pub const DELIVERY_TIMEOUT: Duration = Duration::from_secs(30);
/// An answer's body is read up to here, so that the connection can be kept; a longer one is cut off.
const BODY_LIMIT: usize = 16 * 1024;

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

/// Sends callbacks.
#[derive(Clone, Debug)]
pub struct CallbackClient {
    client: reqwest::Client,
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
        let resolver = GuardedResolver { policy: policy.clone(), lookup };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("Lethe/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            // A proxy of the environment would connect on our behalf to what we did not check.
            .no_proxy()
            .referer(false)
            .http1_only()
            .dns_resolver(Arc::new(resolver))
            .connect_timeout(Duration::from_secs(10))
            .pool_idle_timeout(Duration::from_mins(1))
            .pool_max_idle_per_host(16)
            .tcp_keepalive(Duration::from_secs(30));
        if let Some(path) = extra_ca {
            let invalid =
                |error: String| ConfigError::new("LETHE_CALLBACK_CA_FILE", format!("{}: {error}", path.display()));
            let pem = std::fs::read(path).map_err(|error| invalid(error.to_string()))?;
            let certificates =
                reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| invalid(error.to_string()))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().map_err(|error| ConfigError::new("LETHE_CALLBACK_CA_FILE", error))?;
        Ok(Self { client, policy, timeout: DELIVERY_TIMEOUT })
    }

    /// With another time limit, for tests.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Delivers once. Never fails: the attempt says what happened.
    pub async fn deliver(&self, delivery: &Delivery) -> Attempt {
        let started = Instant::now();
        let sent = tokio::time::timeout(self.timeout, self.send(delivery)).await;
        let mut attempt = match sent {
            Err(_) => Attempt::failed("timeout", true),
            Ok(Err(attempt)) => attempt,
            Ok(Ok(response)) => {
                let attempt = judge(&response);
                // The status decides; what follows only serves to keep the connection, within the time that is left.
                let left = self.timeout.saturating_sub(started.elapsed());
                let _ = tokio::time::timeout(left, read_out(response)).await;
                attempt
            }
        };
        attempt.duration = started.elapsed();
        attempt
    }

    async fn send(&self, delivery: &Delivery) -> Result<reqwest::Response, Attempt> {
        // Literal addresses never reach the resolver; the rules may have changed since intake.
        if self.policy.check(&delivery.url).is_err() {
            return Err(Attempt::failed("address_refused", false));
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in &delivery.headers {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                headers.insert(name, value);
            }
        }
        let request = self.client.post(&delivery.url).headers(headers).body(delivery.body.clone());
        request.send().await.map_err(|error| {
            let class = class_of(&error);
            Attempt::failed(class, class != "address_refused")
        })
    }
}

fn judge(response: &reqwest::Response) -> Attempt {
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
    Attempt { duration: Duration::ZERO, status_code: Some(status.as_u16()), error_class, endpoint_trouble, retry_after }
}

/// Reads a short body, so that the connection can be used again; a long one is cut off, and the connection with it.
async fn read_out(mut response: reqwest::Response) {
    let mut read = 0;
    while let Ok(Some(chunk)) = response.chunk().await {
        read += chunk.len();
        if read > BODY_LIMIT {
            return;
        }
    }
}

fn class_of(error: &reqwest::Error) -> &'static str {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if cause.is::<AddressRefused>() {
            return "address_refused";
        }
        if cause.is::<rustls::Error>() {
            return "tls";
        }
        source = cause.source();
    }
    if error.is_timeout() {
        "timeout"
    } else if error.is_connect() {
        "connect"
    } else {
        "connection_lost"
    }
}

impl Attempt {
    /// Nothing was sent, for a reason of ours.
    #[must_use]
    pub const fn not_sent(class: &'static str) -> Self {
        Self::failed(class, false)
    }

    const fn failed(class: &'static str, endpoint_trouble: bool) -> Self {
        Self {
            duration: Duration::ZERO,
            status_code: None,
            error_class: Some(class),
            endpoint_trouble,
            retry_after: None,
        }
    }
}
