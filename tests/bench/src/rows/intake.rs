//! Intake: from the publisher's first message until all requests are recorded, matched and acknowledged; with answers:
//! until each publisher has its signed answer.
//!
//! The raw program consumes the same messages from a queue of the same kind with the same prefetch and as many consumers.
//! It takes as many into one transaction as Lethe may (`--raw-group`), reads id and identities out of the JSON, looks
//! all identities up at once, writes the same rows of the same size (request, profile, first callback) by UNNEST,
//! publishes one wake-up for a group, and acknowledges once. It checks no sender, validates nothing, seals nothing,
//! knows no calendar and recognises no repetition. Both write through `synchronous_commit` and quorum queues.

use std::time::Instant;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicPublishOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use lethe_db::Db;
use lethe_testing::Worker;

use super::raw::{self, RawRequest};
use crate::bench::{Bench, DAILY};
use crate::broker::{self, Link, RAW_REQUESTS, RAW_WAKE_UPS, Route};
use crate::meter::Run;
use crate::people::{People, fill};
use crate::report::Row;
use crate::requests::{self, Made};
use crate::servers;

/// The controller of the people whom requests are about.
pub(crate) const PEOPLE: &str = "people";
/// What both sides run at once, by the matcher's default.
const CONSUMERS: usize = 2;
const RECORDED: &str = "SELECT count(*) FROM lethe.requests";
/// One endpoint, where nobody listens: callbacks are not delivered in this row.
const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("intake", "requests/s", 0.6);
    contest(bench, &mut row, bench.sizes.intake_requests, false).await;
    row
}

pub(crate) async fn row_with_answers(bench: &Bench) -> Row {
    let mut row = Row::new("answers", "requests/s", 0.6);
    contest(bench, &mut row, bench.sizes.answered_requests, true).await;
    row
}

async fn contest(bench: &Bench, row: &mut Row, count: u64, answers: bool) {
    people(bench, PEOPLE, bench.sizes.profiles).await;
    for _ in 0..bench.sizes.runs {
        let made = || requests::erasures(count, bench.sizes.profiles, &[URL.to_owned()]);
        row.lethe.push(lethe(bench, PEOPLE, &made(), answers, 1).await);
        row.raw.push(raw(bench, PEOPLE, &made(), answers).await);
    }
}

/// Fills the controller `id` unless it is there already.
pub(crate) async fn people(bench: &Bench, id: &str, profiles: u64) {
    let (controller, is_new) = bench.controller(id).await;
    if is_new {
        fill(bench, &controller, People { profiles, event_batches: 0, bytes: 0 }).await;
    }
    bench.calendar(DAILY).await;
}

/// Lethe's side, with so many matchers.
pub(crate) async fn lethe(bench: &Bench, controller: &str, made: &[Made], answers: bool, matchers: usize) -> Run {
    bench.clean().await;
    let link = Link::connect(bench).await;
    let (replies, mut arriving) = link.replies().await;
    let workers = bench.workers(&vec!["identity-matcher"; matchers], &[]).await;
    let count = made.len() as u64;
    let key = format!("{controller}.request");
    let route = Route { exchange: "dsr.requests", routing_key: &key, reply_to: answers.then_some(replies.as_str()) };
    let meter = bench.meter(&workers);
    let run = {
        link.publish(controller, route, made).await;
        link.emptied("dsr.identity-matching").await;
        if answers {
            broker::arrived(&mut arriving, count).await;
        }
        broker::reaches(bench, RECORDED, count).await;
        meter.stop(count as f64)
    };
    assert_eq!(bench.count("SELECT count(*) FROM lethe.request_mpids").await, i64::try_from(count).unwrap());
    for worker in workers {
        Worker::stop(worker).await;
    }
    // What a stopped matcher had not acknowledged would be back.
    assert_eq!(link.ready("dsr.identity-matching").await, 0, "all messages were acknowledged");
    run
}

/// Lethe's side, with so many matchers that find all of the requests in their queue: no publisher sets the pace, and none
/// shares their cores. And the most memory that the first of them had.
pub(crate) async fn from_queue(bench: &Bench, controller: &str, made: &[Made], matchers: usize) -> (Run, Option<u64>) {
    bench.clean().await;
    let link = Link::connect(bench).await;
    let key = format!("{controller}.request");
    link.publish(controller, Route { exchange: "dsr.requests", routing_key: &key, reply_to: None }, made).await;
    let workers = bench.workers(&vec!["identity-matcher"; matchers], &[]).await;
    let meter = bench.meter(&workers);
    // What they took while they were awaited is not measured.
    let before = bench.count(RECORDED).await;
    link.emptied("dsr.identity-matching").await;
    broker::reaches(bench, RECORDED, made.len() as u64).await;
    let run = meter.stop(made.len() as f64 - before as f64);
    let memory = servers::peak_memory(workers[0].id());
    for worker in workers {
        Worker::stop(worker).await;
    }
    (run, memory)
}

