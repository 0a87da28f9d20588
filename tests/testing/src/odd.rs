//! Receivers of callbacks as they are found: answers that are not quite HTTP, over plain sockets.

use std::future::pending;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use url::Url;

/// How a receiver answers each POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Odd {
    /// With these bytes; the connection stays.
    Says(&'static [u8]),
    /// With these bytes; then the connection is closed.
    SaysAndCloses(&'static [u8]),
    /// With a header, and a body that goes on for ever.
    Endless,
    /// The first POST of a connection is taken; a further one is read, and the connection closed without a word.
    ClosesReused,
    /// Never, and no connection is closed.
    Tarpit,
}

/// A POST that came in.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which connection brought it, from 1.
    pub connection: usize,
    /// The value of `X-Lethe-Attempt`.
    pub attempt: String,
    /// The path of the URL.
    pub path: String,
}

/// A receiver. All connections end when it is dropped.
pub struct OddReceiver {
    address: SocketAddr,
    scheme: &'static str,
    seen: Arc<Mutex<Vec<Seen>>>,
    server: tokio::task::JoinHandle<()>,
    _alive: watch::Sender<()>,
}

const TAKEN: &[u8] = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n";

impl OddReceiver {
    /// Listens on a free port of every loopback address.
    pub async fn start(odd: Odd) -> Self {
        Self::listen(odd, None).await
    }

    /// The same with TLS.
    pub async fn start_tls(odd: Odd, certificate: &Certified) -> Self {
        Self::listen(odd, Some(certificate.acceptor())).await
    }

    async fn listen(odd: Odd, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (alive, ends) = watch::channel(());
        let scheme = if tls.is_some() { "https" } else { "http" };
        let posts = seen.clone();
        let server = tokio::spawn(async move {
            for connection in 1.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (posts, tls, mut ends) = (posts.clone(), tls.clone(), ends.clone());
                tokio::spawn(async move {
                    let serving = async {
                        match tls {
                            None => serve(stream, connection, odd, &posts).await,
                            Some(tls) => {
                                let Ok(stream) = tls.accept(stream).await else { return };
                                serve(stream, connection, odd, &posts).await;
                            }
                        }
                    };
                    // An error: the receiver is gone.
                    tokio::select! { () = serving => {} _ = ends.changed() => {} }
                });
            }
        });
        Self { address, scheme, seen, server, _alive: alive }
    }

    /// A URL of this receiver under a host name or address that leads to this machine.
    pub fn url_at(&self, host: &str, path: &str) -> String {
        format!("{}://{host}:{}{path}", self.scheme, self.address.port())
    }

    /// A URL of this receiver; `path` begins with a slash.
    pub fn url(&self, path: &str) -> String {
        self.url_at("127.0.0.1", path)
    }

    /// Every POST so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for OddReceiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, connection: usize, odd: Odd, posts: &Mutex<Vec<Seen>>) {
    let mut buffer = Vec::new();
    for post in 1.. {
        let Some(head) = read_post(&mut stream, &mut buffer).await else { return };
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let attempt =
            head.lines().find_map(|line| line.strip_prefix("x-lethe-attempt: ")).unwrap_or_default().to_owned();
        posts.lock().unwrap().push(Seen { connection, attempt, path });
        let said = match odd {
            Odd::Says(bytes) => stream.write_all(bytes).await,
            Odd::SaysAndCloses(bytes) => {
                let _ = stream.write_all(bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Odd::ClosesReused if post > 1 => return,
            Odd::ClosesReused => stream.write_all(TAKEN).await,
            Odd::Endless => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n").await;
                return pending().await;
            }
            Odd::Tarpit => return pending().await,
        };
        if said.is_err() {
            return;
        }
    }
}

/// The head of the next POST; its body is read as well.
async fn read_post(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            let whole = end + 4 + length.unwrap_or(0);
            if buffer.len() >= whole {
                buffer.drain(..whole);
                return Some(head);
            }
        }
        let mut more = [0; 8 * 1024];
        match stream.read(&mut more).await {
            Ok(read @ 1..) => buffer.extend_from_slice(&more[..read]),
            _ => return None,
        }
    }
}

/// A certificate that a receiver made for itself.
pub struct Certified {
    key: KeyPair,
    der: Vec<u8>,
    /// PEM, for `LETHE_CALLBACK_CA_FILE`.
    pub file: PathBuf,
}

impl Certified {
    /// For `localhost`, written into `folder`. `is_ca`: marked as an authority, as `openssl req -x509` does.
    pub fn write(folder: &Path, is_ca: bool) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.is_ca = if is_ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        let certificate = params.self_signed(&key).unwrap();
        let file = folder.join(if is_ca { "ca-true.pem" } else { "ca-false.pem" });
        std::fs::write(&file, certificate.pem()).unwrap();
        Self { der: certificate.der().to_vec(), key, file }
    }

    /// What takes connections with it.
    pub fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone().into()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// Takes encrypted connections on a free port and passes what they say on to the broker of `amqp_url`; its URL.
    pub async fn before_broker(&self, amqp_url: &str) -> String {
        let mut url: Url = amqp_url.parse().unwrap();
        let broker = (url.host_str().unwrap().to_owned(), url.port().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_host(Some("localhost")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let acceptor = self.acceptor();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (acceptor, broker) = (acceptor.clone(), broker.clone());
                tokio::spawn(async move {
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let mut server = TcpStream::connect(broker).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        url.as_str().replacen("amqp://", "amqps://", 1)
    }
}
