//! Publishing with confirms. A connection of its own, so that a publisher that is blocked by the broker's alarms does
//! not hold up acknowledgements.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection};
use tokio::sync::Mutex;

use super::topology::QueueState;
use super::{Broker, BrokerError};

/// How long the broker may take to confirm a set of messages.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
const PERSISTENT: u8 = 2;

/// A message to be published.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The exchange; empty for the default one, which routes to the queue that the routing key names.
    pub exchange: &'static str,
    /// The routing key.
    pub routing_key: String,
    /// The body.
    pub body: Vec<u8>,
    /// Headers with text values.
    pub headers: Vec<(String, String)>,
    /// As the asker gave it.
    pub correlation_id: Option<String>,
    /// `application/json` unless it is a copy of something else.
    pub content_type: Option<String>,
}

impl Outgoing {
    /// A message to a queue.
    #[must_use]
    pub fn to_queue(queue: impl Into<String>, body: Vec<u8>) -> Self {
        Self {
            exchange: "",
            routing_key: queue.into(),
            body,
            headers: Vec::new(),
            correlation_id: None,
            content_type: Some("application/json".to_owned()),
        }
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn properties(&self) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        if let Some(content_type) = &self.content_type {
            properties = properties.with_content_type(short(content_type));
        }
        if let Some(correlation_id) = &self.correlation_id {
            properties = properties.with_correlation_id(short(correlation_id));
        }
        if !self.headers.is_empty() {
            let mut table = FieldTable::default();
            for (name, value) in &self.headers {
                table.insert(short(name), AMQPValue::LongString(value.as_str().into()));
            }
            properties = properties.with_headers(table);
        }
        properties
    }
}

/// AMQP's short strings hold 255 bytes.
pub(super) fn short(text: &str) -> ShortString {
    let mut end = text.len().min(255);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

/// Publishes; connects when it is first needed and again after a failure.
#[derive(Debug)]
pub struct Publisher {
    broker: Broker,
    link: Mutex<Option<(Connection, Channel)>>,
}

impl Publisher {
    /// Publishes to `broker`.
    #[must_use]
    pub fn new(broker: Broker) -> Self {
        Self { broker, link: Mutex::new(None) }
    }

    /// A channel in confirm mode.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn channel(&self) -> Result<Channel, BrokerError> {
        let mut link = self.link.lock().await;
        if let Some((connection, channel)) = &*link
            && connection.status().connected()
            && channel.status().connected()
        {
            return Ok(channel.clone());
        }
        *link = None;
        let (connection, channel) = self.broker.connect_to_publish().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        *link = Some((connection, channel.clone()));
        Ok(channel)
    }

    /// Publishes all and waits until the broker has confirmed all of them.
    ///
    /// # Errors
    /// [`BrokerError`]: some of the messages may have been taken all the same.
    pub async fn publish(&self, messages: &[Outgoing]) -> Result<(), BrokerError> {
        if messages.is_empty() {
            return Ok(());
        }
        let outcome = tokio::time::timeout(CONFIRM_TIMEOUT, self.publish_all(messages)).await;
        let outcome = outcome.unwrap_or(Err(BrokerError::Timeout(CONFIRM_TIMEOUT)));
        if outcome.as_ref().is_err_and(|error| !matches!(error, BrokerError::Refused)) {
            // Whatever is wrong with the channel, the next one begins with a new one. A full queue is no fault of it.
            *self.link.lock().await = None;
        }
        outcome
    }

    async fn publish_all(&self, messages: &[Outgoing]) -> Result<(), BrokerError> {
        let channel = self.channel().await?;
        let mut confirms = Vec::with_capacity(messages.len());
        for message in messages {
            let confirm = channel
                .basic_publish(
                    message.exchange.into(),
                    short(&message.routing_key),
                    BasicPublishOptions::default(),
                    &message.body,
                    message.properties(),
                )
                .await?;
            confirms.push(confirm);
        }
        let mut refused = false;
        for confirm in confirms {
            refused |= confirm.await?.is_nack();
        }
        if refused { Err(BrokerError::Refused) } else { Ok(()) }
    }

    /// The state of a queue.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn queue_state(&self, queue: &str) -> Result<QueueState, BrokerError> {
        let ask = async { Ok(super::topology::state(&self.channel().await?, queue).await?) };
        let outcome = tokio::time::timeout(CONFIRM_TIMEOUT, ask).await;
        outcome.unwrap_or(Err(BrokerError::Timeout(CONFIRM_TIMEOUT)))
    }

    /// Whether the connection is up; `false` before the first use.
    pub async fn is_connected(&self) -> bool {
        self.link.lock().await.as_ref().is_some_and(|(connection, _)| connection.status().connected())
    }
}
