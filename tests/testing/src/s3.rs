//! A store that speaks as much of S3 as the workers need, with the faults of those that are not quite S3.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};

/// What the store does unlike S3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Proper,
    /// It writes over what is there, whatever the condition.
    IgnoresConditions,
    /// It keeps versions.
    Versioned,
}

/// The store.
pub struct S3 {
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Clone)]
struct Bucket {
    kind: Kind,
    objects: Arc<Mutex<BTreeMap<String, Bytes>>>,
}

impl S3 {
    /// Listens on a free port.
    pub async fn start(kind: Kind) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Bucket { kind, objects: Arc::default() });
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, server }
    }

    /// Settings with which a worker keeps its keys there.
    pub fn key_store(&self) -> Vec<(&'static str, String)> {
        settings("LETHE_KEY_STORE", &format!("http://{}", self.address))
    }
}

/// Settings of a store that lies in a bucket of the S3 at `endpoint`.
pub fn settings(variable: &'static str, endpoint: &str) -> Vec<(&'static str, String)> {
    vec![
        (variable, "s3://bucket".to_owned()),
        ("AWS_ENDPOINT", endpoint.to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "eu-west-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
    ]
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(
    State(bucket): State<Bucket>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let path = uri.path().to_owned();
    let mut objects = bucket.objects.lock().unwrap();
    let plain = |status: StatusCode, body: Bytes| Response::builder().status(status).body(Body::from(body)).unwrap();
    match method {
        Method::PUT => {
            let only_new = headers.get("if-none-match").is_some_and(|value| value == "*");
            if only_new && objects.contains_key(&path) && bucket.kind != Kind::IgnoresConditions {
                return plain(StatusCode::PRECONDITION_FAILED, Bytes::new());
            }
            objects.insert(path, body);
            let answer = Response::builder().status(StatusCode::OK).header("etag", "\"1\"");
            let answer = if bucket.kind == Kind::Versioned { answer.header("x-amz-version-id", "v1") } else { answer };
            answer.body(Body::empty()).unwrap()
        }
        Method::GET if uri.query().is_some_and(|query| query.contains("list-type=2")) => {
            plain(StatusCode::OK, "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>".into())
        }
        Method::GET => match objects.get(&path) {
            Some(object) => plain(StatusCode::OK, object.clone()),
            None => plain(StatusCode::NOT_FOUND, Bytes::new()),
        },
        Method::DELETE => {
            objects.remove(&path);
            plain(StatusCode::NO_CONTENT, Bytes::new())
        }
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, Bytes::new()),
    }
}