/// The raw side.
pub(crate) async fn raw(bench: &Bench, controller: &str, made: &[Made], answers: bool) -> Run {
    bench.clean().await;
    let run = record_raw(bench, controller, made, answers).await;
    assert_eq!(bench.count("SELECT count(*) FROM raw.request_mpids").await, i64::try_from(made.len()).unwrap());
    run
}

/// The raw program itself, from the first message to the last acknowledgement.
pub(crate) async fn record_raw(bench: &Bench, controller: &str, made: &[Made], answers: bool) -> Run {
    let link = Link::connect(bench).await;
    link.raw_requests().await;
    link.raw_queue(RAW_WAKE_UPS).await;
    let (replies, mut arriving) = link.replies().await;
    let mut consumers = Vec::new();
    for _ in 0..CONSUMERS {
        let consuming = Link::connect(bench).await;
        let publishing = Link::connect(bench).await;
        consumers.push((consuming, publishing));
    }
    let meter = bench.raw_meter();
    let started = Instant::now();
    let (sender, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
    let signer = raw::signer(bench);
    let mut tasks = Vec::new();
    for (consuming, publishing) in consumers {
        let group = usize::try_from(bench.sizes.raw_group).unwrap();
        let deliveries = consuming.consume(RAW_REQUESTS, u16::try_from(2 * group).unwrap()).await;
        let program = Program {
            db: bench.raw_db.clone(),
            controller: controller.to_owned(),
            publishing: publishing.channel.clone(),
            signer: signer.clone(),
            group,
            sender: sender.clone(),
        };
        tasks.push(tokio::spawn(async move {
            program.run(deliveries).await;
            drop((consuming, publishing));
        }));
    }
    let key = format!("{controller}.request");
    let route = Route { exchange: RAW_REQUESTS, routing_key: &key, reply_to: answers.then_some(replies.as_str()) };
    link.publish(controller, route, made).await;
    let mut left = made.len();
    let mut failed = futures_util::future::select_all(tasks);
    while left > 0 {
        tokio::select! {
            group = acknowledged.recv() => left -= group.unwrap(),
            (outcome, ..) = &mut failed => panic!("a raw consumer has ended: {outcome:?}"),
        }
    }
    if answers {
        broker::arrived(&mut arriving, made.len() as u64).await;
    }
    let run = meter.stop_at(made.len() as f64, started.elapsed());
    for task in failed.into_inner() {
        task.abort();
    }
    run
}

struct Program {
    db: Db,
    controller: String,
    publishing: Channel,
    signer: std::sync::Arc<lethe_signing::signature::Signer>,
    group: usize,
    sender: tokio::sync::mpsc::UnboundedSender<usize>,
}

impl Program {
    async fn run(&self, mut deliveries: lapin::Consumer) {
        while let Some(Ok(first)) = deliveries.next().await {
            let mut group = vec![first];
            // What has come in already, and what comes within two milliseconds.
            let deadline = tokio::time::Instant::now() + std::time::Duration::from_millis(2);
            while group.len() < self.group
                && let Ok(Some(Ok(next))) = tokio::time::timeout_at(deadline, deliveries.next()).await
            {
                group.push(next);
            }
            self.handle(group).await;
        }
    }

    async fn handle(&self, mut group: Vec<Delivery>) {
        let requests: Vec<RawRequest> = group
            .iter_mut()
            .map(|delivery| {
                let reply_to = delivery.properties.reply_to().as_ref().map(|name| name.as_str().to_owned());
                RawRequest::read(std::mem::take(&mut delivery.data), reply_to)
            })
            .collect();
        record(&self.db, &self.controller, &requests).await;
        self.publish(&requests).await;
        group.last().unwrap().acker.ack(BasicAckOptions { multiple: true }).await.unwrap();
        self.sender.send(group.len()).unwrap();
    }

    /// One wake-up for the group, and the answers where they are asked for; confirms awaited as a set.
    async fn publish(&self, requests: &[RawRequest]) {
        let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
        let options = BasicPublishOptions::default;
        let wake_up = br#"{"endpoint_id":1}"#;
        let publishing =
            self.publishing.basic_publish("".into(), RAW_WAKE_UPS.into(), options(), wake_up, properties.clone());
        let mut confirms = vec![publishing.await.unwrap()];
        let asking: Vec<&RawRequest> = requests.iter().filter(|request| request.reply_to.is_some()).collect();
        let signed = raw::sign_all(&self.signer, asking.iter().map(|request| raw::answer(request)).collect()).await;
        for (request, (body, signature)) in asking.into_iter().zip(signed) {
            let mut headers = FieldTable::default();
            for (name, value) in
                [("status", "201"), ("X-OpenDSR-Processor-Domain", "localhost"), ("X-OpenDSR-Signature", &signature)]
            {
                headers.insert(name.into(), AMQPValue::LongString(value.into()));
            }
            let properties = properties.clone().with_headers(headers).with_correlation_id("bench".into());
            let key = request.reply_to.as_deref().unwrap().into();
            confirms.push(self.publishing.basic_publish("".into(), key, options(), &body, properties).await.unwrap());
        }
        for confirm in confirms {
            assert!(!confirm.await.unwrap().is_nack());
        }
    }
}

const LOOK_UP: &str = "
    SELECT q.ord, i.mpid
      FROM unnest($2::int[], $3::text[], $4::bytea[]) AS q (ord, identity_type, sha256)
      JOIN subject_data.profile_identities i
        ON i.controller_id = $1 AND i.identity_type = q.identity_type AND i.sha256 = q.sha256";
const INSERT_REQUESTS: &str = "
    INSERT INTO raw.requests (controller_id, subject_request_id, api_version, regulation, request_type, status, lane,
                              batch_id, content_digest, sealed_request, submitted_time, received_at, expected_completion_time)
    SELECT $1, id, '3.0', 'gdpr', 'erasure', 'pending', 'erasure', 1, digest, body, now(), now(), now()
      FROM unnest($2::uuid[], $3::bytea[], $4::bytea[]) AS q (id, digest, body)
    RETURNING request_key";
const INSERT_MPIDS: &str = "
    INSERT INTO raw.request_mpids (request_key, mpid, source)
    SELECT key, mpid, 'receipt' FROM unnest($1::bigint[], $2::bigint[]) AS q (key, mpid)";
const INSERT_CALLBACKS: &str = "
    INSERT INTO raw.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                               expected_completion_time, state, next_attempt_at, created_at)
    SELECT gen_random_uuid(), key, 0, 0, 1 + key % 50, 'pending', now(), 'ready', now(), now()
      FROM unnest($1::bigint[]) AS key";

