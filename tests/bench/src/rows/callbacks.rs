//! Callbacks: signed deliveries to many endpoints, from the wake-ups until every outcome is recorded.
//!
//! The raw program claims callbacks in groups, signs on all cores, posts with the same client library over connections
//! that are kept, with as many deliveries in flight as Lethe may have (the limit of each endpoint times the endpoints),
//! and records outcomes in groups. The bodies are as long and as many. It opens no sealed request, keeps no order and no list
//! of attempts, and knows neither breakers nor backoff. Plain http on both sides: keep-alive leaves nothing of TLS but
//! symmetric encryption.

use std::sync::Arc;
use std::time::Duration;

use lethe_broker::topology::CALLBACK_DELIVERY;
use lethe_db::Db;
use lethe_signing::signature::Signer;
use lethe_testing::Worker;
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use super::intake::people;
use super::raw;
use crate::bench::Bench;
use crate::broker::Link;
use crate::meter::Run;
use crate::receiver::Receivers;
use crate::report::Row;
use crate::requests;

/// By default in flight to one endpoint.
const PER_ENDPOINT: usize = 8;
/// Callbacks that are claimed, and outcomes that are recorded, in one statement.
const GROUP: i64 = 256;
const CONTROLLER: &str = "called-back";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("callbacks", "deliveries/s", 0.85);
    contest(bench, &mut row, bench.sizes.endpoints, bench.sizes.callbacks).await;
    row
}

/// All to one endpoint, which answers at once: its limit is the one of both sides.
pub(crate) async fn row_of_one_endpoint(bench: &Bench) -> Row {
    let mut row = Row::new("callbacks, one endpoint", "deliveries/s", 0.85);
    contest(bench, &mut row, 1, bench.sizes.callbacks_of_one).await;
    row
}

async fn contest(bench: &Bench, row: &mut Row, endpoints: u64, callbacks: u64) {
    let receivers = Receivers::start(endpoints).await;
    for _ in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, &receivers, callbacks, 1).await);
        row.raw.push(raw(bench, &receivers, callbacks).await);
    }
}

async fn prepare(bench: &Bench, receivers: &Receivers, count: u64) {
    people(bench, CONTROLLER, 100).await;
    bench.clean().await;
    let made = requests::erasures(count, 1_000_000, &receivers.urls);
    requests::record(bench, CONTROLLER, made).await;
    bench.world.run("ANALYZE lethe.requests, lethe.callbacks, lethe.endpoints").await;
    bench.settle().await;
}

/// Lethe's side, with so many couriers.
pub(crate) async fn lethe(bench: &Bench, receivers: &Receivers, count: u64, couriers: usize) -> Run {
    prepare(bench, receivers, count).await;
    let link = Link::connect(bench).await;
    let endpoints: Vec<i64> = bench.world.all("SELECT endpoint_id FROM lethe.endpoints", &[]).await;
    // There is one controller only: its share is all of it, as the raw program's is.
    let share = [("LETHE_CALLBACK_DELIVERIES_PER_CONTROLLER", "1024")];
    let workers = bench.workers(&vec!["callback-courier"; couriers], &share).await;
    let delivered = receivers.expect(count);
    let meter = bench.meter(&workers);
    // Once for each courier: a wake-up reaches one of them.
    for _ in 0..couriers {
        link.wake(CALLBACK_DELIVERY.name, "endpoint_id", &endpoints).await;
    }
    delivered.await;
    bench.reaches("SELECT count(*) FROM lethe.callbacks WHERE state = 'ready'", 0).await;
    let run = meter.stop(count as f64);
    assert_eq!(bench.count("SELECT count(*) FROM lethe.callback_attempts").await, i64::try_from(count).unwrap());
    for worker in workers {
        Worker::stop(worker).await;
    }
    run
}

/// The raw side, on as many callbacks of its own.
async fn raw(bench: &Bench, receivers: &Receivers, count: u64) -> Run {
    bench.clean().await;
    bench
        .world
        .run(&format!(
            "INSERT INTO raw.callbacks (request_key, url_no, sequence, endpoint_id, state)
             SELECT n, 0, 0, 1 + n % {}, 'ready' FROM generate_series(1, {count}) n;
             ANALYZE raw.callbacks",
            receivers.urls.len()
        ))
        .await;
    bench.settle().await;
    let delivered = receivers.expect(count);
    let run = deliver_raw(bench, receivers, count).await;
    delivered.await;
    run
}

const CLAIM: &str = "
    UPDATE raw.callbacks c SET lease_token = $1
      FROM (SELECT ctid FROM raw.callbacks
             WHERE endpoint_id = ANY ($3) AND state = 'ready' AND lease_token IS NULL
             LIMIT $2 FOR UPDATE SKIP LOCKED) due
     WHERE c.ctid = due.ctid
    RETURNING c.request_key, c.endpoint_id, c.sequence";
