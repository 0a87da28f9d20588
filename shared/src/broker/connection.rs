//! Connections to RabbitMQ. We supervise them ourselves: whoever needs one asks again when it broke.

use std::sync::Arc;
use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::sync::Mutex;

use super::topology;
use crate::config::ConfigError;
use crate::disposition::Disposition;

/// How long a connection may take, handshake and topology included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of a frame at most, unless the URL says otherwise: RabbitMQ's own default.
const FRAME_MAX: u32 = 128 * 1024;

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
    #[error("messages could not be handled and are delivered again in order")]
    OutOfOrder,
    /// The broker refused a message: a queue is full.
    #[error("RabbitMQ refused a message: a queue is full")]
    Refused,
}

impl BrokerError {
    /// A message that the client library cannot read (a short text that is no UTF-8) ended the connection. It is not
    /// taken by that, and comes again.
    #[must_use]
    pub fn is_unreadable_message(&self) -> bool {
        matches!(self, Self::Amqp { source } if matches!(source.kind(), ErrorKind::ParsingError(_)))
    }

    /// The broker failed by itself. RabbitMQ answers so to whoever consumes from a quorum queue of which it has kept the
    /// name and nothing else: its files are damaged, or it was killed in the moment after it had made the queue.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        let Self::Amqp { source } = self else { return false };
        let ErrorKind::ProtocolError(error) = source.kind() else { return false };
        *error.kind() == AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR)
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
    uri: AMQPUri,
    name: String,
    /// The connection that all consumers of this process share.
    consuming: Arc<Mutex<Option<Connection>>>,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Broker({}:{})", self.uri.authority.host, self.uri.authority.port)
    }
}

impl Broker {
    /// The broker at `url`; `name` is shown in its management pages.
    ///
    /// # Errors
    /// [`ConfigError`] where `url` cannot be used.
    pub fn new(url: &str, name: &str) -> Result<Self, ConfigError> {
        let invalid = |what: &str| ConfigError::new("AMQP_URL", what);
        let mut uri: AMQPUri =
            url.parse().map_err(|_| invalid("must be a URL such as amqp://user:password@host:5672/%2f"))?;
        // Without a heartbeat a connection that was cut silently looks alive for hours.
        uri.query.heartbeat.get_or_insert(20);
        Ok(Self { uri, name: name.to_owned(), consuming: Arc::default() })
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    /// Connects once and declares the topology. lapin keeps buffers of 32 frames for each direction. Where the size of a
    /// frame is known from the start their pages are taken as they are used; where the server tells it, 8 MiB at once.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn connect(&self) -> Result<(Connection, Channel), BrokerError> {
        let mut uri = self.uri.clone();
        uri.query.frame_max.get_or_insert(FRAME_MAX);
        self.connect_to(uri).await
    }

    /// As [`Self::connect`], for a connection that only publishes: with small frames it costs 2 MiB at most rather than 8.
    /// One that consumes cannot have them: the headers of a message come in one frame, as large as the publisher's
    /// connection allows.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn connect_to_publish(&self) -> Result<(Connection, Channel), BrokerError> {
        let mut uri = self.uri.clone();
        uri.query.frame_max.get_or_insert(32 * 1024);
        self.connect_to(uri).await
    }

    /// A channel on the connection that the consumers of this process share; connects where there is none.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn consuming_channel(&self) -> Result<Channel, BrokerError> {
        let mut shared = self.consuming.lock().await;
        if let Some(connection) = &*shared
            && connection.status().connected()
        {
            let channel = tokio::time::timeout(CONNECT_TIMEOUT, connection.create_channel()).await;
            if let Ok(Ok(channel)) = channel {
                return Ok(channel);
            }
        }
        *shared = None;
        let (connection, channel) = self.connect().await?;
        *shared = Some(connection);
        Ok(channel)
    }

    async fn connect_to(&self, uri: AMQPUri) -> Result<(Connection, Channel), BrokerError> {
        let connect = async {
            let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
            let connection = Connection::connect_uri(uri, properties).await?;
            let channel = connection.create_channel().await?;
            topology::declare(&channel).await?;
            Ok((connection, channel))
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect).await.map_err(|_| BrokerError::Timeout(CONNECT_TIMEOUT))?
    }
}
