//! Listening: connections are bounded, slow clients are cut off, and a stop lets calls under way finish.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::Handle;
use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioTimer;
use lethe_db::DbError;
use lethe_process::settings::ConfigError;
use lethe_runtime::service::Service;
use lethe_runtime::telemetry;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;

use crate::authentication::Callers;
use crate::groups::Groups;
use crate::limits::Limits;
use crate::options::{Bounds, Ready};
use crate::routes::router;
use crate::signatures::Signatures;
use crate::state::{Files, Gateway};

/// What is left of the time to drain once connections are cut.
const MARGIN: Duration = Duration::from_millis(500);
/// The longest header of a call, in bytes.
const HEADER_LIMIT: usize = 32 * 1024;

/// Why the gateway stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The address is taken, or the process may open no more files.
    #[error("cannot serve: {0}")]
    Io(#[from] io::Error),
    /// An error of the database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The address cannot be written down.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Serves until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), ServeError> {
    let up = service.health.component("http");
    let bounds = ready.bounds;
    let intake = ready.receiving.intake(service.db.clone(), service.publisher.clone());
    let gateway = Arc::new(Gateway {
        db: service.db.clone(),
        submits: Groups::new(intake.clone()),
        statuses: Groups::new(intake.clone()),
        signatures: Signatures::new(ready.receiving.processor.signer.clone()),
        intake,
        callers: Callers::new(service.db.clone(), bounds.calls)?,
        limits: Limits::new(&bounds),
        files: Files {
            store: ready.results,
            day_keys: ready.day_keys,
            places: Arc::new(Semaphore::new(bounds.downloads)),
        },
        places: Semaphore::new(bounds.calls),
        trusted_proxies: ready.trusted_proxies,
        body_timeout: bounds.timeout,
        processor: ready.receiving.processor,
        signatory: ready.signatory,
    });
    let tidy = (gateway.clone(), service.shutdown.clone());
    tokio::spawn(async move { tidy.0.limits.tidy(tidy.1).await });

    let listener = std::net::TcpListener::bind(ready.listen)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    telemetry::write_address(service.run_dir.as_deref(), &format!("gateway-{}.http", std::process::id()), address)?;
    let handle = Handle::new();
    let (stop, shutdown) = (handle.clone(), service.shutdown.clone());
    let drain = service.drain_timeout.saturating_sub(MARGIN);
    tokio::spawn(async move {
        shutdown.cancelled().await;
        stop.graceful_shutdown(Some(drain));
    });
    let mut server = axum_server::from_tcp(listener)?.handle(handle);
    // Also while a connection that is kept alive waits for its next call.
    let http1 = &mut server.http_builder().http1();
    http1.timer(TokioTimer::new()).header_read_timeout(bounds.timeout).max_buf_size(HEADER_LIMIT);
    let service_of_connection = router(&gateway).into_make_service_with_connect_info::<SocketAddr>();
    up.set(true);
    tracing::info!(%address, tls = ready.tls.is_some(), "serving");
    let accept = Bounded::new(&bounds);
    // HTTP/1 only, set after the acceptor, which resets it: otherwise the version is detected from the first bytes, and
    // a client might take as long as it likes to send them.
    match ready.tls {
        None => server.acceptor(accept).http1_only().serve(service_of_connection).await?,
        Some(files) => {
            let config = RustlsConfig::from_config(files.load().map_err(io::Error::other)?);
            tokio::spawn(files.watch(config.clone(), service.shutdown.clone()));
            let tls = RustlsAcceptor::new(config).handshake_timeout(bounds.timeout).acceptor(accept);
            server.acceptor(tls).http1_only().serve(service_of_connection).await?;
        }
    }
    Ok(())
}

/// Accepts as many connections as there are places, and gives up on clients that read nothing.
#[derive(Clone)]
struct Bounded {
    places: Arc<Semaphore>,
    /// As many may wait as there are places; further ones are closed, so that file descriptors do not run out.
    waiting: Arc<Semaphore>,
    timeout: Duration,
}

impl Bounded {
    fn new(bounds: &Bounds) -> Self {
        let places = || Arc::new(Semaphore::new(bounds.connections));
        Self { places: places(), waiting: places(), timeout: bounds.timeout }
    }
}

impl<S: Send + 'static> Accept<TcpStream, S> for Bounded {
    type Stream = Connection;
    type Service = S;
    type Future = BoxFuture<'static, io::Result<(Connection, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let (places, waiting, timeout) = (self.places.clone(), self.waiting.clone(), self.timeout);
        async move {
            let _waiting = waiting.try_acquire().map_err(io::Error::other)?;
            // Whoever holds a place without calling loses it within the same time.
            let place = tokio::time::timeout(timeout, places.acquire_owned()).await?.map_err(io::Error::other)?;
            stream.set_nodelay(true)?;
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(timeout));
            Ok((Connection { stream: Box::pin(stream), _place: place }, service))
        }
        .boxed()
    }
}

/// A connection and its place.
struct Connection {
    stream: Pin<Box<TimeoutStream<TcpStream>>>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(cx)
    }
}
