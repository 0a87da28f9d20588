//! A controller's side of RabbitMQ: publishes with confirms, and reads the answers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::signing;
use crate::wait::{patiently, seconds};
use crate::world::World;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// As the gateway would give it.
    pub status: u16,
    /// All headers, as text.
    pub headers: HashMap<String, String>,
    /// The bytes that were signed.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Whether the signature is over exactly this body; `header` is `X-OpenDSR-Signature` or that of version 1.
    pub fn is_signed(&self, header: &str) -> bool {
        let signature = self.headers.get(header);
        signature.is_some_and(|text| {
            signing::verifies(lethe_domain::signature_algorithm::SignatureAlgorithm::RsaPkcs1v15, text, &self.body)
        })
    }
}

/// A message to be sent; the usual properties unless changed.
#[derive(Clone, Debug)]
pub struct Sending {
    /// `<controller>.request` and so on.
    pub routing_key: String,
    /// The header `controller-id`.
    pub controller_id: Option<String>,
    /// The property `user_id`.
    pub user_id: Option<String>,
    /// Where the answer goes; our own queue where it is asked for.
    pub reply_to: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// A connection of a controller.
pub struct Publisher {
    channel: Channel,
    replies: String,
    user: String,
    waiting: Arc<Mutex<HashMap<String, oneshot::Sender<Answer>>>>,
    _connection: Connection,
}

type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Answer>>>>;

impl Publisher {
    /// Connects to the virtual host of a world and declares the topology, as `lethe migrate` would.
    pub async fn connect(world: &World) -> Self {
        let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        lethe_broker::topology::declare(&channel).await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let queue =
            channel.queue_declare("".into(), QueueDeclareOptions::exclusive(), FieldTable::default()).await.unwrap();
        let replies = queue.name().as_str().to_owned();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let mut answers =
            channel.basic_consume(replies.as_str().into(), "".into(), options, FieldTable::default()).await.unwrap();
        let waiting: Waiting = Arc::default();
        let table = waiting.clone();
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = answers.next().await {
                let correlation = delivery.properties.correlation_id().as_ref().map(|id| id.as_str().to_owned());
                let sender = correlation.and_then(|id| table.lock().unwrap().remove(&id));
                if let Some(sender) = sender {
                    let _ = sender.send(read_answer(&delivery));
                }
            }
        });
        Self { channel, replies, user: world.management.user(), waiting, _connection: connection }
    }

    /// A message as a well-behaved controller sends it; `kind` is the second word of the routing key.
    pub fn sending(&self, controller: &str, kind: &str, body: impl Into<Vec<u8>>) -> Sending {
        Sending {
            routing_key: format!("{controller}.{kind}"),
            controller_id: Some(controller.to_owned()),
            user_id: Some(self.user.clone()),
            reply_to: None,
            body: body.into(),
        }
    }

    async fn publish(&self, sending: &Sending, correlation: Option<&str>) -> lapin::Confirmation {
        self.begin(sending, correlation).await.await.unwrap()
    }

    async fn begin(
        &self,
        sending: &Sending,
        correlation: Option<&str>,
    ) -> impl Future<Output = lapin::Result<lapin::Confirmation>> + use<> {
        let mut properties =
            BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
        if let Some(user) = &sending.user_id {
            properties = properties.with_user_id(user.as_str().into());
        }
        if let Some(reply_to) = &sending.reply_to {
            properties = properties.with_reply_to(reply_to.as_str().into());
        }
        if let Some(correlation) = correlation {
            properties = properties.with_correlation_id(correlation.into());
        }
        if let Some(controller) = &sending.controller_id {
            let mut headers = FieldTable::default();
            headers.insert("controller-id".into(), AMQPValue::LongString(controller.as_str().into()));
            properties = properties.with_headers(headers);
        }
        let key = sending.routing_key.as_str().into();
        let options = BasicPublishOptions::default();
        self.channel.basic_publish("dsr.requests".into(), key, options, &sending.body, properties).await.unwrap()
    }

    /// Publishes and waits for the confirm.
    pub async fn send(&self, sending: &Sending) {
        assert!(!self.publish(sending, None).await.is_nack(), "the broker refused a message");
    }

    /// Publishes all before it waits for the confirms of all.
    pub async fn send_all(&self, all: &[Sending]) {
        let mut confirms = Vec::with_capacity(all.len());
        for sending in all {
            confirms.push(self.begin(sending, None).await);
        }
        for confirm in confirms {
            assert!(!confirm.await.unwrap().is_nack(), "the broker refused a message");
        }
    }

    /// Publishes and waits for the answer.
    pub async fn ask(&self, sending: &Sending) -> Answer {
        self.ask_within(sending, seconds(20)).await
    }

    /// Publishes and waits so long for the answer.
    pub async fn ask_within(&self, sending: &Sending, limit: Duration) -> Answer {
        let receiver = self.begin_asking(sending).await;
        let answer = tokio::time::timeout(patiently(limit), receiver).await;
        answer.unwrap_or_else(|_| panic!("no answer within {limit:?} to {}", sending.routing_key)).unwrap()
    }

    /// Publishes; the answer comes by the receiver.
    pub async fn begin_asking(&self, sending: &Sending) -> oneshot::Receiver<Answer> {
        let correlation = uuid::Uuid::new_v4().to_string();
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().insert(correlation.clone(), sender);
        let sending = Sending { reply_to: Some(self.replies.clone()), ..sending.clone() };
        assert!(!self.publish(&sending, Some(&correlation)).await.is_nack(), "the broker refused a message");
        receiver
    }

    /// Asks for a request and expects 201.
    pub async fn request(&self, controller: &str, body: impl Into<Vec<u8>>) -> Answer {
        let answer = self.ask(&self.sending(controller, "request", body)).await;
        assert_eq!(answer.status, 201, "{}", answer.json());
        answer
    }

    /// Asks to cancel a request.
    pub async fn cancel(&self, controller: &str, id: &str) -> Answer {
        let body = serde_json::json!({ "subject_request_id": id }).to_string();
        self.ask(&self.sending(controller, "cancellation", body)).await
    }

    /// Asks for the status of a request.
    pub async fn status(&self, controller: &str, id: &str) -> Answer {
        let body = serde_json::json!({ "subject_request_id": id }).to_string();
        self.ask(&self.sending(controller, "status", body)).await
    }
}

/// An answer out of its message.
pub fn read_answer(delivery: &lapin::message::Delivery) -> Answer {
    let table = delivery.properties.headers().clone().unwrap_or_default();
    let headers: HashMap<String, String> = table
        .inner()
        .iter()
        .filter_map(|(name, value)| match value {
            AMQPValue::LongString(text) => Some((name.as_str().to_owned(), text.to_string())),
            _ => None,
        })
        .collect();
    let status = headers.get("status").and_then(|text| text.parse().ok()).unwrap_or(0);
    Answer { status, headers, body: delivery.data.clone() }
}
