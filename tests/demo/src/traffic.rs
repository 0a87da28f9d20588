//! What the controllers send: requests of all kinds and versions, duplicates, cancellations, and rubbish.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use lethe_broker::topology::REQUESTS;
use lethe_domain::opendsr::{ApiVersion, Identity, IdentityFormat, IdentityType, Regulation, SubjectRequest};
use lethe_domain::request::{ControllerId, Mpid, RequestType, SubjectRequestId};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::http::Http;
use crate::output::say;
use crate::people::{People, Person};
use crate::receiver::Receiver;
use crate::world::World;

/// Calls over HTTP at once.
const AT_ONCE: usize = 16;

/// One request and what is done about it.
pub(crate) struct Case {
    /// The index of the person it is about.
    pub(crate) person: usize,
    pub(crate) controller_id: ControllerId,
    pub(crate) request: SubjectRequest,
    pub(crate) twist: Twist,
    pub(crate) transport: Transport,
}

/// Which way a request comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Amqp,
    Http,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Twist {
    None,
    /// Sent twice; what came over HTTP comes over AMQP as well.
    Duplicate,
    /// Cancelled right after.
    Cancel,
    /// The cancellation is published first; over AMQP only.
    CancelFirst,
}

impl Case {
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.twist, Twist::Cancel | Twist::CancelFirst)
    }
}

/// The answers to what was published, by correlation id.
pub(crate) struct Sent {
    pub(crate) answers: Answers,
    pub(crate) malformed: usize,
}

/// Plans one request for each of `count` people, never two for one.
pub(crate) fn plan(people: &People, receiver: &Receiver, count: u32, seed: u64) -> Vec<Case> {
    let mut random = StdRng::seed_from_u64(seed ^ 0x5eed);
    let mut order: Vec<usize> = (0..people.0.len()).collect();
    order.shuffle(&mut random);
    order.truncate(count as usize);
    order.into_iter().filter_map(|index| Some(case(index, people.0.get(index)?, receiver, &mut random))).collect()
}

fn case(index: usize, person: &Person, receiver: &Receiver, random: &mut StdRng) -> Case {
    let version = ApiVersion::ALL[random.random_range(0..3)];
    let kind = match random.random_range(0..10) {
        0..6 => RequestType::Erasure,
        6..8 => RequestType::Access,
        _ => RequestType::Portability,
    };
    let expedited = kind == RequestType::Erasure && random.random_bool(0.2);
    let weekly = kind == RequestType::Erasure && !expedited;
    let twist = match random.random_range(0..100) {
        0..5 => Twist::Duplicate,
        5..15 if weekly => Twist::Cancel,
        15..17 if weekly => Twist::CancelFirst,
        _ => Twist::None,
    };
    let (identities, mpids) = identities(person, random);
    let base = if random.random_bool(0.1) { &receiver.flaky } else { &receiver.steady };
    let request = SubjectRequest {
        api_version: version,
        regulation: (version != ApiVersion::V1).then_some(Regulation::Gdpr),
        subject_request_id: SubjectRequestId::random(),
        subject_request_type: kind,
        submitted_time: Timestamp::UNIX_EPOCH,
        identities,
        mpids,
        skip_waiting_period: expedited,
        status_callback_urls: vec![format!("{base}/{}/callbacks", person.controller_id)],
        group_id: random.random_bool(0.3).then(|| format!("group-{}", index % 50)),
    };
    let by_http = twist != Twist::CancelFirst && random.random_bool(0.5);
    let transport = if by_http { Transport::Http } else { Transport::Amqp };
    Case { person: index, controller_id: person.controller_id.clone(), request, twist, transport }
}

fn identities(person: &Person, random: &mut StdRng) -> (Vec<Identity>, Vec<Mpid>) {
    let format = IdentityFormat::ALL[random.random_range(0..4)];
    let one = |identity_type: IdentityType, value: &str| {
        let value = format.encode(&identity_type.normalise(value));
        vec![Identity { identity_type, format, value }]
    };
    match random.random_range(0..4) {
        0 => (one(IdentityType::Email, &person.email), Vec::new()),
        1 => (one(IdentityType::ControllerCustomerId, &person.customer_id), Vec::new()),
        2 => (one(IdentityType::AndroidAdvertisingId, &person.device_id), Vec::new()),
        _ => (Vec::new(), vec![Mpid(person.mpid)]),
    }
}

struct Amqp {
    channel: Channel,
    reply_to: String,
}

impl Amqp {
    async fn publish(
        &self,
        controller_id: &ControllerId,
        kind: &str,
        body: &[u8],
        correlation: &str,
    ) -> anyhow::Result<lapin::PublisherConfirm> {
        let mut headers = FieldTable::default();
        headers.insert("controller-id".into(), AMQPValue::LongString(controller_id.as_str().into()));
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_reply_to(self.reply_to.as_str().into())
            .with_correlation_id(correlation.into())
            .with_headers(headers);
        let key = format!("{controller_id}.{kind}");
        Ok(self
            .channel
            .basic_publish(REQUESTS.into(), key.as_str().into(), BasicPublishOptions::default(), body, properties)
            .await?)
    }
}

