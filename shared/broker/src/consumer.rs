//! Consuming in groups: gather deliveries, hand them over, acknowledge what came of them. The one place that
//! acknowledges.
//!
//! **Invariant** (DESIGN rule 8): handlers return outcomes, and only this module acknowledges.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::FieldTable;
use tokio_util::sync::CancellationToken;

use super::headers::{SET_ASIDE_AT, VERIFIED_USER, text_of};
use super::publisher::{Outgoing, Publisher};
use super::topology::{self, Queue, dead_letters_of};
use super::{Broker, BrokerError, screen};
use lethe_domain::group::Group;
use lethe_process::fault;
use lethe_process::health::Health;
use lethe_process::reconnect::Reconnect;

/// How long a call on a channel may take; two of them, one after the other, fit into the drain of a worker.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A consumer that receives nothing for this long checks whether it is still registered. If messages are ready and it
/// is passed over twice, it is not.
const LISTEN_AGAIN: Duration = Duration::from_secs(8);

/// How long a message waits of which a handler has said nothing.
const FORGOTTEN: Duration = Duration::from_secs(1);

/// A delivered message.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// Where it was published to; empty for the default exchange.
    pub exchange: String,
    /// As it was published.
    pub routing_key: String,
    /// The body.
    pub body: Vec<u8>,
    /// The property `user_id`, which the broker has verified.
    pub user_id: Option<String>,
    /// Where an answer goes.
    pub reply_to: Option<String>,
    /// What an answer carries.
    pub correlation_id: Option<String>,
    /// The header `controller-id`, a text or an integer.
    pub controller_id: Option<String>,
    /// The property `content_type`.
    pub content_type: Option<String>,
    /// It was delivered before, and not acknowledged.
    pub redelivered: bool,
}

impl From<&mut Delivery> for Message {
    fn from(delivery: &mut Delivery) -> Self {
        let properties = &delivery.properties;
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(|text| text.as_str().to_owned());
        let header = properties.headers().as_ref().and_then(|table| text_of(table.inner().get("controller-id")?));
        Self {
            exchange: delivery.exchange.as_str().to_owned(),
            routing_key: delivery.routing_key.as_str().to_owned(),
            user_id: text(properties.user_id()),
            reply_to: text(properties.reply_to()),
            correlation_id: text(properties.correlation_id()),
            content_type: text(properties.content_type()),
            controller_id: header,
            redelivered: delivery.redelivered,
            body: std::mem::take(&mut delivery.data),
        }
    }
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Whatever it asked for is durable, or needs nothing: acknowledge.
    Done,
    /// Nothing happened; deliver it again after a while.
    RetryAfter(Duration),
    /// This very message failed, and its neighbours did not: try it again, a bounded number of times. The counter
    /// (`lethe_runtime::poison::Counted`) turns it into one of the other outcomes.
    Poison {
        /// A short class.
        code: String,
        /// A sentence without values.
        reason: String,
    },
    /// It can never succeed: keep it in `<queue>.dead` with the reason, then acknowledge.
    DeadLetter {
        /// A short class, for the header `error-code`.
        code: String,
        /// A sentence without values, for the header `error-message`.
        reason: String,
    },
}

impl Outcome {
    const fn name(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::RetryAfter(_) => "retry",
            Self::Poison { .. } => "poison",
            Self::DeadLetter { .. } => "dead_letter",
        }
    }
}

/// A call on a channel, with a limit: one that is made while its connection breaks may never be answered, and the consumer
/// would neither connect again nor stop.
async fn answered<T>(call: impl Future<Output = lapin::Result<T>>) -> Result<T, BrokerError> {
    Ok(tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| BrokerError::Timeout(CALL_TIMEOUT))??)
}

/// Handles groups of messages.
pub trait GroupHandler: Send + Sync {
    /// One outcome for each message, in order. Must not panic; must not lose an outcome.
    fn handle(&self, group: &[Message]) -> impl Future<Output = Vec<Outcome>> + Send;
}

/// How deliveries are gathered into groups.
#[derive(Clone, Copy, Debug)]
pub struct Gather {
    /// Messages of a group at most.
    pub messages: usize,
    /// Bytes of a group at most; a single message may be larger.
    pub bytes: usize,
    /// How long to wait for more after the first, while messages come in groups: one that comes alone is handled at once.
    pub linger: Duration,
}

impl Gather {
    /// One message at a time.
    pub const SINGLE: Self = Self { messages: 1, bytes: usize::MAX, linger: Duration::ZERO };
}

/// A supervised consumer of one queue.
#[derive(Debug)]
pub struct Consumer<H> {
    /// Where.
    pub broker: Broker,
    /// What.
    pub queue: Queue,
    /// Unacknowledged deliveries at most.
    pub prefetch: u16,
    /// How groups are made.
    pub gather: Gather,
    /// Who handles them.
    pub handler: Arc<H>,
    /// For dead letters.
    pub publisher: Arc<Publisher>,
    /// Told whether the consumer is connected.
    pub health: Health,
}