/// One transaction. What needs no answer of what went before is sent without waiting for it.
async fn record(db: &Db, controller: &str, group: &[RawRequest]) {
    let session = db.session().await.unwrap();
    let client = session.raw();
    let look_up = session.prepared(LOOK_UP).await.unwrap();
    let insert_requests = session.prepared(INSERT_REQUESTS).await.unwrap();
    let insert_mpids = session.prepared(INSERT_MPIDS).await.unwrap();
    let insert_callbacks = session.prepared(INSERT_CALLBACKS).await.unwrap();
    let (mut ords, mut types, mut digests) = (Vec::new(), Vec::new(), Vec::new());
    for (ord, request) in group.iter().enumerate() {
        for (kind, digest) in &request.digests {
            ords.push(i32::try_from(ord).unwrap());
            types.push(*kind);
            digests.push(digest.as_slice());
        }
    }
    let ids: Vec<uuid::Uuid> = group.iter().map(|request| request.id).collect();
    let contents: Vec<Vec<u8>> = group.iter().map(|request| lethe_domain::crypto::sha256(&request.body)).collect();
    let bodies: Vec<&[u8]> = group.iter().map(|request| request.body.as_slice()).collect();
    let (begun, found, inserted) = futures_util::join!(
        client.batch_execute("BEGIN"),
        async { client.query(&look_up, &[&controller, &ords, &types, &digests]).await },
        async { client.query(&insert_requests, &[&controller, &ids, &contents, &bodies]).await },
    );
    begun.unwrap();
    let keys: Vec<i64> = inserted.unwrap().iter().map(|row| row.get(0)).collect();
    let mut pairs: Vec<(i64, i64)> =
        found.unwrap().iter().map(|row| (keys[usize::try_from(row.get::<_, i32>(0)).unwrap()], row.get(1))).collect();
    pairs.sort_unstable();
    pairs.dedup();
    let (of, mpids): (Vec<i64>, Vec<i64>) = pairs.into_iter().unzip();
    let (first, second, committed) = futures_util::join!(
        async { client.execute(&insert_mpids, &[&of, &mpids]).await },
        async { client.execute(&insert_callbacks, &[&keys]).await },
        client.batch_execute("COMMIT"),
    );
    first.unwrap();
    second.unwrap();
    committed.unwrap();
}
