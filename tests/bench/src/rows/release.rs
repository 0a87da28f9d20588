//! Release: from the moment at which a closed batch is due until all its requests are in progress, with an executor that
//! takes what is released. The requests match nobody, at the same number of look-ups, so that deleting is not in it.
//!
//! The raw program takes the same steps of 500 requests, cut into slices of 250. One transaction for each step reads the
//! keys, inserts the slices, updates the requests and inserts their callbacks; then the triggers are published, with
//! confirms awaited as a set. It opens no sealed request, applies no cap and holds no leadership. The row `release` matches
//! nothing again; `release, matched` looks each identity up once more, as the contract asks.

use jiff::SignedDuration;
use lethe_testing::Worker;

use super::intake::{self, LookUp, PEOPLE, people};
use super::raw::RawRequest;
use crate::bench::{Bench, DAILY};
use crate::broker::{Link, RAW_WAKE_UPS};
use crate::meter::Run;
use crate::report::Row;
use crate::requests::{self, Made};

/// Requests of a step, and of a slice, by default.
const STEP: usize = 500;
pub(crate) const SLICE: usize = 250;
const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn rows(bench: &Bench) -> [Row; 2] {
    let (mut floor, mut matched) =
        (Row::new("release", "requests/s", 0.6), Row::new("release, matched", "requests/s", 0.5));
    people(bench, PEOPLE, bench.sizes.profiles).await;
    for _ in 0..bench.sizes.runs {
        let (run, _) = lethe(bench, bench.sizes.released_requests).await;
        floor.lethe.push(run);
        matched.lethe.push(run);
        floor.raw.push(raw(bench, bench.sizes.released_requests, false).await);
        matched.raw.push(raw(bench, bench.sizes.released_requests, true).await);
    }
    [floor, matched]
}

/// Requests for people who are not there.
fn made(bench: &Bench, count: u64) -> Vec<Made> {
    requests::erasures_from(bench.sizes.profiles, count, &[URL.to_owned()])
}

/// Lethe's side; and the most memory that the scheduler had.
pub(crate) async fn lethe(bench: &Bench, count: u64) -> (Run, Option<u64>) {
    bench.clean().await;
    // Through the product's own intake, in this process.
    requests::record(bench, PEOPLE, made(bench, count)).await;
    bench.world.run("ANALYZE lethe.requests, lethe.request_details, lethe.callbacks").await;
    let tick: jiff::Timestamp = bench.world.one("SELECT max(tick_at) FROM lethe.batches", &[]).await;
    // A short interval, so that what is measured is the release and not the wait until the scheduler looks.
    let settings: Vec<_> = DAILY.iter().chain(&[("LETHE_SCHEDULER_INTERVAL", "20ms")]).copied().collect();
    let workers = bench.workers(&["scheduler", "erasure-executor"], &settings).await;
    bench.is_led().await;
    // What the intake left to be sealed is not the release's work; its own entries are.
    bench.is_sealed().await;
    bench.settle().await;
    let meter = bench.meter(&workers);
    bench.set_clock(tick.checked_add(SignedDuration::from_secs(1)).unwrap()).await;
    bench.reaches("SELECT count(*) FROM (SELECT FROM lethe.requests WHERE status = 'pending' LIMIT 1) one", 0).await;
    let run = meter.stop(count as f64);
    let memory = crate::servers::peak_memory(workers[0].id());
    assert_eq!(
        bench
            .count("SELECT count(*) FROM lethe.request_details WHERE at_receipt IS NOT NULL OR at_release IS NOT NULL")
            .await,
        0,
        "they match nobody"
    );
    for worker in workers {
        Worker::stop(worker).await;
    }
    bench.world.run("UPDATE lethe.clock SET shift = '0'").await;
    (run, memory)
}

/// The raw side, on as many requests of its own.
async fn raw(bench: &Bench, count: u64, matched: bool) -> Run {
    bench.clean().await;
    let made: Vec<RawRequest> =
        made(bench, count).into_iter().map(|made| RawRequest::read(made.body, PEOPLE, None)).collect();
    let look_up = LookUp::new(bench, &[PEOPLE.to_owned()]).await;
    for group in made.chunks(STEP) {
        intake::record(&bench.raw_db, &look_up, group).await;
    }
    bench.world.run("ANALYZE raw.requests, raw.callbacks").await;
    bench.settle().await;
    let run = release_raw(bench, count, if matched { &made } else { &[] }).await;
    assert_eq!(bench.count("SELECT count(*) FROM raw.requests WHERE status <> 'in_progress'").await, 0);
    run
}

const TAKE: &str = "
    SELECT request_key FROM raw.requests WHERE status = 'pending' AND request_key > $1 ORDER BY request_key LIMIT $2";
const INSERT_SLICES: &str = "
    INSERT INTO raw.slices (controller_id, request_count)
    SELECT $1, count FROM unnest($2::int[]) AS count RETURNING slice_id";
const UPDATE: &str = "
    UPDATE raw.requests r SET status = 'in_progress', slice_id = q.slice_id
      FROM unnest($1::bigint[], $2::bigint[]) AS q (request_key, slice_id) WHERE r.request_key = q.request_key";
const INSERT_CALLBACKS: &str = "
    INSERT INTO raw.callbacks (request_key, url_no, sequence, endpoint_id, state)
    SELECT key, 0, 1, 1 + key % 50, 'ready' FROM unnest($1::bigint[]) AS key";

/// The raw program itself: everything in `raw.requests` that is pending; the identities of `matched` are looked up again.
pub(crate) async fn release_raw(bench: &Bench, count: u64, matched: &[RawRequest]) -> Run {
    let link = Link::connect(bench).await;
    link.raw_queue(RAW_WAKE_UPS).await;
    let session = bench.raw_db.session().await.unwrap();
    let client = session.raw();
    let mut statements = Vec::new();
    for sql in [TAKE, INSERT_SLICES, UPDATE, INSERT_CALLBACKS] {
        statements.push(session.prepared(sql).await.unwrap());
    }
    let look_up = LookUp::new(bench, &[PEOPLE.to_owned()]).await;
    let mut steps = matched.chunks(STEP);
    let step = i64::try_from(STEP).unwrap();
    let meter = bench.raw_meter();
    let mut after = 0_i64;
    loop {
        let requests: Vec<&RawRequest> = steps.next().unwrap_or_default().iter().collect();
        let (begun, taken, found) = futures_util::join!(
            client.batch_execute("BEGIN"),
            async { client.query(&statements[0], &[&after, &step]).await },
            look_up.find(&session, &requests),
        );
        begun.unwrap();
        assert_eq!(found, [], "they match nobody");
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
        link.wake(RAW_WAKE_UPS, "slice_id", &slices).await;
    }
    meter.stop(count as f64)
}
