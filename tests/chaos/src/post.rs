//! The controllers' side of RabbitMQ and of the gateway: letters go out over several connections, again until they are
//! confirmed, and those of careful senders again until they are answered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt;
use jiff::Timestamp;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use lethe_testing::Answer;
use lethe_testing::publisher::read_answer;
use tokio::time::timeout;

use crate::driver::Span;
use crate::fleet::Fleet;
use crate::people::CONTROLLERS;
use crate::plan::{HTTP_SENDER, LetterKind, Plan, SENDERS};
use crate::world::World;

/// A letter that nobody answered is sent again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// What is known of a letter.
#[derive(Clone, Debug, Default)]
pub struct Fate {
    /// When it was first sent.
    pub first_sent: Option<Instant>,
    /// When it was last sent.
    pub sent: Option<Instant>,
    /// How often.
    pub times: u32,
    /// When the broker first confirmed it.
    pub confirmed: Option<Instant>,
    /// The database's clock just after that; for cancellations, where the database answered.
    pub confirmed_by_clock: Option<Timestamp>,
    /// Answers, and when each came.
    pub answers: Vec<(Instant, Answer)>,
}

impl Fate {
    /// Whether a letter must have had its effect: confirmed, and in no queue that was emptied before it was answered.
    pub fn counts(&self, purges: &[Span]) -> bool {
        let Some(confirmed) = self.confirmed else { return false };
        let answered = self.answers.first().map(|(at, _)| *at);
        !purges.iter().any(|(began, ended)| *ended >= confirmed && answered.is_none_or(|answered| answered >= *began))
    }
}

/// All letters and what became of them.
pub struct Post {
    plan: Arc<Plan>,
    world: Arc<World>,
    user: String,
    began: Instant,
    fates: Mutex<Vec<Fate>>,
    is_closed: AtomicBool,
}

impl Post {
    /// Begins to send.
    pub fn open(plan: Arc<Plan>, world: Arc<World>, fleet: Arc<Fleet>) -> Arc<Self> {
        let fates = Mutex::new(vec![Fate::default(); plan.letters.len()]);
        let user = world.tests.management.user();
        let post = Arc::new(Self { plan, world, user, began: Instant::now(), fates, is_closed: AtomicBool::default() });
        for sender in 0..SENDERS {
            tokio::spawn(post.clone().keep_open(sender));
        }
        tokio::spawn(post.clone().call_gateways(fleet));
        post
    }

    /// Sends no more.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// What became of each letter, in the order of the plan.
    pub fn fates(&self) -> Vec<Fate> {
        self.fates.lock().unwrap().clone()
    }

    /// Letters that their senders still care for.
    pub fn open_letters(&self) -> usize {
        let fates = self.fates.lock().unwrap();
        self.plan.letters.iter().zip(&*fates).filter(|(letter, fate)| !is_done(letter.is_careful, fate)).count()
    }

    async fn keep_open(self: Arc<Self>, sender: usize) {
        while !self.is_closed.load(Ordering::SeqCst) {
            // Whatever broke: the next connection takes over.
            let _ = self.serve(sender).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn serve(self: &Arc<Self>, sender: usize) -> anyhow::Result<()> {
        let patience = Duration::from_secs(10);
        let url = &self.world.tests.amqp_url;
        let connection = timeout(patience, Connection::connect(url, ConnectionProperties::default())).await??;
        let setup = async {
            let channel = connection.create_channel().await?;
            lethe_broker::topology::declare(&channel).await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let exclusive =
                QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
            let queue = channel.queue_declare("".into(), exclusive, FieldTable::default()).await?;
            let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
            let consumer =
                channel.basic_consume(queue.name().clone(), "".into(), options, FieldTable::default()).await?;
            anyhow::Ok((channel, queue.name().as_str().to_owned(), consumer))
        };
        let (channel, reply_to, mut answers) = timeout(patience, setup).await??;
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                delivery = answers.next() => self.answered(&delivery.context("no more answers")??),
                _ = ticks.tick() => {
                    ensure!(!self.is_closed.load(Ordering::SeqCst) && connection.status().connected(), "closed");
                    for index in self.take_due(sender) {
                        timeout(patience, self.send(&channel, &reply_to, index)).await??;
                    }
                }
            }
        }
    }

