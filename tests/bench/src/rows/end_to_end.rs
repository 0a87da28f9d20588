//! End to end: erasure requests from the publisher's first message until the last callback is delivered; three callbacks
//! each (pending, in progress, completed), all workers at once, a calendar that ticks every second.
//!
//! The raw program is the raw work of the stages, one after the other, each on all the requests: intake, release, the
//! deletes with the update to `completed` and the last callbacks, and three times the deliveries. On as many cores as the
//! stages can keep busy that is what the work costs.

use std::time::Instant;

use lethe_testing::Worker;
use lethe_testing::worker::{SECONDS, queue_workers};

use super::erasure::Field;
use super::{callbacks, erasure, intake, release};
use crate::bench::Bench;
use crate::broker::Link;
use crate::meter::Run;
use crate::receiver::Receivers;
use crate::report::Row;
use crate::requests;

const CONTROLLER: &str = "chained";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("end to end", "requests/s", 0.6);
    let receivers = Receivers::start(bench.sizes.endpoints).await;
    let count = bench.sizes.chained_requests;
    // All people of all runs in one table; a run asks for its share of them.
    let shares = 2 * bench.sizes.runs;
    let field = Field::new(bench, CONTROLLER, shares, count, bench.sizes.event_batches, 500).await;
    for run in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, &receivers, &field, 2 * run).await);
        row.raw.push(raw(bench, &receivers, &field, 2 * run + 1).await);
    }
    field.remove(bench).await;
    row
}

async fn lethe(bench: &Bench, receivers: &Receivers, field: &Field, share: u64) -> Run {
    bench.clean().await;
    let made = requests::of_people(&field.mpids(share), &receivers.urls);
    let count = made.len() as u64;
    let link = Link::connect(bench).await;
    let workers = bench.workers(&queue_workers(), SECONDS).await;
    bench.is_led().await;
    let delivered = receivers.expect(3 * count);
    let meter = bench.meter(&workers);
    link.publish(&[CONTROLLER.to_owned()], "dsr.requests", None, &made).await;
    delivered.await;
    bench.reaches("SELECT count(*) FROM lethe.callbacks WHERE state <> 'delivered'", 0).await;
    let run = meter.stop(count as f64);
    assert_eq!(field.left(bench, share).await, 0, "everything of this share is erased");
    for worker in workers {
        Worker::stop(worker).await;
    }
    run
}

async fn raw(bench: &Bench, receivers: &Receivers, field: &Field, share: u64) -> Run {
    bench.clean().await;
    let mpids = field.mpids(share);
    let made = requests::of_people(&mpids, &receivers.urls);
    let count = made.len() as u64;
    let meter = bench.raw_meter();
    let started = Instant::now();
    intake::record_raw(bench, &[CONTROLLER.to_owned()], &made, false).await;
    callbacks::deliver_raw(bench, receivers, count).await;
    release::release_raw(bench, count, &[]).await;
    callbacks::deliver_raw(bench, receivers, count).await;
    erasure::delete_raw(&bench.raw_db, CONTROLLER, &mpids).await;
    complete(bench).await;
    callbacks::deliver_raw(bench, receivers, count).await;
    let run = meter.stop_at(count as f64, started.elapsed());
    assert_eq!(field.left(bench, share).await, 0, "everything of this share is deleted");
    run
}

/// The status `completed` and its callbacks, slice by slice.
async fn complete(bench: &Bench) {
    let session = bench.raw_db.session().await.unwrap();
    let client = session.raw();
    let update = "
        WITH done AS (
            UPDATE raw.requests SET status = 'completed' WHERE request_key = ANY ($1) RETURNING request_key)
        INSERT INTO raw.callbacks (request_key, url_no, sequence, endpoint_id, state)
        SELECT request_key, 0, 2, 1 + request_key % 50, 'ready' FROM done";
    let update = session.prepared(update).await.unwrap();
    let rows = client.query("SELECT request_key FROM raw.requests ORDER BY request_key", &[]).await.unwrap();
    let keys: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    for slice in keys.chunks(release::SLICE) {
        client.execute(&update, &[&slice]).await.unwrap();
    }
}
