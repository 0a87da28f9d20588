//! The transport of a broker connection: TCP, and TLS for `amqps`, with a [`Screen`] between them and the library's reader.
//! The library's own TLS would bring in a second reader of keys and certificates.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use lapin::tcp::AsyncTcpStream;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::compat::TokioAsyncReadCompatExt;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::screen::Screen;

/// Bytes read from the socket at once.
const CHUNK: usize = 16 * 1024;

/// Connects by way of a screen for frames of at most `frame_max` bytes. Once `cut` is cancelled the socket is closed,
/// whatever state the connection is in: the library's thread would otherwise wait for a broker that reads nothing.
pub(super) async fn connect(
    uri: AMQPUri,
    frame_max: u32,
    properties: ConnectionProperties,
    cut: CancellationToken,
) -> Result<Connection, lapin::Error> {
    // The library connects on a thread of its own, which knows no runtime.
    let runtime = tokio::runtime::Handle::current();
    let open = async move |uri: AMQPUri, _: Runtime<Screening>| {
        let opening = runtime.spawn(open(uri));
        let abort = opening.abort_handle();
        let opened = tokio::select! {
            opened = opening => opened.map_err(io::Error::other)?,
            () = cut.cancelled() => {
                abort.abort();
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        };
        Ok(AsyncTcpStream::Plain(Screened::new(opened?, frame_max, cut.clone())))
    };
    Connection::connector(uri, Runtime::new(Screening(Tokio::current())), open, properties).await
}

/// Where the bytes come from.
type Socket = Pin<Box<dyn Bytes>>;

trait Bytes: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Bytes for T {}

async fn open(uri: AMQPUri) -> io::Result<Socket> {
    let (host, port) = (uri.authority.host, uri.authority.port);
    let host = host.trim_matches(['[', ']']).to_owned();
    let socket = TcpStream::connect((host.as_str(), port)).await?;
    socket.set_nodelay(true)?;
    Ok(match uri.scheme {
        AMQPScheme::AMQP => Box::pin(socket.compat()),
        AMQPScheme::AMQPS => {
            let config = tokio::task::spawn_blocking(tls_config).await??;
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            Box::pin(TlsConnector::from(Arc::new(config)).connect(name, socket).await?.compat())
        }
    })
}

/// With the roots of trust of the system, or of `SSL_CERT_FILE` and `SSL_CERT_DIR`. Read for each connection: there are few,
/// and a certificate that is renewed, or put right, counts from the next one on.
fn tls_config() -> io::Result<ClientConfig> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let reason = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
        let message = format!("there are no root certificates{reason}: install ca-certificates, or set SSL_CERT_FILE");
        return Err(io::Error::other(message));
    }
    for error in &found.errors {
        tracing::warn!(%error, "some root certificates cannot be read");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(io::Error::other)?.with_root_certificates(roots).with_no_client_auth())
}

/// A socket whose incoming bytes are screened.
pub(super) struct Screened {
    socket: Socket,
    screen: Screen,
    chunk: Box<[u8]>,
    /// What has passed the screen, and is not read yet.
    passed: Vec<u8>,
    read: usize,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Screened {
    fn new(socket: Socket, frame_max: u32, cut: CancellationToken) -> Self {
        let chunk = vec![0; CHUNK].into_boxed_slice();
        let cut = Box::pin(cut.cancelled_owned());
        Self { socket, screen: Screen::new(frame_max), chunk, passed: Vec::new(), read: 0, cut }
    }

    fn check_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Screened {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        while this.read == this.passed.len() {
            this.passed.clear();
            this.read = 0;
            this.check_cut(cx)?;
            let received = ready!(this.socket.as_mut().poll_read(cx, &mut this.chunk))?;
            if received == 0 {
                return Poll::Ready(Ok(0));
            }
            this.screen.feed(&this.chunk[..received], &mut this.passed)?;
        }
        let waiting = &this.passed[this.read..];
        let count = waiting.len().min(buffer.len());
        buffer[..count].copy_from_slice(&waiting[..count]);
        this.read += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Screened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_cut(cx)?;
        self.socket.as_mut().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_cut(cx)?;
        self.socket.as_mut().poll_write_vectored(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
        self.socket.as_mut().poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
        self.socket.as_mut().poll_close(cx)
    }
}

/// Tokio for the library, except that its TCP streams are ours.
#[derive(Clone, Debug)]
struct Screening(Tokio);

impl RuntimeKit for Screening {}

impl Executor for Screening {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, work: F) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(work)
    }
}

impl Reactor for Screening {
    type TcpStream = Screened;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Send + 'static>(&self, _: H) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Screened, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    /// The streams are opened by [`connect`], which knows how large their frames are.
    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
