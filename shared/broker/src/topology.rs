//! Every exchange and queue, and the only place that spells their names (contract 3).

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use lethe_domain::request::Stage;

/// The topic exchange that controllers' messages are published to.
pub const REQUESTS: &str = "dsr.requests";
/// Takes what `REQUESTS` cannot route.
pub(crate) const UNROUTED: &str = "dsr.unrouted";
/// Messages that could not be accepted, with headers `error-code` and `error-message`.
pub const REJECTED: &str = "dsr.rejected";

/// A queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its name; its dead letters go to `<name>.dead`.
    pub name: &'static str,
    /// The routing keys of `REQUESTS` that lead here.
    pub bindings: &'static [&'static str],
    /// It holds bodies of requests: bounded in time and in size.
    pub holds_bodies: bool,
    /// One consumer at a time, so that messages are handled in the order of the queue.
    pub in_order: bool,
}

const fn intake_queue(name: &'static str, bindings: &'static [&'static str]) -> Queue {
    Queue { name, bindings, holds_bodies: true, in_order: false }
}

const fn wake_up_queue(name: &'static str) -> Queue {
    Queue { name, bindings: &[], holds_bodies: false, in_order: false }
}

/// Requests.
pub const IDENTITY_MATCHING: Queue = intake_queue("dsr.identity-matching", &["*.request"]);
/// Cancellations, apart from requests so that none waits behind a long queue; in order, so that a marker in the queue
/// tells that those before it are handled.
pub const CANCELLATION: Queue = Queue { in_order: true, ..intake_queue("dsr.cancellation", &["*.cancellation"]) };
/// Status and group queries, likewise apart.
pub const QUERY: Queue = intake_queue("dsr.query", &["*.status", "*.group"]);
/// Wake-ups for erasure slices.
pub const ERASURE_EXECUTION: Queue = wake_up_queue("dsr.erasure-execution");
/// Wake-ups for compilations.
pub const ACCESS_COMPILATION: Queue = wake_up_queue("dsr.access-compilation");
/// Wake-ups for endpoints with callbacks.
pub const CALLBACK_DELIVERY: Queue = wake_up_queue("dsr.callback-delivery");

/// Every queue that is consumed.
pub const QUEUES: [Queue; 6] =
    [IDENTITY_MATCHING, CANCELLATION, QUERY, ERASURE_EXECUTION, ACCESS_COMPILATION, CALLBACK_DELIVERY];

/// The queue of the wake-ups of a stage.
#[must_use]
pub const fn queue_of(stage: Stage) -> Queue {
    match stage {
        Stage::Erasure => ERASURE_EXECUTION,
        Stage::Compilation => ACCESS_COMPILATION,
    }
}

/// Names under this prefix are ours; nobody's answers go there.
pub const RESERVED_PREFIX: &str = "dsr.";

const FOURTEEN_DAYS_MS: i64 = 14 * 24 * 3_600 * 1_000;
const BODIES_LIMIT: i64 = 4 << 30;
const WAKE_UPS_LIMIT: i64 = 1 << 30;
/// So high that the broker never decides what is poison; attempts are counted in PostgreSQL.
const DELIVERY_LIMIT: i64 = 1_000_000;

/// The name of the queue for dead letters of `queue`.
#[must_use]
pub fn dead_letters_of(queue: &str) -> String {
    format!("{queue}.dead")
}

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert((*name).into(), value.clone());
    }
    table
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// A queue that is consumed refuses what it cannot hold: the publisher keeps it.
fn work_queue(queue: &Queue) -> FieldTable {
    let mut arguments = table(&[
        ("x-queue-type", text("quorum")),
        ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
        ("x-overflow", text("reject-publish")),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(&dead_letters_of(queue.name))),
        ("x-max-length-bytes", AMQPValue::LongLongInt(if queue.holds_bodies { BODIES_LIMIT } else { WAKE_UPS_LIMIT })),
    ]);
    if queue.in_order {
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    if queue.holds_bodies {
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(FOURTEEN_DAYS_MS));
    }
    arguments
}

/// A queue that keeps copies drops the oldest: it must never hold up what it keeps copies of.
fn keeping_queue(holds_bodies: bool) -> FieldTable {
    let mut arguments = table(&[
        ("x-queue-type", text("quorum")),
        // RabbitMQ 4 drops after 20 deliveries otherwise: looking at a letter must not cost it.
        ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
        ("x-max-length-bytes", AMQPValue::LongLongInt(BODIES_LIMIT)),
    ]);
    if holds_bodies {
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(FOURTEEN_DAYS_MS));
    }
    arguments
}

/// Declares everything. Declaring again changes nothing.
///
/// # Errors
/// What the broker says; `PRECONDITION_FAILED` where something of the same name was declared otherwise.
pub async fn declare(channel: &Channel) -> Result<(), lapin::Error> {
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(UNROUTED.into(), ExchangeKind::Fanout, durable, FieldTable::default()).await?;
    let alternate = table(&[("alternate-exchange", text(UNROUTED))]);
    channel.exchange_declare(REQUESTS.into(), ExchangeKind::Topic, durable, alternate).await?;
    let options = QueueDeclareOptions::durable();
    channel.queue_declare(REJECTED.into(), options, keeping_queue(true)).await?;
    bind(channel, REJECTED, UNROUTED, "").await?;
    for queue in &QUEUES {
        channel
            .queue_declare(dead_letters_of(queue.name).as_str().into(), options, keeping_queue(queue.holds_bodies))
            .await?;
        channel.queue_declare(queue.name.into(), options, work_queue(queue)).await?;
        for key in queue.bindings {
            bind(channel, queue.name, REQUESTS, key).await?;
        }
    }
    Ok(())
}

/// Removes a queue with all that it holds; it is declared again on the next connect.
///
/// # Errors
/// What the broker says.
pub async fn remove(channel: &Channel, queue: &str) -> Result<(), lapin::Error> {
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.map(drop)
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> Result<(), lapin::Error> {
    channel
        .queue_bind(queue.into(), exchange.into(), key.into(), QueueBindOptions::default(), FieldTable::default())
        .await
}

/// What the broker tells of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Messages that are ready; those in the hands of consumers do not count.
    pub ready: u32,
    /// Consumers.
    pub consumers: u32,
}

/// Asks for the state of a queue.
///
/// # Errors
/// What the broker says; `NOT_FOUND` where the queue is not declared.
pub async fn state(channel: &Channel, queue: &str) -> Result<QueueState, lapin::Error> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
    Ok(QueueState { ready: declared.message_count(), consumers: declared.consumer_count() })
}
