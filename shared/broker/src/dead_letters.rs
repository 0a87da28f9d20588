//! Looking at dead letters without removing them: messages are fetched but not acknowledged, and all that were not
//! removed go back when the channel closes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use lapin::Acker;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicGetOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::headers::{SET_ASIDE_AT, VERIFIED_USER, text_of};
use super::screen::UNREADABLE;
use super::topology::{self, QUEUES, REJECTED};
use super::{Broker, BrokerError, Link};
use lethe_domain::crypto::{Keys, hex};
use lethe_domain::request::ControllerId;

/// Headers that RabbitMQ puts on what it takes out of a queue.
const DEATHS: &str = "x-death";
const FIRST_DEATH: &str = "x-first-death-reason";

/// The queues that hold dead letters.
#[must_use]
pub fn queues() -> Vec<String> {
    let dead = QUEUES.iter().map(|queue| topology::dead_letters_of(queue.name));
    std::iter::once(REJECTED.to_owned()).chain(dead).collect()
}

/// Who set a message aside, as far as the broker vouches for it. What a message says of itself counts only where we wrote
/// it: a controller may put any header on a message of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetAsideBy {
    /// One of our processes. It had checked the sender, unless the cause is `forbidden` or `never_ended`.
    Us,
    /// The alternate exchange: no queue takes its routing key. Nobody has checked its sender.
    AlternateExchange,
    /// A queue of ours: it expired there, or it could not be read. Nobody has checked its sender.
    Queue,
}

/// A dead letter, or a rejected message.
#[derive(Debug)]
pub struct DeadLetter {
    /// Names it: a keyed digest of queue, routing key and body; the same wherever and whenever one looks.
    pub id: String,
    /// Where it lies.
    pub queue: String,
    /// Who set it aside.
    pub by: SetAsideBy,
    /// Why; `unrouted`, `expired` or `unreadable` where the broker set it aside.
    pub cause: String,
    /// A sentence without values.
    pub message: Option<String>,
    /// As it was published first. May hold whatever its publisher put there.
    pub routing_key: String,
    /// Whose, where that can be an id.
    pub controller_id: Option<ControllerId>,
    /// The property `user_id`, which the broker verified.
    pub user_id: Option<String>,
    /// When it became one; the broker does not say.
    pub set_aside_at: Option<Timestamp>,
    /// The body; personal data.
    pub body: Vec<u8>,
    acker: Acker,
}

impl DeadLetter {
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

/// What is known of a dead letter, by who made it one.
struct Label {
    by: SetAsideBy,
    cause: String,
    message: Option<String>,
    routing_key: String,
    controller_id: Option<String>,
    /// Of the message that it is a copy of.
    user_id: Option<String>,
    set_aside_at: Option<Timestamp>,
}

impl Label {
    fn of(delivery: &Delivery, queue: &str) -> Self {
        let empty = FieldTable::default();
        let headers = delivery.properties.headers().as_ref().unwrap_or(&empty).inner();
        let text = |name: &str| headers.get(name).and_then(text_of);
        // Through the default exchange come our own copies, and what the broker took out of a queue, which it marks.
        let (exchange, routing_key) = (delivery.exchange.as_str(), delivery.routing_key.as_str());
        if let Some(why) = text(UNREADABLE) {
            let by = if exchange.is_empty() { SetAsideBy::Queue } else { SetAsideBy::AlternateExchange };
            return Self::by_broker(by, "unreadable", Some(why), String::new());
        }
        if !exchange.is_empty() || routing_key != queue {
            return Self::by_broker(SetAsideBy::AlternateExchange, "unrouted", None, routing_key.to_owned());
        }
        if headers.contains_key(DEATHS) || headers.contains_key(FIRST_DEATH) {
            let cause = match text(FIRST_DEATH).as_deref() {
                // Consumers reject what they cannot read, and nothing else.
                Some("rejected") => "unreadable",
                Some("delivery_limit") => "delivery_limit",
                Some("maxlen") => "maxlen",
                _ => "expired",
            };
            return Self::by_broker(SetAsideBy::Queue, cause, None, first_routing_key(headers).unwrap_or_default());
        }
        Self {
            by: SetAsideBy::Us,
            cause: text("error-code").unwrap_or_else(|| "unknown".to_owned()),
            message: text("error-message"),
            routing_key: text("routing-key").unwrap_or_default(),
            controller_id: text("controller-id"),
            user_id: text(VERIFIED_USER),
            set_aside_at: text(SET_ASIDE_AT).and_then(|text| text.parse().ok()),
        }
    }

    /// The controller is the one in whose name the routing key speaks, where the broker shows that.
    fn by_broker(by: SetAsideBy, cause: &str, message: Option<String>, routing_key: String) -> Self {
        let speaks_for = routing_key.split('.').next().map(str::to_owned);
        let controller_id = speaks_for.filter(|_| by == SetAsideBy::AlternateExchange);
        Self { by, cause: cause.to_owned(), message, routing_key, controller_id, user_id: None, set_aside_at: None }
    }
}

/// The routing key with which a message came into the queue that it was taken out of.
fn first_routing_key(headers: &BTreeMap<ShortString, AMQPValue>) -> Option<String> {
    let Some(AMQPValue::FieldArray(deaths)) = headers.get(DEATHS) else { return None };
    let Some(AMQPValue::FieldTable(death)) = deaths.as_slice().first() else { return None };
    let Some(AMQPValue::FieldArray(keys)) = death.inner().get("routing-keys") else { return None };
    keys.as_slice().first().and_then(text_of)
}

/// Looks into queues, over one channel.
#[derive(Debug)]
pub struct Browser(Link);

impl Browser {
    /// Connects.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn open(broker: &Broker) -> Result<Self, BrokerError> {
        Ok(Self(broker.connect().await?))
    }

    /// The next letter of a queue that this browser has not seen.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn next(&self, queue: &str, keys: &Keys) -> Result<Option<DeadLetter>, BrokerError> {
        let got = self.0.channel().basic_get(queue.into(), BasicGetOptions { no_ack: false }).await?;
        let Some(delivery) = got.map(|got| got.delivery) else { return Ok(None) };
        let label = Label::of(&delivery, queue);
        Ok(Some(DeadLetter {
            id: hex(&keys.message_digest(queue, &label.routing_key, &delivery.data)).chars().take(16).collect(),
            queue: queue.to_owned(),
            by: label.by,
            cause: label.cause,
            message: label.message,
            controller_id: label.controller_id.and_then(|text| text.parse().ok()),
            user_id: label.user_id.or_else(|| Some(delivery.properties.user_id().as_ref()?.as_str().to_owned())),
            set_aside_at: label.set_aside_at,
            routing_key: label.routing_key,
            body: delivery.data,
            acker: delivery.acker,
        }))
    }

    /// Gives back what was not taken.
    pub async fn close(self) {
        self.0.close().await;
    }
}
