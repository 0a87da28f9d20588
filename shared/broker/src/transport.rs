//! The transport of a broker connection: the library's own TCP and TLS, with a [`Screen`] between them and its reader.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};
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
    let tokio = Runtime::tokio_current();
    let open = async move |uri: AMQPUri, _: Runtime<Screening>| {
        let tls = OwnedTLSConfig::default();
        let opened = tokio::select! {
            opened = uri.connect_with_config_async(tls.as_ref(), &tokio) => opened,
            () = cut.cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
        };
        Ok(AsyncTcpStream::Plain(Screened::new(opened?, frame_max, cut.clone())))
    };
    Connection::connector(uri, Runtime::new(Screening(Tokio::current())), open, properties).await
}

/// Where the bytes come from.
type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

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
            let received = ready!(Pin::new(&mut this.socket).poll_read(cx, &mut this.chunk))?;
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
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_cut(cx)?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
        Pin::new(&mut self.socket).poll_close(cx)
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
