//! Connections to RabbitMQ. We supervise them ourselves: whoever needs one asks again when it broke.

use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties};

use super::topology;
use crate::config::ConfigError;
use crate::disposition::Disposition;

/// How long a connection may take, handshake and topology included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

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
    /// The broker refused a message: a queue is full.
    #[error("RabbitMQ refused a message: a queue is full")]
    Refused,
}

impl BrokerError {
    /// Whether waiting helps.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Amqp { source } if matches!(source.kind(), lapin::ErrorKind::ProtocolError(_)) => {
                Disposition::Permanent
            }
            _ => Disposition::Transient,
        }
    }
}

/// Where the broker is.
#[derive(Clone)]
pub struct Broker {
    uri: AMQPUri,
    name: String,
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
        // lapin keeps buffers of 32 frames for each direction: at the broker's 128 KiB that would be 8 MiB a connection.
        uri.query.frame_max.get_or_insert(32 * 1024);
        Ok(Self { uri, name: name.to_owned() })
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    /// Connects once and declares the topology.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn connect(&self) -> Result<(Connection, Channel), BrokerError> {
        let connect = async {
            let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());

            let connection = Connection::connect_uri(self.uri.clone(), properties).await?;
            let channel = connection.create_channel().await?;
            topology::declare(&channel).await?;
            Ok((connection, channel))
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect).await.map_err(|_| BrokerError::Timeout(CONNECT_TIMEOUT))?
    }
}
