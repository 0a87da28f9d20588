//! Publishing with confirms. A connection of its own, so that a publisher that is blocked by the broker's alarms does
//! not hold up acknowledgements.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel};
use tokio::sync::Mutex;

use super::topology::QueueState;
use super::{Broker, BrokerError, Link};

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
    link: Mutex<Option<Arc<Link>>>,
}

impl Publisher {
    /// Publishes to `broker`.
    #[must_use]
    pub fn new(broker: Broker) -> Self {
        Self { broker, link: Mutex::new(None) }
    }

    /// A connection whose channel is in confirm mode. There is one at a time, and it is kept while the broker blocks it.
    async fn link(&self) -> Result<Arc<Link>, BrokerError> {
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_connected()) {
            return if link.is_blocked() { Err(BrokerError::Blocked) } else { Ok(link.clone()) };
        }
        *slot = None;
        let link = Arc::new(self.broker.connect_to_publish().await?);
        let confirm = link.channel().confirm_select(ConfirmSelectOptions::default());
        tokio::time::timeout(CONFIRM_TIMEOUT, confirm).await.map_err(|_| BrokerError::Timeout(CONFIRM_TIMEOUT))??;
        *slot = Some(link.clone());
        Ok(link)
    }

    /// Publishes all and waits until the broker has confirmed all of them.
    ///
    /// # Errors
    /// [`BrokerError`]: some of the messages may have been taken all the same.
    pub async fn publish(&self, messages: &[Outgoing]) -> Result<(), BrokerError> {
        if messages.is_empty() {
            return Ok(());
        }
        let link = self.link().await?;
        self.answered(&link, Self::publish_all(link.channel(), messages)).await
    }

    /// Waits for an answer, for a while. Without one the next caller begins with a new connection, unless the broker has
    /// blocked this one: another would be blocked as well, and the broker keeps every one of them.
    async fn answered<T>(
        &self,
        link: &Arc<Link>,
        step: impl Future<Output = Result<T, BrokerError>>,
    ) -> Result<T, BrokerError> {
        let outcome = tokio::time::timeout(CONFIRM_TIMEOUT, step).await;
        let outcome = outcome.unwrap_or(Err(BrokerError::Timeout(CONFIRM_TIMEOUT)));
        match outcome {
            // The connection is sound: it is the queue that is full.
            Ok(_) | Err(BrokerError::Refused) => outcome,
            Err(_) if link.is_connected() && link.is_blocked() => Err(BrokerError::Blocked),
            Err(error) => {
                // Somebody else may have connected again meanwhile.
                let mut slot = self.link.lock().await;
                if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, link)) {
                    *slot = None;
                }
                Err(error)
            }
        }
    }

    async fn publish_all(channel: &Channel, messages: &[Outgoing]) -> Result<(), BrokerError> {
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
        let link = self.link().await?;
        self.answered(&link, async { Ok(super::topology::state(link.channel(), queue).await?) }).await
    }
}