    /// Each call by itself: one that hangs holds up none of the others.
    async fn call_gateways(self: Arc<Self>, fleet: Arc<Fleet>) {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
        let mut turn = 0;
        while !self.is_closed.load(Ordering::SeqCst) {
            for index in self.take_due(HTTP_SENDER) {
                turn += 1;
                let Some(address) = fleet.gateway(turn) else { continue };
                tokio::spawn(self.clone().call(client.clone(), address, index));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whatever breaks, and whatever the gateway cannot do now, is tried again.
    async fn call(self: Arc<Self>, client: reqwest::Client, address: String, index: usize) -> reqwest::Result<()> {
        let letter = &self.plan.letters[index];
        let case = &self.plan.cases[letter.case];
        let path = match case.version {
            "1.0" => "/v1/opengdpr_requests",
            "2.0" => "/v2/requests",
            _ => "/v3/requests",
        };
        let (key, secret) = self.world.tests.credentials(CONTROLLERS[case.controller]);
        let call = client.post(format!("http://{address}{path}")).basic_auth(key, Some(secret));
        let answer = call.header("content-type", "application/json").body(letter.body.clone()).send().await?;
        let status = answer.status().as_u16();
        let body = answer.bytes().await?.to_vec();
        // What else it says counts: a 500 is no "not now".
        if status != 503 && status != 429 {
            let answer = Answer { status, headers: HashMap::new(), body };
            self.fates.lock().unwrap()[index].answers.push((Instant::now(), answer));
        }
        Ok(())
    }

    fn take_due(&self, sender: usize) -> Vec<usize> {
        let mut fates = self.fates.lock().unwrap();
        let mut due = Vec::new();
        for (index, (letter, fate)) in self.plan.letters.iter().zip(fates.iter_mut()).enumerate() {
            let is_time = self.began.elapsed() >= letter.due && fate.sent.is_none_or(|sent| sent.elapsed() > AGAIN);
            if letter.sender == sender && is_time && !is_done(letter.is_careful, fate) && due.len() < 50 {
                fate.first_sent.get_or_insert_with(Instant::now);
                (fate.sent, fate.times) = (Some(Instant::now()), fate.times + 1);
                due.push(index);
            }
        }
        due
    }

    async fn send(self: &Arc<Self>, channel: &Channel, reply_to: &str, index: usize) -> anyhow::Result<()> {
        let letter = &self.plan.letters[index];
        let controller = CONTROLLERS[self.plan.cases[letter.case].controller];
        let word = if letter.kind == LetterKind::Cancellation { "cancellation" } else { "request" };
        let mut headers = FieldTable::default();
        headers.insert("controller-id".into(), AMQPValue::LongString(controller.into()));
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_user_id(self.user.as_str().into())
            .with_reply_to(reply_to.into())
            .with_correlation_id(index.to_string().as_str().into())
            .with_headers(headers);
        let key = format!("{controller}.{word}");
        let options = BasicPublishOptions::default();
        let confirm = channel
            .basic_publish("dsr.requests".into(), key.as_str().into(), options, &letter.body, properties)
            .await?;
        let post = self.clone();
        tokio::spawn(async move {
            if let Ok(Ok(confirmation)) = timeout(Duration::from_secs(30), confirm).await
                && confirmation.is_ack()
            {
                post.confirmed(index).await;
            }
        });
        Ok(())
    }

    async fn confirmed(&self, index: usize) {
        let now = Instant::now();
        let is_first = {
            let mut fates = self.fates.lock().unwrap();
            let is_first = fates[index].confirmed.is_none();
            fates[index].confirmed.get_or_insert(now);
            is_first
        };
        if is_first && self.plan.letters[index].kind == LetterKind::Cancellation {
            let clock = self.world.clock().await;
            self.fates.lock().unwrap()[index].confirmed_by_clock = clock;
        }
    }

    fn answered(&self, delivery: &lapin::message::Delivery) {
        let index = delivery.properties.correlation_id().as_ref().and_then(|id| id.as_str().parse::<usize>().ok());
        if let Some(index) = index {
            self.fates.lock().unwrap()[index].answers.push((Instant::now(), read_answer(delivery)));
        }
    }
}

fn is_done(is_careful: bool, fate: &Fate) -> bool {
    !fate.answers.is_empty() || (!is_careful && fate.confirmed.is_some())
}
