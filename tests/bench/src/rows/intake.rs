//! Intake: from the publisher's first message until all requests are recorded, matched and acknowledged; with answers:
//! until each publisher has its signed answer.
//!
//! The raw program consumes the same messages from a queue of the same kind with the same prefetch and as many consumers.
//! It takes as many into one transaction as Lethe may (`--raw-group`), reads id and identities out of the JSON, looks
//! all identities of a controller up at once, writes the least that has to be kept (request, profile, a state for the first
//! callback) by UNNEST, publishes one wake-up for a group, and acknowledges once. It checks no sender, validates nothing,
//! seals nothing, knows no calendar and recognises no repetition. Both write through `synchronous_commit` and quorum queues.
//!
//! A scheduler runs beside the matcher, and a run of Lethe ends when what it has entered in the trail is sealed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicPublishOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use lethe_db::{Db, Session};
use lethe_testing::Worker;
use tokio_postgres::types::ToSql;

use super::raw::{self, RawRequest};
use crate::bench::{Bench, DAILY};
use crate::broker::{self, Link, RAW_REQUESTS, RAW_WAKE_UPS};
use crate::meter::Run;
use crate::people::{People, fill};
use crate::report::Row;
use crate::requests::{self, Made};
use crate::servers;

/// The controller of the people whom requests are about.
pub(crate) const PEOPLE: &str = "people";
/// Profiles of each of many controllers.
const FEW: u64 = 100;
/// What both sides run at once, by the matcher's default.
const CONSUMERS: usize = 2;
const RECORDED: &str = "SELECT count(*) FROM lethe.requests";
/// One endpoint, where nobody listens: callbacks are not delivered in this row.
const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("intake", "requests/s", 0.6);
    people(bench, PEOPLE, bench.sizes.profiles).await;
    let controllers = [PEOPLE.to_owned()];
    contest(bench, &mut row, &controllers, bench.sizes.profiles, bench.sizes.intake_requests, false).await;
    row
}

pub(crate) async fn row_with_answers(bench: &Bench) -> Row {
    let mut row = Row::new("answers", "requests/s", 0.6);
    people(bench, PEOPLE, bench.sizes.profiles).await;
    let controllers = [PEOPLE.to_owned()];
    contest(bench, &mut row, &controllers, bench.sizes.profiles, bench.sizes.answered_requests, true).await;
    row
}

/// Requests of many controllers in turn: hardly two of a group are of the same.
pub(crate) async fn row_of_many_controllers(bench: &Bench) -> Row {
    let mut row = Row::new(format!("intake, {} controllers", bench.sizes.controllers), "requests/s", 0.6);
    let controllers: Vec<String> = (0..bench.sizes.controllers).map(|number| format!("one-of-many-{number}")).collect();
    for controller in &controllers {
        people(bench, controller, FEW).await;
    }
    contest(bench, &mut row, &controllers, FEW, bench.sizes.answered_requests, false).await;
    row
}

