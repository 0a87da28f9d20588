//! Receivers of callbacks on many ports: they answer 202 and count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::Notify;

#[derive(Default)]
struct Shared {
    received: AtomicU64,
    target: AtomicU64,
    reached: Notify,
}

/// Listens until it is dropped.
pub(crate) struct Receivers {
    /// A URL at each port.
    pub(crate) urls: Vec<String>,
    shared: Arc<Shared>,
    servers: Vec<tokio::task::JoinHandle<()>>,
}

impl Receivers {
    /// Listens on so many free ports.
    pub(crate) async fn start(count: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let (mut urls, mut servers) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            urls.push(format!("http://{}/callbacks", listener.local_addr().unwrap()));
            let router = Router::new().fallback(receive).with_state(shared.clone());
            servers.push(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
        }
        Self { urls, shared, servers }
    }

    /// Waits until so many more have come in than when this was called first; begins to count now.
    pub(crate) fn expect(&self, count: u64) -> impl Future<Output = ()> + 'static {
        let shared = self.shared.clone();
        shared.target.store(shared.received.load(Ordering::SeqCst) + count, Ordering::SeqCst);
        async move {
            loop {
                let reached = shared.reached.notified();
                if shared.received.load(Ordering::SeqCst) >= shared.target.load(Ordering::SeqCst) {
                    return;
                }
                reached.await;
            }
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        for server in &self.servers {
            server.abort();
        }
    }
}

async fn receive(State(shared): State<Arc<Shared>>, body: axum::body::Bytes) -> StatusCode {
    drop(body);
    if shared.received.fetch_add(1, Ordering::SeqCst) + 1 >= shared.target.load(Ordering::SeqCst) {
        shared.reached.notify_waiters();
    }
    StatusCode::ACCEPTED
}
