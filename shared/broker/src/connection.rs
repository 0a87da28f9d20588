//! Connections to RabbitMQ. We supervise them ourselves: whoever needs one asks again when it has broken.
//!
//! **Invariant** (DESIGN rule 15): publishing and consuming are apart, and every wait for the broker has an end.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::sync::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{topology, transport};
use lethe_domain::disposition::Disposition;
use lethe_process::settings::ConfigError;

/// How long a connection may take, handshake and topology included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of a frame at most, unless the URL says otherwise: RabbitMQ's own default.
const FRAME_MAX: u32 = 128 * 1024;
const PUBLISHING_FRAME_MAX: u32 = 32 * 1024;
/// How long the broker may take to agree that a connection is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The broker failed us.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// What lapin said.
    #[error("RabbitMQ: {source}")]
    Amqp {
        /// The cause.
        #[from]
        source: lapin::Error,
    },
    /// No answer in time.
    #[error("RabbitMQ did not answer within {0:?}")]
    Timeout(Duration),
    /// The broker cancelled the consumer, for instance because the queue was deleted.
    #[error("RabbitMQ cancelled the consumer")]
    ConsumerCancelled,
    /// Messages of a queue that is handled in order were not handled; the channel is given up, so that they come again
    /// before those behind them.
    #[error("messages could not be handled; they will be redelivered in order")]
    OutOfOrder,
    /// The broker refused a message: a queue is full.
    #[error("RabbitMQ refused a message: a queue is full")]
    Refused,
    /// The broker takes no messages for now.
    #[error("RabbitMQ accepts no messages: it has raised an alarm (memory or disk)")]
    Blocked,
}

impl BrokerError {
    /// Something that was declared is not there any more.
    #[must_use]
    pub(crate) fn is_not_found(&self) -> bool {
        self.kind() == Some(AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
    }

    /// An internal error of the broker. RabbitMQ answers this to a consumer of a quorum queue of which it has kept only
    /// the name: its files are damaged, or it was killed just after it had created the queue.
    #[must_use]
    pub(crate) fn is_internal(&self) -> bool {
        self.kind() == Some(AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR))
    }

    fn kind(&self) -> Option<AMQPErrorKind> {
        let Self::Amqp { source } = self else { return None };
        let ErrorKind::ProtocolError(error) = source.kind() else { return None };
        Some(error.kind().clone())
    }

    /// Whether waiting helps.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Amqp { source } if matches!(source.kind(), ErrorKind::ProtocolError(_)) => Disposition::Permanent,
            _ => Disposition::Transient,
        }
    }
}

/// Where the broker is.
#[derive(Clone)]
pub struct Broker {
    /// Where it may be reached; the first that answers is used.
    uris: Arc<[AMQPUri]>,
    name: String,
    /// The connection that all consumers of this process share.
    consuming: Arc<Mutex<Option<Link>>>,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hosts = self.uris.iter().map(|uri| format!("{}:{}", uri.authority.host, uri.authority.port));
        f.debug_tuple("Broker").field(&hosts.collect::<Vec<_>>()).finish()
    }
}

impl Broker {
    /// The broker at `url`, which may name several hosts; `name` is shown in its management pages.
    ///
    /// # Errors
    /// [`ConfigError`] where `url` cannot be used.
    pub fn new(url: &str, name: &str) -> Result<Self, ConfigError> {
        Ok(Self { uris: super::url::parse(url)?.into(), name: name.to_owned(), consuming: Arc::default() })
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.uris.iter().all(|uri| uri.scheme == AMQPScheme::AMQPS)
    }