async fn contest(bench: &Bench, row: &mut Row, controllers: &[String], profiles: u64, count: u64, answers: bool) {
    for _ in 0..bench.sizes.runs {
        let made = || requests::erasures(count, profiles, &[URL.to_owned()]);
        row.lethe.push(lethe(bench, controllers, &made(), answers, 1).await);
        row.raw.push(raw(bench, controllers, &made(), answers).await);
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
pub(crate) async fn lethe(bench: &Bench, controllers: &[String], made: &[Made], answers: bool, matchers: usize) -> Run {
    bench.clean().await;
    let link = Link::connect(bench).await;
    let (replies, mut arriving) = link.replies().await;
    let workers = bench.workers(&[&["scheduler"], &vec!["identity-matcher"; matchers][..]].concat(), DAILY).await;
    bench.is_led().await;
    bench.is_sealed().await;
    let count = made.len() as u64;
    let meter = bench.meter(&workers);
    link.publish(controllers, "dsr.requests", answers.then_some(replies.as_str()), made).await;
    link.emptied("dsr.identity-matching").await;
    if answers {
        broker::arrived(&mut arriving, count).await;
    }
    bench.reaches(RECORDED, count).await;
    bench.is_sealed().await;
    let run = meter.stop(count as f64);
    assert_eq!(
        bench.count("SELECT sum(cardinality(at_receipt)) FROM lethe.request_details").await,
        i64::try_from(count).unwrap()
    );
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
    link.publish(&[controller.to_owned()], "dsr.requests", None, made).await;
    let workers = bench.workers(&vec!["identity-matcher"; matchers], &[]).await;
    let meter = bench.meter(&workers);
    // What they took while they were awaited is not measured.
    let before = bench.count(RECORDED).await;
    link.emptied("dsr.identity-matching").await;
    bench.reaches(RECORDED, made.len() as u64).await;
    let run = meter.stop(made.len() as f64 - before as f64);
    let memory = servers::peak_memory(workers[0].id());
    for worker in workers {
        Worker::stop(worker).await;
    }
    (run, memory)
}

/// The raw side.
pub(crate) async fn raw(bench: &Bench, controllers: &[String], made: &[Made], answers: bool) -> Run {
    bench.clean().await;
    let run = record_raw(bench, controllers, made, answers).await;
    assert_eq!(bench.count("SELECT count(*) FROM raw.request_mpids").await, i64::try_from(made.len()).unwrap());
    run
}

/// The raw program itself, from the first message to the last acknowledgement.
pub(crate) async fn record_raw(bench: &Bench, controllers: &[String], made: &[Made], answers: bool) -> Run {
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
    let look_up = Arc::new(LookUp::new(bench, controllers).await);
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
            look_up: look_up.clone(),
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
    link.publish(controllers, RAW_REQUESTS, answers.then_some(replies.as_str()), made).await;
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
    look_up: Arc<LookUp>,
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
                let (controller, _) = delivery.routing_key.as_str().split_once('.').unwrap();
                RawRequest::read(std::mem::take(&mut delivery.data), controller, reply_to)
            })
            .collect();
        record(&self.db, &self.look_up, &requests).await;
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

const INSERT_REQUESTS: &str = "
    INSERT INTO raw.requests (controller_id, subject_request_id, status, received_at, expected_completion_time, body)
    SELECT controller, id, 'pending', now(), now(), body
      FROM unnest($1::text[], $2::uuid[], $3::bytea[]) AS q (controller, id, body)
    RETURNING request_key";
const INSERT_MPIDS: &str = "
    INSERT INTO raw.request_mpids (request_key, mpid)
    SELECT key, mpid FROM unnest($1::bigint[], $2::bigint[]) AS q (key, mpid)";
const INSERT_CALLBACKS: &str = "
    INSERT INTO raw.callbacks (request_key, url_no, sequence, endpoint_id, state)
    SELECT key, 0, 0, 1 + key % 50, 'ready' FROM unnest($1::bigint[]) AS key";

/// Looks profiles up, each controller's in its own partition, all controllers' at once.
pub(crate) struct LookUp(HashMap<String, String>);

impl LookUp {
    pub(crate) async fn new(bench: &Bench, controllers: &[String]) -> Self {
        let session = bench.world.db.session().await.unwrap();
        let sql = "SELECT controller_id, partition_no FROM lethe.controllers WHERE controller_id = ANY ($1)";
        let rows = session.query(sql, &[&controllers]).await.unwrap();
        let statement = |number: i32| {
            format!(
                "SELECT q.ord, i.mpid
                   FROM unnest($1::int[], $2::uuid[]) AS q (ord, key)
                   JOIN subject_data.profile_identities_p{number} i ON i.by_sha256 = q.key"
            )
        };
        Self(rows.iter().map(|row| (row.get("controller_id"), statement(row.get("partition_no")))).collect())
    }

    /// Requests by their place in the group, each with a profile; every pair once.
    pub(crate) async fn find(&self, session: &Session, group: &[&RawRequest]) -> Vec<(usize, i64)> {
        let mut of_controllers = HashMap::<&str, (Vec<i32>, Vec<uuid::Uuid>)>::new();
        for (ord, request) in group.iter().enumerate() {
            let (ords, keys) = of_controllers.entry(&request.controller).or_default();
            for key in &request.keys {
                ords.push(i32::try_from(ord).unwrap());
                keys.push(*key);
            }
        }
        let queries = of_controllers.iter().map(|(controller, (ords, keys))| async move {
            let statement = session.prepared(&self.0[*controller]).await.unwrap();
            session.raw().query(&statement, &[ords as &(dyn ToSql + Sync), keys]).await.unwrap()
        });
        let rows = futures_util::future::join_all(queries).await;
        let mut pairs: Vec<(usize, i64)> =
            rows.iter().flatten().map(|row| (usize::try_from(row.get::<_, i32>(0)).unwrap(), row.get(1))).collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    }
}

/// One transaction. What needs no answer of what went before is sent without waiting for it.
pub(crate) async fn record(db: &Db, look_up: &LookUp, group: &[RawRequest]) {
    let session = db.session().await.unwrap();
    let client = session.raw();
    let insert_requests = session.prepared(INSERT_REQUESTS).await.unwrap();
    let insert_mpids = session.prepared(INSERT_MPIDS).await.unwrap();
    let insert_callbacks = session.prepared(INSERT_CALLBACKS).await.unwrap();
    let controllers: Vec<&str> = group.iter().map(|request| request.controller.as_str()).collect();
    let ids: Vec<uuid::Uuid> = group.iter().map(|request| request.id).collect();
    let bodies: Vec<&[u8]> = group.iter().map(|request| request.body.as_slice()).collect();
    let members: Vec<&RawRequest> = group.iter().collect();
    let (begun, found, inserted) =
        futures_util::join!(client.batch_execute("BEGIN"), look_up.find(&session, &members), async {
            client.query(&insert_requests, &[&controllers, &ids, &bodies]).await
        },);
    begun.unwrap();
    let keys: Vec<i64> = inserted.unwrap().iter().map(|row| row.get(0)).collect();
    let (of, mpids): (Vec<i64>, Vec<i64>) = found.into_iter().map(|(place, mpid)| (keys[place], mpid)).unzip();
    let (first, second, committed) = futures_util::join!(
        async { client.execute(&insert_mpids, &[&of, &mpids]).await },
        async { client.execute(&insert_callbacks, &[&keys]).await },
        client.batch_execute("COMMIT"),
    );
    first.unwrap();
    second.unwrap();
    committed.unwrap();
}