/// A message, and what came of it.
struct Handled {
    delivery: Delivery,
    message: Message,
    outcome: Outcome,
}

impl<H: GroupHandler> Consumer<H> {
    /// Consumes until `shutdown`; connects again whenever the connection, the channel or the consumer ends. The group
    /// in hand is finished; deliveries that were not begun go back to the queue.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut reconnect = Reconnect::default();
        while !shutdown.is_cancelled() {
            let connected = self.health.component(self.queue.name);
            match self
                .consume(&shutdown, || {
                    connected.set(true);
                    tracing::info!(queue = self.queue.name, "consuming");
                })
                .await
            {
                Ok(()) => break,
                // The handler said why; it has waited already.
                Err(BrokerError::OutOfOrder) => tracing::debug!(queue = self.queue.name, "delivered again in order"),
                Err(error) => {
                    if connected.set(false) {
                        reconnect = Reconnect::default();
                    }
                    if matches!(error, BrokerError::ConsumerCancelled) || error.is_not_found() {
                        if fault::defect("deaf_consumers") {
                            shutdown.cancelled().await;
                        }
                        self.declare_again().await;
                    }
                    if reconnect.is_first() {
                        tracing::warn!(queue = self.queue.name, %error, "consuming has stopped; trying again until it works");
                    } else if error.is_internal() && !self.queue.holds_bodies {
                        self.make_anew().await;
                    }
                    tokio::select! {
                        () = reconnect.wait() => {}
                        () = shutdown.cancelled() => break,
                    }
                }
            }
        }
    }

    /// Somebody has deleted a queue: until it is there again publishers lose what they send to it.
    async fn declare_again(&self) {
        match self.broker.declare().await {
            Ok(()) => tracing::warn!(queue = self.queue.name, "a queue was deleted; it was declared again"),
            Err(error) => tracing::debug!(queue = self.queue.name, %error, "a queue could not be declared again"),
        }
    }

    /// What a queue of wake-ups held is known to PostgreSQL; one that RabbitMQ has lost is in the way, and nothing else.
    async fn make_anew(&self) {
        tracing::warn!(
            queue = self.queue.name,
            "RabbitMQ has lost all of this wake-up queue but its name: creating it again"
        );
        let removed = async {
            let link = self.broker.connect_to_publish().await?;
            Ok::<_, BrokerError>(topology::remove(link.channel(), self.queue.name).await?)
        };
        if let Err(error) = removed.await {
            tracing::debug!(queue = self.queue.name, %error, "the queue could not be removed");
        }
    }

    async fn consume(&self, shutdown: &CancellationToken, started: impl FnOnce()) -> Result<(), BrokerError> {
        let channel = tokio::select! {
            channel = self.broker.consuming_channel() => channel?,
            () = shutdown.cancelled() => return Ok(()),
        };
        answered(channel.basic_qos(self.prefetch, BasicQosOptions::default())).await?;
        let acknowledging = BasicConsumeOptions { no_ack: fault::defect("ack_before_commit"), ..Default::default() };
        let consuming = channel.basic_consume(self.queue.name.into(), "".into(), acknowledging, FieldTable::default());
        let mut deliveries = answered(consuming).await?;
        started();
        let (mut linger, mut deaf) = (Duration::ZERO, false);
        loop {
            let first = tokio::select! {
                first = tokio::time::timeout(LISTEN_AGAIN, deliveries.next()) => first,
                () = shutdown.cancelled() => {
                    // Closing gives back what was not begun.
                    let _ = answered(channel.close(200, "shutting down".into())).await;
                    return Ok(());
                }
            };
            let Ok(first) = first else {
                // A queue that is deleted and at once declared again by somebody else may take its consumers along
                // without a word.
                let state = answered(topology::state(&channel, self.queue.name)).await?;
                let passed_over = state.ready > 0 && !self.queue.in_order;
                if state.consumers == 0 || (passed_over && deaf) {
                    let _ = answered(channel.close(200, "heard nothing".into())).await;
                    return Err(BrokerError::ConsumerCancelled);
                }
                deaf = passed_over;
                continue;
            };
            deaf = false;
            // The stream ends when the broker cancels the consumer, for instance because the queue was deleted.
            let Some(first) = first else { return Err(BrokerError::ConsumerCancelled) };
            let mut group = vec![first?];
            self.gather_more(&mut group, &mut deliveries, linger).await?;
            linger = if group.len() > 1 { self.gather.linger } else { Duration::ZERO };
            if let Err(error) = self.handle(group, shutdown).await {
                let _ = answered(channel.close(200, "giving back what was not handled".into())).await;
                return Err(error);
            }
        }
    }

    async fn gather_more(
        &self,
        group: &mut Vec<Delivery>,
        deliveries: &mut lapin::Consumer,
        linger: Duration,
    ) -> Result<(), BrokerError> {
        let deadline = tokio::time::Instant::now() + linger;
        let mut bytes: usize = group.iter().map(|delivery| delivery.data.len()).sum();
        while group.len() < self.gather.messages && bytes < self.gather.bytes {
            match tokio::time::timeout_at(deadline, deliveries.next()).await {
                Ok(Some(delivery)) => {
                    let delivery = delivery?;
                    bytes += delivery.data.len();
                    group.push(delivery);
                }
                Ok(None) | Err(_) => break,
            }
        }
        Ok(())
    }

    /// Leaves what cannot be read to the broker, which keeps it unchanged in the queue of dead letters.
    async fn reject_unreadable(&self, group: Vec<Delivery>) -> Result<Vec<Delivery>, BrokerError> {
        let (unreadable, group): (Vec<_>, Vec<_>) = group.into_iter().partition(screen::is_unreadable);
        for delivery in &unreadable {
            metrics::counter!("lethe_unreadable_messages_total", "queue" => self.queue.name).increment(1);
            tracing::warn!(queue = self.queue.name, "a message cannot be read and was dead-lettered");
            answered(delivery.acker.reject(BasicRejectOptions { requeue: false })).await?;
        }
        Ok(group)
    }

    async fn handle(&self, group: Vec<Delivery>, shutdown: &CancellationToken) -> Result<(), BrokerError> {
        let started = Instant::now();
        let mut group = self.reject_unreadable(group).await?;
        if group.is_empty() {
            return Ok(());
        }
        let messages: Vec<Message> = group.iter_mut().map(Message::from).collect();
        let outcomes = self.handler.handle(&messages).await;
        metrics::histogram!("lethe_group_size", "queue" => self.queue.name)
            .record(f64::from(u32::try_from(messages.len()).unwrap_or(u32::MAX)));
        metrics::histogram!("lethe_handling_seconds", "queue" => self.queue.name)
            .record(started.elapsed().as_secs_f64());
        // What the handler says nothing about is tried again.
        let handled: Vec<Handled> = Group::new(group.into_iter().zip(messages))
            .with(outcomes, |(delivery, message)| Handled {
                delivery,
                message,
                outcome: Outcome::RetryAfter(FORGOTTEN),
            })
            .settle(|((delivery, message), outcome)| Handled { delivery, message, outcome });
        for one in &handled {
            metrics::counter!("lethe_deliveries_total", "queue" => self.queue.name, "outcome" => one.outcome.name())
                .increment(1);
        }
        let dead: Vec<Outgoing> =
            handled.iter().filter_map(|one| self.dead_letter(&one.message, &one.outcome)).collect();
        self.publisher.publish(&dead).await?;
        fault::point("consumer.before_ack");
        self.acknowledge(&handled, shutdown).await
    }

    fn dead_letter(&self, message: &Message, outcome: &Outcome) -> Option<Outgoing> {
        // Poison that nobody counted is dead-lettered at once.
        let (Outcome::DeadLetter { code, reason } | Outcome::Poison { code, reason }) = outcome else { return None };
        tracing::warn!(queue = self.queue.name, code, "a message was dead-lettered");
        let mut letter = Outgoing::to_queue(dead_letters_of(self.queue.name), message.body.clone())
            .header("error-code", code.clone())
            .header("error-message", reason.clone())
            .header("routing-key", message.routing_key.clone())
            .header(SET_ASIDE_AT, jiff::Timestamp::now().to_string());
        letter.content_type.clone_from(&message.content_type);
        if let Some(user) = &message.user_id {
            letter = letter.header(VERIFIED_USER, user.clone());
        }
        if let Some(controller_id) = message.controller_id.as_ref().filter(|id| id.len() <= 64) {
            letter = letter.header("controller-id", controller_id.clone());
        }
        Some(letter)
    }

    async fn acknowledge(&self, group: &[Handled], shutdown: &CancellationToken) -> Result<(), BrokerError> {
        let Some(last) = group.last().filter(|_| !fault::defect("ack_before_commit")) else { return Ok(()) };
        let wait = group.iter().filter_map(|one| match one.outcome {
            Outcome::RetryAfter(wait) => Some(wait),
            _ => None,
        });
        let Some(wait) = wait.max() else {
            // We are alone on this channel and work on one group at a time: the last tag covers them all.
            answered(last.delivery.acker.ack(BasicAckOptions { multiple: true })).await?;
            return Ok(());
        };
        for Handled { delivery, outcome, .. } in group {
            if !matches!(outcome, Outcome::RetryAfter(_)) {
                answered(delivery.acker.ack(BasicAckOptions { multiple: false })).await?;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => {}
        }
        if self.queue.in_order {
            // What was delivered behind these must not be handled before them: with the channel, all of it goes back
            // to the queue, in its order.
            return Err(BrokerError::OutOfOrder);
        }
        for Handled { delivery, outcome, .. } in group {
            if matches!(outcome, Outcome::RetryAfter(_)) {
                answered(delivery.acker.nack(BasicNackOptions { multiple: false, requeue: true })).await?;
            }
        }
        Ok(())
    }
}