    /// Connects once and declares the topology. lapin keeps buffers of 32 frames for each direction. Where the size of a
    /// frame is known from the start their pages are taken as they are used; where the server tells it, 8 MiB at once.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn connect(&self) -> Result<Link, BrokerError> {
        self.connect_with(FRAME_MAX).await
    }

    /// As [`Self::connect`], for a connection that only publishes: with small frames it costs 2 MiB at most rather than 8.
    /// One that consumes cannot have them: the headers of a message come in one frame, as large as the publisher's
    /// connection allows.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub(crate) async fn connect_to_publish(&self) -> Result<Link, BrokerError> {
        self.connect_with(PUBLISHING_FRAME_MAX).await
    }

    /// A channel on the connection that the consumers of this process share; connects where there is none.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub(crate) async fn consuming_channel(&self) -> Result<Channel, BrokerError> {
        let mut shared = self.consuming.lock().await;
        if let Some(link) = &*shared
            && let Some(channel) = link.another_channel().await
        {
            return Ok(channel);
        }
        *shared = None;
        let link = self.connect().await?;
        let channel = link.channel().clone();
        *shared = Some(link);
        Ok(channel)
    }

    /// Declares the topology again, over the connection of the consumers: a queue was deleted.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn declare(&self) -> Result<(), BrokerError> {
        let channel = self.consuming_channel().await?;
        let declare = async {
            topology::declare(&channel).await?;
            Ok(channel.close(200, "declared".into()).await?)
        };
        within(CONNECT_TIMEOUT, declare).await
    }

    async fn connect_with(&self, frame_max: u32) -> Result<Link, BrokerError> {
        let mut failed = BrokerError::Timeout(CONNECT_TIMEOUT);
        for uri in self.uris.iter() {
            match within(CONNECT_TIMEOUT, self.connect_to(uri.clone(), frame_max)).await {
                Ok(link) => return Ok(link),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    async fn connect_to(&self, mut uri: AMQPUri, frame_max: u32) -> Result<Link, BrokerError> {
        let frame_max = *uri.query.frame_max.get_or_insert(frame_max);
        let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let cut = CancellationToken::new();
        // Whatever becomes of this attempt, its socket does not outlive it.
        let guard = cut.clone().drop_guard();
        let connection = transport::connect(uri, frame_max, properties, cut).await?;
        let channel = connection.create_channel().await?;
        topology::declare(&channel).await?;
        Ok(Link { channel, open: Some((connection, guard)) })
    }
}

async fn within<T>(limit: Duration, step: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
    tokio::time::timeout(limit, step).await.unwrap_or(Err(BrokerError::Timeout(limit)))
}

/// A connection with a channel on it. When it is dropped it is closed in the background, and after a while its socket is
/// cut: a broker that reads nothing (an alarm, a host that is gone) must not cost us a thread and a socket each time.
pub struct Link {
    channel: Channel,
    /// Until it is dropped.
    open: Option<(Connection, DropGuard)>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("connected", &self.is_connected()).finish_non_exhaustive()
    }
}

impl Link {
    /// The channel.
    #[must_use]
    pub const fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether connection and channel are up.
    #[must_use]
    pub(crate) fn is_connected(&self) -> bool {
        self.channel.status().connected() && self.open.as_ref().is_some_and(|(open, _)| open.status().connected())
    }

    /// Whether the broker has said that it reads nothing from this connection for now (a memory or disk alarm).
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.open.as_ref().is_some_and(|(open, _)| open.status().blocked())
    }

    /// One more channel on the same connection, where it is still good for one.
    async fn another_channel(&self) -> Option<Channel> {
        let (connection, _) = self.open.as_ref().filter(|(open, _)| open.status().connected())?;
        tokio::time::timeout(CONNECT_TIMEOUT, connection.create_channel()).await.ok()?.ok()
    }

    /// Closes it and waits until that is done, for a while.
    pub async fn close(mut self) {
        if let Some((connection, guard)) = self.open.take() {
            close(&connection).await;
            drop(guard);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let Some((connection, guard)) = self.open.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                close(&connection).await;
                drop(guard);
            });
        }
    }
}

/// Whether or not the broker answers: the socket is cut afterwards.
async fn close(connection: &Connection) {
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, connection.close(200, "bye".into())).await;
}
