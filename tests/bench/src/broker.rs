//! The publisher of the benchmark, the same for both sides, and queues for the raw programs.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer, ExchangeKind};
use lethe_broker::topology;

use crate::bench::Bench;
use crate::requests::Made;

/// Confirms that may be outstanding.
const WINDOW: usize = 1_000;
/// The raw programs' exchange and queue of requests.
pub(crate) const RAW_REQUESTS: &str = "raw.requests";
/// The raw programs' queue of wake-ups.
pub(crate) const RAW_WAKE_UPS: &str = "raw.wake-ups";

/// A connection and a channel in confirm mode.
pub(crate) struct Link {
    pub(crate) channel: Channel,
    user: String,
    _connection: Connection,
}

impl Link {
    pub(crate) async fn connect(bench: &Bench) -> Self {
        let connection = Connection::connect(&bench.world.amqp_url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { channel, user: bench.world.management.user(), _connection: connection }
    }

    /// Publishes requests as their controllers do, in turn: persistent, with confirms, of which some may be outstanding.
    pub(crate) async fn publish(&self, controllers: &[String], exchange: &str, to: Option<&str>, messages: &[Made]) {
        let senders: Vec<(String, BasicProperties)> = controllers
            .iter()
            .map(|controller| {
                let mut headers = FieldTable::default();
                headers.insert("controller-id".into(), AMQPValue::LongString(controller.as_str().into()));
                let mut properties = persistent()
                    .with_content_type("application/json".into())
                    .with_user_id(self.user.as_str().into())
                    .with_headers(headers);
                if let Some(reply_to) = to {
                    properties = properties.with_reply_to(reply_to.into()).with_correlation_id("bench".into());
                }
                (format!("{controller}.request"), properties)
            })
            .collect();
        let messages = messages.iter().zip(senders.iter().cycle());
        self.publish_all(
            exchange,
            messages.map(|(made, (key, properties))| (key.as_str(), made.body.as_slice(), properties)),
        )
        .await;
    }

    /// Publishes wake-ups into a queue.
    pub(crate) async fn wake(&self, queue: &str, name: &str, ids: &[i64]) {
        let bodies: Vec<Vec<u8>> = ids.iter().map(|id| format!(r#"{{"{name}":{id}}}"#).into_bytes()).collect();
        let properties = persistent();
        self.publish_all("", bodies.iter().map(|body| (queue, body.as_slice(), &properties))).await;
    }

    /// Publishes (routing key, body, properties) and waits until all are confirmed.
    async fn publish_all<'a>(
        &self,
        exchange: &str,
        messages: impl Iterator<Item = (&'a str, &'a [u8], &'a BasicProperties)>,
    ) {
        let mut confirms = std::collections::VecDeque::with_capacity(WINDOW);
        for (key, body, properties) in messages {
            if confirms.len() == WINDOW {
                let oldest = confirms.pop_front().unwrap();
                assert!(!confirmed(oldest).await.is_nack(), "the broker refused a message");
            }
            let options = BasicPublishOptions::default();
            let (exchange, key) = (exchange.into(), key.into());
            confirms
                .push_back(self.channel.basic_publish(exchange, key, options, body, properties.clone()).await.unwrap());
        }
        for confirm in confirms {
            assert!(!confirm.await.unwrap().is_nack(), "the broker refused a message");
        }
    }

    /// A quorum queue for wake-ups with the arguments of Lethe's own; emptied.
    pub(crate) async fn raw_queue(&self, name: &str) {
        self.declare(name, FieldTable::default()).await;
    }

    async fn declare(&self, name: &str, mut arguments: FieldTable) {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(4 << 30));
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(name.into(), options, arguments).await.unwrap();
        self.channel.queue_purge(name.into(), lapin::options::QueuePurgeOptions::default()).await.unwrap();
    }

    /// The raw programs' way of requests: a topic exchange and a queue, as Lethe has them.
    pub(crate) async fn raw_requests(&self) {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let none = FieldTable::default;
        self.channel.exchange_declare(RAW_REQUESTS.into(), ExchangeKind::Topic, options, none()).await.unwrap();
        let mut arguments = FieldTable::default();
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(14 * 86_400_000));
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("".into()));
        arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString("raw.dead".into()));
        self.declare(RAW_REQUESTS, arguments).await;
        let bind = self.channel.queue_bind(
            RAW_REQUESTS.into(),
            RAW_REQUESTS.into(),
            "*.request".into(),
            QueueBindOptions::default(),
            none(),
        );
        bind.await.unwrap();
    }

    /// A queue of our own for answers, and what arrives in it.
    pub(crate) async fn replies(&self) -> (String, Consumer) {
        let queue = self.channel.queue_declare("".into(), QueueDeclareOptions::exclusive(), FieldTable::default());
        let name = queue.await.unwrap().name().as_str().to_owned();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let consumer = self.channel.basic_consume(name.as_str().into(), "".into(), options, FieldTable::default());
        (name.clone(), consumer.await.unwrap())
    }

    /// Consumes a queue with acknowledgements.
    pub(crate) async fn consume(&self, queue: &str, prefetch: u16) -> Consumer {
        self.channel.basic_qos(prefetch, BasicQosOptions::default()).await.unwrap();
        let options = BasicConsumeOptions::default();
        self.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
    }

    /// Messages of a queue that are ready.
    pub(crate) async fn ready(&self, queue: &str) -> u32 {
        topology::state(&self.channel, queue).await.unwrap().ready
    }

    /// Waits until nothing of a queue is ready.
    pub(crate) async fn emptied(&self, queue: &str) {
        while self.ready(queue).await > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub(crate) fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

async fn confirmed(confirm: impl Future<Output = lapin::Result<Confirmation>>) -> Confirmation {
    confirm.await.unwrap()
}

/// Waits for so many messages.
pub(crate) async fn arrived(consumer: &mut Consumer, count: u64) {
    for _ in 0..count {
        consumer.next().await.unwrap().unwrap();
    }
}
