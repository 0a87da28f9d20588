//! The gateway over HTTP, as a controller calls it.

use lethe_domain::signature_algorithm::SignatureAlgorithm;
use reqwest::header::HeaderMap;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::signing;
use crate::wait::{eventually_some, patiently, seconds};
use crate::worker::Worker;
use crate::world::World;

/// An answer.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    /// HTTP status.
    pub status: u16,
    /// All headers.
    pub headers: HeaderMap,
    /// The exact bytes.
    pub body: Vec<u8>,
}

impl HttpAnswer {
    async fn of(request: RequestBuilder) -> Self {
        let answer = request.send().await.expect("the gateway answers");
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Self { status, headers, body: answer.bytes().await.expect("the answer is whole").to_vec() }
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header as text; empty where it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The names of the fields, sorted.
    pub fn fields(&self) -> Vec<String> {
        let mut fields: Vec<String> = self.json().as_object().unwrap().keys().cloned().collect();
        fields.sort();
        fields
    }

    /// Whether it carries the domain and the signature under the names of this family (`OpenDSR`, `OpenGDPR`), and no
    /// others.
    pub fn is_signed_as(&self, family: &str, algorithm: SignatureAlgorithm) -> bool {
        let signature = self.header(&format!("X-{family}-Signature"));
        let other = if family == "OpenDSR" { "OpenGDPR" } else { "OpenDSR" };
        signing::verifies(algorithm, signature, &self.body)
            && self.header(&format!("X-{family}-Processor-Domain")) == signing::DOMAIN
            && self.header(&format!("X-{other}-Signature")).is_empty()
    }

    /// Whether it is signed as versions 2 and 3 prescribe.
    pub fn is_signed(&self) -> bool {
        self.is_signed_as("OpenDSR", SignatureAlgorithm::RsaPkcs1v15)
    }

    /// Whether it carries no signature at all.
    pub fn is_unsigned(&self) -> bool {
        self.header("X-OpenDSR-Signature").is_empty() && self.header("X-OpenGDPR-Signature").is_empty()
    }

    /// The reason in the error object, whose form is checked.
    pub fn reason(&self) -> String {
        let json = self.json();
        let error = &json["error"];
        assert_eq!(error["code"], self.status, "{json}");
        assert!(!error["message"].as_str().unwrap().is_empty(), "{json}");
        let errors = error["errors"].as_array().unwrap();
        for one in errors {
            for field in ["domain", "reason", "message"] {
                assert!(!one[field].as_str().unwrap().is_empty(), "{json}");
            }
        }
        assert_eq!((json.as_object().unwrap().len(), error.as_object().unwrap().len()), (1, 3), "{json}");
        assert_eq!(self.header("content-type"), "application/json");
        assert_eq!(self.header("cache-control"), "no-store");
        errors[0]["reason"].as_str().unwrap().to_owned()
    }
}

/// A running gateway.
pub struct Gateway {
    /// The process.
    pub worker: Worker,
    /// Host and port.
    pub address: String,
    client: Client,
}

impl Gateway {
    /// Starts one and waits until it serves.
    pub async fn start(world: &World, settings: &[(&str, &str)]) -> Self {
        let worker = Worker::start(world, "gateway", settings).await;
        let address = worker.http_address().await;
        Self { worker, address, client: Client::builder().no_proxy().build().unwrap() }
    }

    /// The same behind a scheduler that has stored its calendar: without one nothing is accepted.
    pub async fn with_scheduler(world: &World, settings: &[(&str, &str)]) -> (Worker, Self) {
        let scheduler = Worker::spawn(world, "scheduler", settings);
        let gateway = Self::start(world, settings).await;
        scheduler.ready().await;
        let stored = async || world.optional::<i64>("SELECT version FROM lethe.calendars", &[]).await;
        eventually_some("the calendar is stored", seconds(10), stored).await;
        (scheduler, gateway)
    }

    /// A call without credentials.
    pub fn call(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("http://{}{path}", self.address)).timeout(patiently(seconds(20)))
    }

