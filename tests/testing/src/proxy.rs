//! A TCP proxy between a worker and a server that can be cut and mended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use url::Url;

/// What happens to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They pass.
    Open,
    /// Those that are there end, new ones are closed at once.
    Refusing,
    /// Those that are there go silent, new ones are taken and get no answer.
    Silent,
    /// They pass, and everything on the way takes so much longer.
    Slow(Duration),
    /// As RabbitMQ does it during an alarm: whoever publishes is told, and is read no more.
    Blocked,
    /// As a pooler does it that ignores the start-up parameter `options` of PostgreSQL.
    WithoutOptions,
}

/// The proxy.
pub struct Proxy {
    port: u16,
    way: Arc<watch::Sender<Way>>,
    taken: Arc<AtomicUsize>,
    received: Arc<AtomicU64>,
    server: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port for the server of `url`.
    pub async fn start(url: &str, way: Way) -> Self {
        let url: Url = url.parse().unwrap();
        let target = (url.host_str().unwrap().to_owned(), url.port().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let way = Arc::new(watch::Sender::new(way));
        let (ways, taken) = (way.clone(), Arc::new(AtomicUsize::new(0)));
        let received = Arc::new(AtomicU64::new(0));
        let (connections, bytes) = (taken.clone(), received.clone());
        let server = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(carry(client, target.clone(), ways.subscribe(), bytes.clone()));
            }
        });
        Self { port, way, taken, received, server }
    }

    /// `url`, by way of the proxy.
    pub fn through(&self, url: &str) -> String {
        let mut url: Url = url.parse().unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.to_string()
    }

    /// Connections that were ever taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Bytes that came from the server so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::SeqCst)
    }

    /// From now on.
    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn carry(mut client: TcpStream, target: (String, u16), mut way: watch::Receiver<Way>, received: Arc<AtomicU64>) {
    let now = *way.borrow_and_update();
    match now {
        Way::Refusing => return,
        Way::Silent => {
            let _ = way.wait_for(|way| *way != Way::Silent).await;
            return;
        }
        Way::Open | Way::Slow(_) | Way::Blocked | Way::WithoutOptions => {}
    }
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    if now == Way::WithoutOptions {
        let parameters = without_options(&mut client).await;
        if server.write_all(&parameters).await.is_err() {
            return;
        }
    }
    let (pace, blocked) = (way.clone(), Notify::new());
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let cut = tokio::select! {
        () = pump_up(from_client, to_server, &pace, &blocked) => None,
        () = pump_down(from_server, to_client, &pace, &blocked, &received) => None,
        way = way.wait_for(|way| matches!(way, Way::Refusing | Way::Silent)) => way.ok().map(|way| *way),
    };
    if cut == Some(Way::Silent) {
        // Held open and unheard until the way is another.
        let _ = way.wait_for(|way| *way != Way::Silent).await;
    }
}

/// Carries what the client sends until either side ends.
async fn pump_up(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    way: &watch::Receiver<Way>,
    blocked: &Notify,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if *way.borrow() == Way::Blocked && buffer[..read].windows(PUBLISH.len()).any(|bytes| bytes == PUBLISH) {
            blocked.notify_one();
            return std::future::pending().await;
        }
        if !carry_on(&buffer[..read], &mut to, way).await {
            return;
        }
    }
}

/// Carries what the server sends until either side ends.
async fn pump_down(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    way: &watch::Receiver<Way>,
    blocked: &Notify,
    received: &AtomicU64,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = blocked.notified() => {
                let _ = to.write_all(BLOCKED).await;
                continue;
            }
        };
        received.fetch_add(read.as_ref().map_or(0, |read| *read as u64), Ordering::SeqCst);
        match read {
            Ok(read @ 1..) if carry_on(&buffer[..read], &mut to, way).await => {}
            _ => return,
        }
    }
}

/// The method `basic.publish`.
const PUBLISH: &[u8] = &[0, 60, 0, 40];
/// A frame with the method `connection.blocked`.
const BLOCKED: &[u8] = b"\x01\0\0\0\0\0\x0e\0\x0a\0\x3c\x09low alarm\xce";

async fn carry_on(bytes: &[u8], to: &mut (impl AsyncWrite + Unpin), way: &watch::Receiver<Way>) -> bool {
    let slow = *way.borrow();
    if let Way::Slow(delay) = slow {
        tokio::time::sleep(delay).await;
    }
    to.write_all(bytes).await.is_ok()
}

/// The start-up message of PostgreSQL's protocol (3.0), without the parameter `options`. Encryption is refused.
async fn without_options(client: &mut TcpStream) -> Vec<u8> {
    loop {
        let length = client.read_u32().await.unwrap_or(8);
        let mut rest = vec![0; length as usize - 4];
        if client.read_exact(&mut rest).await.is_err() {
            return Vec::new();
        }
        if rest[..4] != [0, 3, 0, 0] {
            let _ = client.write_all(b"N").await;
            continue;
        }
        let texts: Vec<&[u8]> = rest[4..].split(|byte| *byte == 0).collect();
        let kept = texts.chunks(2).filter(|pair| pair[0] != b"options" && !pair[0].is_empty());
        let mut body = vec![0, 3, 0, 0];
        kept.for_each(|pair| body.extend([pair[0], b"\0", pair[1], b"\0"].concat()));
        body.push(0);
        return [&u32::try_from(body.len() + 4).unwrap().to_be_bytes()[..], &body].concat();
    }
}