/// Publishes everything with confirms, and collects the answers.
pub(crate) async fn publish(world: &World, cases: &[Case]) -> anyhow::Result<Sent> {
    let started = Instant::now();
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let queue = channel.queue_declare("".into(), exclusive, FieldTable::default()).await?;
    let reply_to = queue.name().as_str().to_owned();
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = connection
        .create_channel()
        .await?
        .basic_consume(queue.name().clone(), "".into(), consume, FieldTable::default())
        .await?;
    let amqp = Amqp { channel, reply_to };

    let malformed = cases.len() / 50;
    let mut expected = 0;
    let mut confirms = Vec::new();
    let mut over_http = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let id = case.request.subject_request_id;
        let body = case.request.to_wire("localhost").to_string().into_bytes();
        let cancellation = serde_json::json!({ "subject_request_id": id }).to_string().into_bytes();
        let cancel = format!("cancel {id}");
        if case.twist == Twist::CancelFirst {
            confirms.push(amqp.publish(&case.controller_id, "cancellation", &cancellation, &cancel).await?);
            expected += 1;
        }
        match case.transport {
            Transport::Amqp => {
                confirms.push(amqp.publish(&case.controller_id, "request", &body, &id.to_string()).await?);
                expected += 1;
            }
            Transport::Http => over_http.push((case, body.clone())),
        }
        match (case.twist, case.transport) {
            (Twist::Duplicate, _) => {
                confirms.push(amqp.publish(&case.controller_id, "request", &body, &id.to_string()).await?);
                expected += 1;
            }
            (Twist::Cancel, Transport::Amqp) => {
                confirms.push(amqp.publish(&case.controller_id, "cancellation", &cancellation, &cancel).await?);
                expected += 1;
            }
            _ => {}
        }
        if number < malformed {
            let rubbish = body.get(..body.len() / 2).unwrap_or_default();
            confirms.push(amqp.publish(&case.controller_id, "request", rubbish, "malformed").await?);
            expected += 1;
        }
    }
    let mut answers = post_all(world, &over_http).await?;
    for confirm in confirms {
        ensure!(confirm.await?.is_ack(), "RabbitMQ refused a message");
    }
    let (count, seconds) = (over_http.len(), started.elapsed().as_secs_f64());
    say(&format!("{expected} messages published and confirmed, {count} requests posted over HTTP, in {seconds:.1} s"))?;

    for _ in 0..expected {
        let reply = tokio::time::timeout(Duration::from_mins(1), replies.next())
            .await
            .context("not every message was answered within 60 s")?;
        let reply = reply.context("the queue of answers has ended")??;
        let properties = &reply.properties;
        let correlation = properties.correlation_id().as_ref().map(|id| id.as_str().to_owned()).unwrap_or_default();
        let status = properties.headers().as_ref().and_then(|headers| match headers.inner().get("status") {
            Some(AMQPValue::LongString(text)) => text.to_string().parse().ok(),
            _ => None,
        });
        let body = serde_json::from_slice(&reply.data)?;
        answers.entry(correlation).or_default().push((status.context("an answer has no status")?, body));
    }
    let _ = connection.close(200, "done".into()).await;
    Ok(Sent { answers, malformed })
}

/// What was answered, by correlation id.
type Answers = BTreeMap<String, Vec<(u16, serde_json::Value)>>;

/// Posts requests, and cancels those that are to be cancelled, several at a time.
async fn post_all(world: &World, requests: &[(&Case, Vec<u8>)]) -> anyhow::Result<Answers> {
    let http = Http::new(world)?;
    let calls = requests.iter().map(async |(case, body)| {
        let (id, version) = (case.request.subject_request_id.to_string(), case.request.api_version);
        let mut answers = vec![(id.clone(), http.submit(&case.controller_id, version, body.clone()).await?)];
        if case.twist == Twist::Cancel {
            answers.push((format!("cancel {id}"), http.cancel(&case.controller_id, version, &id).await?));
        }
        anyhow::Ok(answers)
    });
    let answered: Vec<Vec<_>> = stream::iter(calls).buffer_unordered(AT_ONCE).try_collect().await?;
    let mut answers = Answers::new();
    for (key, answer) in answered.into_iter().flatten() {
        answers.entry(key).or_default().push(answer);
    }
    Ok(answers)
}

/// Downloads every result that a callback named, by the id of its request.
pub(crate) async fn download(world: &World, receiver: &Receiver) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let started = Instant::now();
    let http = Http::new(world)?;
    let urls: BTreeMap<String, String> = receiver
        .received()
        .into_iter()
        .filter_map(|callback| Some((callback.subject_request_id, callback.results_url?)))
        .collect();
    let calls = urls.iter().map(async |(id, url)| anyhow::Ok((id.clone(), http.download(url).await?)));
    let files: BTreeMap<_, _> = stream::iter(calls).buffer_unordered(AT_ONCE).try_collect().await?;
    say(&format!("{} results downloaded in {:.1} s", files.len(), started.elapsed().as_secs_f64()))?;
    Ok(files)
}
