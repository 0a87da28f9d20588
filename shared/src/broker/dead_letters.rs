//! Looking at what was set aside, without taking it: messages are got and not acknowledged, and all that was not taken
//! goes back when the channel closes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use lapin::options::{BasicAckOptions, BasicGetOptions};
use lapin::types::AMQPValue;
use lapin::{Acker, Channel, Connection};

use super::topology::{self, QUEUES, REJECTED};
use super::{Broker, BrokerError};
use crate::crypto::{Keys, hex};
use crate::request::ControllerId;

/// The header that says when a message was set aside.
pub const SET_ASIDE_AT: &str = "set-aside-at";

/// The queues that hold what was set aside.
#[must_use]
pub fn queues() -> Vec<String> {
    let dead = QUEUES.iter().map(|queue| topology::dead_letters_of(queue.name));
    std::iter::once(REJECTED.to_owned()).chain(dead).collect()
}

/// A message that was set aside.
#[derive(Debug)]
pub struct Letter {
    /// Names it: a keyed digest of queue, routing key and body; the same wherever and whenever one looks.
    pub id: String,
    /// Where it lies.
    pub queue: String,
    /// Why; `unrouted` or `expired` where the broker set it aside.
    pub cause: String,
    /// A sentence without values.
    pub message: Option<String>,
    /// As it was published first. May hold whatever its publisher put there.
    pub routing_key: String,
    /// Whose, where that can be an id.
    pub controller_id: Option<ControllerId>,
    /// The property `user_id`, which the broker verified; our own copies have none.
    pub user_id: Option<String>,
    /// When it was set aside; the broker does not say.
    pub set_aside_at: Option<Timestamp>,
    /// The body; personal data.
    pub body: Vec<u8>,
    acker: Acker,
}

impl Letter {
    /// Takes it out of its queue.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn take(&self) -> Result<(), BrokerError> {
        self.acker.ack(BasicAckOptions { multiple: false }).await?;
        Ok(())
    }

    /// The second word of the routing key, where it is one that we know.
    #[must_use]
    pub fn kind(&self) -> Option<&'static str> {
        let kind = self.routing_key.split('.').next_back();
        ["request", "cancellation", "status", "group"].into_iter().find(|one| Some(*one) == kind)
    }
}

/// Looks into queues, over one channel.
#[derive(Debug)]
pub struct Browser {
    connection: Connection,
    channel: Channel,
}

impl Browser {
    /// Connects.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn open(broker: &Broker) -> Result<Self, BrokerError> {
        let (connection, channel) = broker.connect().await?;
        Ok(Self { connection, channel })
    }

    /// The next letter of a queue that this browser has not seen.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn next(&self, queue: &str, keys: &Keys) -> Result<Option<Letter>, BrokerError> {
        let Some(got) = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: false }).await? else {
            return Ok(None);
        };
        let delivery = got.delivery;
        let properties = &delivery.properties;
        let headers: BTreeMap<String, String> = properties
            .headers()
            .iter()
            .flat_map(lapin::types::FieldTable::inner)
            .filter_map(|(name, value)| {
                let text = match value {
                    AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok()?.to_owned(),
                    AMQPValue::ShortString(text) => text.as_str().to_owned(),
                    _ => return None,
                };
                Some((name.as_str().to_owned(), text))
            })
            .collect();
        let header = |name: &str| headers.get(name).cloned();
        let by_broker = if headers.contains_key("x-first-death-reason") { "expired" } else { "unrouted" };
        let routing_key = header("routing-key").unwrap_or_else(|| delivery.routing_key.as_str().to_owned());
        Ok(Some(Letter {
            id: hex(&keys.message_digest(queue, &routing_key, &delivery.data)).chars().take(16).collect(),
            queue: queue.to_owned(),
            cause: header("error-code").unwrap_or_else(|| by_broker.to_owned()),
            message: header("error-message"),
            controller_id: header("controller-id").and_then(|text| text.parse().ok()),
            user_id: properties.user_id().as_ref().map(|user| user.as_str().to_owned()),
            set_aside_at: header(SET_ASIDE_AT).and_then(|text| text.parse().ok()),
            routing_key,
            body: delivery.data,
            acker: delivery.acker,
        }))
    }

    /// Gives back what was not taken.
    pub async fn close(self) {
        let _ = self.channel.close(200, "looked".into()).await;
        let _ = self.connection.close(200, "looked".into()).await;
    }
}
