//! A TCP proxy between a worker and a server that can be cut and mended.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
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
}

/// The proxy.
pub struct Proxy {
    port: u16,
    way: Arc<watch::Sender<Way>>,
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
        let ways = way.clone();
        let server = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target.clone(), ways.subscribe()));
            }
        });
        Self { port, way, server }
    }

    /// `url`, by way of the proxy.
    pub fn through(&self, url: &str) -> String {
        let mut url: Url = url.parse().unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.to_string()
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

async fn carry(mut client: TcpStream, target: (String, u16), mut way: watch::Receiver<Way>) {
    let now = *way.borrow_and_update();
    match now {
        Way::Refusing => return,
        Way::Silent => {
            let _ = way.wait_for(|way| *way != Way::Silent).await;
            return;
        }
        Way::Open | Way::Slow(_) => {}
    }
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let pace = way.clone();
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let cut = tokio::select! {
        () = pump(from_client, to_server, &pace) => None,
        () = pump(from_server, to_client, &pace) => None,
        way = way.wait_for(|way| matches!(way, Way::Refusing | Way::Silent)) => way.ok().map(|way| *way),
    };
    if cut == Some(Way::Silent) {
        // Held open and unheard until the way is another.
        let _ = way.wait_for(|way| *way != Way::Silent).await;
    }
}

/// Carries one direction until either side ends.
async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, way: &watch::Receiver<Way>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let slow = *way.borrow();
        if let Way::Slow(delay) = slow {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
