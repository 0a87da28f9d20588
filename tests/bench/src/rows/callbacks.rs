//! Callbacks: signed deliveries to many endpoints, from the wake-ups until every outcome is recorded.
//!
//! The raw program claims callbacks in groups, signs on all cores, posts with the same client library over connections
//! that are kept, with as many deliveries in flight as Lethe may have (the limit of each endpoint times the endpoints),
//! and records outcomes in groups (state and attempt). The bodies are as long and as many. It opens no sealed request,
//! keeps no order, and knows neither breakers nor backoff. Plain http on both sides: keep-alive leaves nothing of TLS but
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
use crate::broker::{self, Link, Route};
use crate::meter::Run;
use crate::receiver::Receivers;
use crate::report::Row;
use crate::requests;

/// By default in flight to one endpoint.
const PER_ENDPOINT: u64 = 8;
/// Callbacks that are claimed, and outcomes that are recorded, in one statement.
const GROUP: i64 = 256;
const CONTROLLER: &str = "called-back";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("callbacks", "deliveries/s", 0.85);
    let receivers = Receivers::start(bench.sizes.endpoints).await;
    for _ in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, &receivers, bench.sizes.callbacks, 1).await);
        row.raw.push(raw(bench, &receivers, bench.sizes.callbacks).await);
    }
    row
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
    let wake_ups: Vec<Vec<u8>> = endpoints.iter().map(|id| format!(r#"{{"endpoint_id":{id}}}"#).into_bytes()).collect();
    // There is one controller only: its share is all of it, as the raw program's is.
    let share = [("LETHE_CALLBACK_DELIVERIES_PER_CONTROLLER", "1024")];
    let workers = bench.workers(&vec!["callback-courier"; couriers], &share).await;
    let delivered = receivers.expect(count);
    let meter = bench.meter(&workers);
    let route = Route { exchange: "", routing_key: CALLBACK_DELIVERY.name, reply_to: None };
    let persistent = lapin::BasicProperties::default().with_delivery_mode(2);
    // Once for each courier: a wake-up reaches one of them.
    for _ in 0..couriers {
        link.publish_all(route, wake_ups.iter().map(Vec::as_slice), &persistent).await;
    }
    delivered.await;
    broker::reaches(bench, "SELECT count(*) FROM lethe.callbacks WHERE state = 'ready'", 0).await;
    let run = meter.stop(count as f64);
    assert_eq!(bench.count("SELECT count(*) FROM lethe.callback_attempts").await, i64::try_from(count).unwrap());
    for worker in workers {
        Worker::stop(worker).await;
    }
    run
}

/// The raw side, on copies of the same rows.
async fn raw(bench: &Bench, receivers: &Receivers, count: u64) -> Run {
    prepare(bench, receivers, count).await;
    bench.world.run("INSERT INTO raw.callbacks SELECT * FROM lethe.callbacks; ANALYZE raw.callbacks").await;
    bench.settle().await;
    let delivered = receivers.expect(count);
    let run = deliver_raw(bench, receivers, count).await;
    delivered.await;
    run
}

const CLAIM: &str = "
    UPDATE raw.callbacks c SET lease_token = $1, lease_expires_at = now() + interval '60 s', attempts = attempts + 1
      FROM (SELECT callback_id FROM raw.callbacks
             WHERE endpoint_id = ANY ($3) AND state = 'ready' AND next_attempt_at <= now() AND lease_token IS NULL
             LIMIT $2 FOR UPDATE SKIP LOCKED) due
     WHERE c.callback_id = due.callback_id
    RETURNING c.callback_id, c.request_key, c.endpoint_id, c.request_status";
const FINISH: &str = "
    UPDATE raw.callbacks SET state = 'delivered', lease_token = NULL, lease_expires_at = NULL, finished_at = now()
     WHERE callback_id = ANY ($1)";
const LOG: &str = "
    INSERT INTO raw.callback_attempts (callback_id, attempt, started_at, duration, status_code)
    SELECT id, 1, now(), interval '1 ms', 202 FROM unnest($1::uuid[]) AS id";

struct Claimed {
    id: Uuid,
    url: String,
    body: Vec<u8>,
    signature: String,
}

/// The raw program itself: `count` callbacks out of `raw.callbacks`.
pub(crate) async fn deliver_raw(bench: &Bench, receivers: &Receivers, count: u64) -> Run {
    let client = reqwest::Client::builder().no_proxy().http1_only().pool_max_idle_per_host(16).build().unwrap();
    let limit = Arc::new(Semaphore::new(usize::try_from(PER_ENDPOINT * bench.sizes.endpoints).unwrap()));
    let signer = raw::signer(bench);
    let meter = bench.raw_meter();
    let (sender, outcomes) = mpsc::channel::<Uuid>(1_024);
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
                    .header("X-Lethe-Callback-Id", callback.id.to_string())
                    .timeout(Duration::from_secs(30))
                    .body(callback.body);
                assert!(request.send().await.unwrap().status().is_success());
                drop(permit);
                sender.send(callback.id).await.unwrap();
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
        let unsigned: Vec<(Uuid, String, Vec<u8>)> = rows
            .iter()
            .map(|row| {
                let (key, endpoint): (i64, i64) = (row.get(1), row.get(2));
                let url = &urls[usize::try_from(endpoint).unwrap() % urls.len()];
                let body = format!(
                    r#"{{"controller_id":"{CONTROLLER}","expected_completion_time":"2026-12-09T12:30:00Z","status_callback_url":"{url}","subject_request_id":"{}","group_id":null,"request_status":"{}","api_version":"3.0","results_url":null,"results_count":null,"extensions":null}}"#,
                    Uuid::from_u128(u128::from(key.unsigned_abs())),
                    row.get::<_, &str>(3),
                );
                (row.get(0), url.clone(), body.into_bytes())
            })
            .collect();
        let signatures = raw::sign_all(&signer, unsigned.iter().map(|(_, _, body)| body.clone()).collect()).await;
        let group = unsigned
            .into_iter()
            .zip(signatures)
            .map(|((id, url, body), (_, signature))| Claimed { id, url, body, signature })
            .collect();
        claims.send(group).await.unwrap_or_else(|_| panic!("nobody delivers"));
    }
}

/// Records outcomes, whatever has come in meanwhile.
async fn record_raw(db: Db, mut outcomes: mpsc::Receiver<Uuid>) -> u64 {
    let session = db.session().await.unwrap();
    let client = session.raw();
    let (finish, log) = (session.prepared(FINISH).await.unwrap(), session.prepared(LOG).await.unwrap());
    let mut ids = Vec::new();
    let mut recorded = 0;
    while outcomes.recv_many(&mut ids, usize::try_from(GROUP).unwrap()).await > 0 {
        let (begun, finished, logged, committed) = futures_util::join!(
            client.batch_execute("BEGIN"),
            async { client.execute(&finish, &[&ids]).await },
            async { client.execute(&log, &[&ids]).await },
            client.batch_execute("COMMIT"),
        );
        begun.unwrap();
        finished.and(logged).unwrap();
        committed.unwrap();
        recorded += ids.len() as u64;
        ids.clear();
    }
    recorded
}