    /// The answer to a call without credentials.
    pub async fn get(&self, path: &str) -> HttpAnswer {
        HttpAnswer::of(self.call(Method::GET, path)).await
    }

    /// The answer to any call.
    pub async fn send(&self, request: RequestBuilder) -> HttpAnswer {
        HttpAnswer::of(request).await
    }

    /// Calls with the credentials of a controller of this world.
    pub fn caller(&self, world: &World, controller: &str) -> Caller<'_> {
        let (key, secret) = world.credentials(controller);
        Caller { gateway: self, key, secret }
    }

    /// A connection of its own, to say what no well-behaved client says.
    pub async fn connect(&self) -> Raw {
        Raw(TcpStream::connect(&self.address).await.unwrap())
    }
}

/// A controller that calls.
#[derive(Clone)]
pub struct Caller<'a> {
    gateway: &'a Gateway,
    /// User name of Basic authentication.
    pub key: String,
    /// Password of Basic authentication.
    pub secret: String,
}

impl Caller<'_> {
    /// A call.
    pub fn call(&self, method: Method, path: &str) -> RequestBuilder {
        self.gateway.call(method, path).basic_auth(&self.key, Some(&self.secret))
    }

    /// Asks.
    pub async fn get(&self, path: &str) -> HttpAnswer {
        HttpAnswer::of(self.call(Method::GET, path)).await
    }

    /// Asks for the headers.
    pub async fn head(&self, path: &str) -> HttpAnswer {
        HttpAnswer::of(self.call(Method::HEAD, path)).await
    }

    /// Cancels.
    pub async fn delete(&self, path: &str) -> HttpAnswer {
        HttpAnswer::of(self.call(Method::DELETE, path)).await
    }

    /// Hands JSON in.
    pub async fn post(&self, path: &str, body: impl Into<Vec<u8>>) -> HttpAnswer {
        let call = self.call(Method::POST, path).header("content-type", "application/json");
        HttpAnswer::of(call.body(body.into())).await
    }

    /// Hands a version 3 request in and expects 201.
    pub async fn request(&self, body: impl Into<Vec<u8>>) -> HttpAnswer {
        let answer = self.post("/v3/requests", body).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer
    }

    /// Where a request stands.
    pub async fn status(&self, id: &str) -> HttpAnswer {
        self.get(&format!("/v3/requests/{id}")).await
    }

    /// Waits until the request has a result, and returns the path of its link.
    pub async fn result_path(&self, id: &str) -> String {
        let url = eventually_some("the request has a result", seconds(20), async || {
            self.status(id).await.json()["results_url"].as_str().map(str::to_owned)
        });
        let url: url::Url = url.await.parse().unwrap();
        url.path().to_owned()
    }

    /// The value of `Authorization`.
    pub fn authorization(&self) -> String {
        use base64::Engine;
        let text = format!("{}:{}", self.key, self.secret);
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text))
    }
}

/// A connection by hand.
pub struct Raw(pub TcpStream);

impl Raw {
    /// Sends bytes; a peer that has closed is no failure, since what it said before is still to be read.
    pub async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.0.write_all(bytes.as_ref()).await;
    }

    /// Says no more, and takes what comes until the peer closes.
    pub async fn finish(&mut self) -> Vec<u8> {
        let _ = self.0.shutdown().await;
        self.rest().await
    }

    /// All that comes until the peer closes.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut piece = vec![0; 64 * 1024];
        loop {
            let read = tokio::time::timeout(patiently(seconds(20)), self.0.read(&mut piece)).await;
            // A reset ends it as well.
            match read.expect("the gateway closes the connection") {
                Ok(count @ 1..) => bytes.extend_from_slice(&piece[..count]),
                Ok(0) | Err(_) => return bytes,
            }
        }
    }

    /// The answer that comes before the peer closes; [`None`] where it closes without a word.
    pub async fn answer(&mut self) -> Option<HttpAnswer> {
        let bytes = self.rest().await;
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
            headers.append(reqwest::header::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        Some(HttpAnswer { status, headers, body: bytes[end + 4..].to_vec() })
    }
}
