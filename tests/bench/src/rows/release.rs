//! Release: from the moment at which a closed batch is due until it is released and all its triggers are published.
//!
//! The raw program takes the same steps of 500 requests, cut into slices of 250. One transaction for each step reads the
//! keys, inserts the slices, updates the requests and inserts their callbacks; then the triggers are published, with
//! confirms awaited as a set. It opens no sealed request, matches nothing again, applies no cap and holds no leadership.

use jiff::SignedDuration;
use lethe_broker::topology::ERASURE_EXECUTION;
use lethe_testing::Worker;

use super::intake::{PEOPLE, people};
use crate::bench::{Bench, DAILY};
use crate::broker::{self, Link, RAW_WAKE_UPS, Route};
use crate::meter::Run;
use crate::report::Row;
use crate::requests;

/// Requests of a step, and of a slice, by default.
const STEP: i64 = 500;
pub(crate) const SLICE: usize = 250;
const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("release", "requests/s", 0.6);
    people(bench, PEOPLE, bench.sizes.profiles).await;
    for _ in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, bench.sizes.released_requests).await.0);
        row.raw.push(raw(bench, bench.sizes.released_requests).await);
    }
    row
}

/// Records a batch through the product's own intake, in this process.
async fn prepare(bench: &Bench, count: u64) {
    bench.clean().await;
    let made = requests::erasures(count, bench.sizes.profiles, &[URL.to_owned()]);
    requests::record(bench, PEOPLE, made).await;
    bench.world.run("ANALYZE lethe.requests, lethe.request_mpids, lethe.callbacks").await;
}

/// Lethe's side; and the most memory that the scheduler had.
pub(crate) async fn lethe(bench: &Bench, count: u64) -> (Run, Option<u64>) {
    prepare(bench, count).await;
    let tick: jiff::Timestamp = bench.world.one("SELECT max(tick_at) FROM lethe.batches", &[]).await;
    // A short interval, so that what is measured is the release and not the wait until the scheduler looks.
    let settings: Vec<_> = DAILY.iter().chain(&[("LETHE_SCHEDULER_INTERVAL", "20ms")]).copied().collect();
    let workers = bench.workers(&["scheduler"], &settings).await;
    while bench.count("SELECT count(*) FROM lethe.leaders WHERE holder IS NOT NULL").await == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // What the intake left to be sealed is not the release's work; its own entries are.
    broker::reaches(bench, "SELECT count(*) FROM (SELECT FROM lethe.audit_unsealed LIMIT 1) one", 0).await;
    bench.settle().await;
    let link = Link::connect(bench).await;
    let meter = bench.meter(&workers);
    bench.set_clock(tick.checked_add(SignedDuration::from_secs(1)).unwrap()).await;
    broker::reaches(bench, "SELECT count(*) FROM lethe.batches WHERE state = 'released'", 1).await;
    let slices = u32::try_from(bench.count("SELECT count(*) FROM lethe.slices").await).unwrap();
    while link.ready(ERASURE_EXECUTION.name).await < slices {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let run = meter.stop(count as f64);
    let memory = crate::servers::peak_memory(workers[0].id());
    assert_eq!(bench.count("SELECT count(*) FROM lethe.requests WHERE status <> 'in_progress'").await, 0);
    for worker in workers {
        Worker::stop(worker).await;
    }
    bench.world.run("UPDATE lethe.clock SET shift = '0'").await;
    (run, memory)
}

/// The raw side, on copies of the same rows.
async fn raw(bench: &Bench, count: u64) -> Run {
    prepare(bench, count).await;
    bench
        .world
        .run(
            "INSERT INTO raw.requests OVERRIDING SYSTEM VALUE SELECT * FROM lethe.requests ORDER BY request_key;
             INSERT INTO raw.callbacks SELECT * FROM lethe.callbacks ORDER BY request_key;
             ANALYZE raw.requests, raw.callbacks",
        )
        .await;
    bench.settle().await;
    let run = release_raw(bench, count).await;
    assert_eq!(bench.count("SELECT count(*) FROM raw.requests WHERE status <> 'in_progress'").await, 0);
    run
}

const TAKE: &str = "
    SELECT request_key FROM raw.requests WHERE status = 'pending' AND request_key > $1 ORDER BY request_key LIMIT $2";
const INSERT_SLICES: &str = "
    INSERT INTO raw.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
    SELECT 1, $1, 'erasure', count, count, 0, 0 FROM unnest($2::int[]) AS count RETURNING slice_id";
const UPDATE: &str = "
    UPDATE raw.requests r SET status = 'in_progress', in_progress_at = now(), slice_id = q.slice_id
      FROM unnest($1::bigint[], $2::bigint[]) AS q (request_key, slice_id) WHERE r.request_key = q.request_key";
const INSERT_CALLBACKS: &str = "
    INSERT INTO raw.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                               expected_completion_time, state, next_attempt_at, created_at)
    SELECT gen_random_uuid(), key, 0, 1, 1 + key % 50, 'in_progress', now(), 'ready', now(), now()
      FROM unnest($1::bigint[]) AS key";

/// The raw program itself: everything in `raw.requests` that is pending.
pub(crate) async fn release_raw(bench: &Bench, count: u64) -> Run {
    let link = Link::connect(bench).await;
    link.raw_queue(RAW_WAKE_UPS).await;
    let session = bench.raw_db.session().await.unwrap();
    let client = session.raw();
    let mut statements = Vec::new();
    for sql in [TAKE, INSERT_SLICES, UPDATE, INSERT_CALLBACKS] {
        statements.push(session.prepared(sql).await.unwrap());
    }
    let meter = bench.raw_meter();
    let mut after = 0_i64;
    loop {
        let (begun, taken) = futures_util::join!(client.batch_execute("BEGIN"), async {
            client.query(&statements[0], &[&after, &STEP]).await
        });
        begun.unwrap();
        let keys: Vec<i64> = taken.unwrap().iter().map(|row| row.get(0)).collect();
        let Some(last) = keys.last() else {
            client.batch_execute("COMMIT").await.unwrap();
            break;
        };
        after = *last;
        let counts: Vec<i32> = keys.chunks(SLICE).map(|slice| i32::try_from(slice.len()).unwrap()).collect();
        let slices = client.query(&statements[1], &[&PEOPLE, &counts]).await.unwrap();
        let slices: Vec<i64> = slices.iter().map(|row| row.get(0)).collect();
        let of: Vec<i64> = (0..keys.len()).map(|index| slices[index / SLICE]).collect();
        let (updated, inserted, committed) = futures_util::join!(
            async { client.execute(&statements[2], &[&keys, &of]).await },
            async { client.execute(&statements[3], &[&keys]).await },
            client.batch_execute("COMMIT"),
        );
        updated.and(inserted).unwrap();
        committed.unwrap();
        let triggers: Vec<Vec<u8>> = slices.iter().map(|id| format!(r#"{{"slice_id":{id}}}"#).into_bytes()).collect();
        let route = Route { exchange: "", routing_key: RAW_WAKE_UPS, reply_to: None };
        let persistent = lapin::BasicProperties::default().with_delivery_mode(2);
        link.publish_all(route, triggers.iter().map(Vec::as_slice), &persistent).await;
    }
    meter.stop(count as f64)
}
