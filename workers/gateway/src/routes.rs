//! What is served where, and what every call passes through.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::header::CACHE_CONTROL;
use axum::http::{HeaderValue, Method};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};
use lethe_domain::opendsr::ApiVersion;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::set_header::SetResponseHeaderLayer;

use crate::client_address::{client_address, limited_by};
use crate::downloads::download;
use crate::refusal::Refusal;
use crate::state::{ClientAddress, Gateway};
use crate::{calls, certificate, discovery, openapi};

/// The whole service.
pub(crate) fn router(gateway: &Arc<Gateway>) -> Router {
    let versions = ApiVersion::ALL
        .iter()
        .fold(Router::new(), |router, version| router.nest(&format!("/{}", version.path()), of_version(*version)));
    versions
        .route("/opendsr_cert.pem", get(discovery::certificate))
        .route("/opendsr_cert_ec.pem", get(discovery::ec_certificate))
        .merge(openapi::pages())
        .fallback(async || Refusal::new(404, "there is nothing at this address; /docs lists what there is"))
        .method_not_allowed_fallback(async || Refusal::new(405, "this address does not support this method; see /docs"))
        .layer(middleware::from_fn_with_state(gateway.clone(), admit))
        .layer(middleware::from_fn(observe))
        .layer(CatchPanicLayer::custom(|_| Refusal::new(500, "the call could not be answered").into_response()))
        .layer(SetResponseHeaderLayer::if_not_present(CACHE_CONTROL, HeaderValue::from_static("no-store")))
        .with_state(gateway.clone())
}

fn of_version(version: ApiVersion) -> Router<Arc<Gateway>> {
    let requests = calls::requests_path(version);
    let calls: [(&str, MethodRouter<Arc<Gateway>>); 6] = [
        (requests, post(calls::submit).get(calls::group)),
        (&format!("{requests}/{{id}}"), get(calls::status).delete(calls::cancel)),
        (&format!("{requests}/{{id}}/certificate"), get(certificate::certificate)),
        ("/status/{id}", get(calls::status)),
        ("/discovery", get(discovery::discovery)),
        ("/results/{token}", get(download)),
    ];
    let router = calls.into_iter().fold(Router::new(), |router, (path, methods)| {
        // Clients send both.
        router.route(path, methods.clone()).route(&format!("{path}/"), methods)
    });
    router.layer(Extension(version))
}

/// Lets a call in: within the limit of its address, and while there is a place.
async fn admit(
    State(gateway): State<Arc<Gateway>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    mut request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    let address = limited_by(client_address(peer.ip(), request.headers(), &gateway.trusted_proxies));
    gateway.limits.address(address)?;
    request.extensions_mut().insert(ClientAddress(address));
    let busy = |_| Refusal::later("this server has as many calls under way as it allows; try again");
    let _place = gateway.places.try_acquire().map_err(busy)?;
    Ok(next.run(request).await)
}

/// A label from a closed list: a client may name a method whatever it likes, and each new label stays.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Counts and times calls by the pattern of their path: paths themselves hold ids and tokens.
async fn observe(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let call = path.as_ref().map_or("other", |path| path.as_str().trim_end_matches('/')).to_owned();
    let method = method_label(request.method());
    let started = Instant::now();
    let response = next.run(request).await;
    let (status, seconds) = (response.status().as_u16().to_string(), started.elapsed().as_secs_f64());
    tracing::debug!(call, method, status, seconds, "answered");
    let labels = [("call", call.clone()), ("method", method.to_owned()), ("status", status)];
    metrics::counter!("lethe_http_requests_total", &labels).increment(1);
    metrics::histogram!("lethe_http_seconds", "call" => call).record(seconds);
    response
}