const FINISH: &str = "
    UPDATE raw.callbacks c SET state = 'delivered', lease_token = NULL
      FROM unnest($1::bigint[], $2::smallint[]) AS q (request_key, sequence)
     WHERE c.request_key = q.request_key AND c.url_no = 0 AND c.sequence = q.sequence";

/// The request, and the number of its status.
type Key = (i64, i16);

struct Claimed {
    key: Key,
    url: String,
    body: Vec<u8>,
    signature: String,
}

/// The raw program itself: `count` callbacks out of `raw.callbacks`.
pub(crate) async fn deliver_raw(bench: &Bench, receivers: &Receivers, count: u64) -> Run {
    let client = reqwest::Client::builder().no_proxy().http1_only().pool_max_idle_per_host(16).build().unwrap();
    let limit = Arc::new(Semaphore::new(PER_ENDPOINT * receivers.urls.len()));
    let signer = raw::signer(bench);
    let meter = bench.raw_meter();
    let (sender, outcomes) = mpsc::channel::<Key>(1_024);
    let recording = tokio::spawn(record_raw(bench.raw_db.clone(), outcomes));
    let (claims, mut claimed) = mpsc::channel::<Vec<Claimed>>(2);
    let claiming = tokio::spawn(claim_raw(bench.raw_db.clone(), signer, receivers.urls.clone(), count, claims));
    while let Some(group) = claimed.recv().await {
        for callback in group {
            let permit = limit.clone().acquire_owned().await.unwrap();
            let (client, sender) = (client.clone(), sender.clone());
            tokio::spawn(async move {
                let request = client
                    .post(&callback.url)
                    .header("Content-Type", "application/json")
                    .header("X-OpenDSR-Processor-Domain", "localhost")
                    .header("X-OpenDSR-Signature", &callback.signature)
                    .header("X-Lethe-Callback-Id", id(callback.key).to_string())
                    .timeout(Duration::from_secs(30))
                    .body(callback.body);
                assert!(request.send().await.unwrap().status().is_success());
                drop(permit);
                sender.send(callback.key).await.unwrap();
            });
        }
    }
    drop(sender);
    claiming.await.unwrap();
    assert_eq!(recording.await.unwrap(), count);
    meter.stop(count as f64)
}

/// Claims and signs ahead of the deliveries.
async fn claim_raw(db: Db, signer: Arc<Signer>, urls: Vec<String>, count: u64, claims: mpsc::Sender<Vec<Claimed>>) {
    let session = db.session().await.unwrap();
    let statement = session.prepared(CLAIM).await.unwrap();
    let rows = session.raw().query("SELECT DISTINCT endpoint_id FROM raw.callbacks", &[]).await.unwrap();
    let endpoints: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    let mut left = count;
    while left > 0 {
        let rows = session.raw().query(&statement, &[&Uuid::new_v4(), &GROUP, &endpoints]).await.unwrap();
        assert!(!rows.is_empty(), "{left} callbacks are missing");
        left -= rows.len() as u64;
        let unsigned: Vec<(Key, String, Vec<u8>)> = rows
            .iter()
            .map(|row| {
                let (key, endpoint): (Key, i64) = ((row.get(0), row.get(2)), row.get(1));
                let url = &urls[usize::try_from(endpoint).unwrap() % urls.len()];
                let body = format!(
                    r#"{{"controller_id":"{CONTROLLER}","expected_completion_time":"2026-12-09T12:30:00Z","status_callback_url":"{url}","subject_request_id":"{}","group_id":null,"request_status":"{}","api_version":"3.0","results_url":null,"results_count":null,"extensions":null}}"#,
                    id(key),
                    ["pending", "in_progress", "completed"][usize::try_from(key.1).unwrap()],
                );
                (key, url.clone(), body.into_bytes())
            })
            .collect();
        let signatures = raw::sign_all(&signer, unsigned.iter().map(|(_, _, body)| body.clone()).collect()).await;
        let group = unsigned
            .into_iter()
            .zip(signatures)
            .map(|((key, url, body), (_, signature))| Claimed { key, url, body, signature })
            .collect();
        claims.send(group).await.unwrap_or_else(|_| panic!("nobody delivers"));
    }
}

fn id((request, sequence): Key) -> Uuid {
    Uuid::from_u64_pair(request.unsigned_abs(), u64::from(sequence.unsigned_abs()))
}

/// Records outcomes, whatever has come in meanwhile.
async fn record_raw(db: Db, mut outcomes: mpsc::Receiver<Key>) -> u64 {
    let session = db.session().await.unwrap();
    let finish = session.prepared(FINISH).await.unwrap();
    let mut keys = Vec::new();
    let mut recorded = 0;
    while outcomes.recv_many(&mut keys, usize::try_from(GROUP).unwrap()).await > 0 {
        let (requests, sequences): (Vec<i64>, Vec<i16>) = keys.drain(..).unzip();
        recorded += session.raw().execute(&finish, &[&requests, &sequences]).await.unwrap();
    }
    recorded
}
