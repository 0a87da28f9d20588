//! Erasure: slices that are ready, until all of them are completed and what they have entered in the trail is sealed. Rows of
//! all three tables count.
//!
//! The raw program runs `DELETE … = ANY` of 1,000 mpids on the same three tables, one transaction for each thousand, on
//! as many connections as Lethe has slices in hand. It knows no lease, writes no receipts, asks nobody again and reports
//! nothing. Tables hold the profiles of all runs; event batches lie as they arrive, so that those of a profile are scattered.
//! Two layouts: people who have nothing to do with each other, as in life; and people in the order of their mpids, whose
//! rows lie next to each other, which is the best that both sides can meet.

use lethe_broker::topology::ERASURE_EXECUTION;
use lethe_db::Db;
use lethe_domain::request::ControllerId;
use lethe_testing::Worker;

use crate::bench::{Bench, DAILY};
use crate::broker::Link;
use crate::meter::Run;
use crate::people::{IDENTITIES, People, fill};
use crate::report::Row;
use crate::{requests, servers};

/// Requests of a slice, as the release cuts them.
const SLICE: u64 = 250;
/// Mpids that the raw program deletes in one transaction.
const AT_ONCE: usize = 1_000;
/// Slices in hand by default, hence connections of the raw program.
const CONNECTIONS: usize = 2;

/// In which order a run meets its people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Each far from the one before.
    Scattered,
    /// By mpid.
    Ordered,
}

/// A controller whose profiles are erased share by share.
pub(crate) struct Field {
    pub(crate) controller: ControllerId,
    people: People,
    shares: u64,
    layout: Layout,
}

impl Field {
    /// Fills a new controller with so many profiles for each of `shares` runs.
    pub(crate) async fn new(
        bench: &Bench,
        id: &str,
        shares: u64,
        profiles: u64,
        event_batches: u64,
        bytes: u64,
    ) -> Self {
        let (controller, _) = bench.controller(id).await;
        let people = People { profiles: shares * profiles, event_batches, bytes };
        fill(bench, &controller, people).await;
        bench.calendar(DAILY).await;
        Self { controller, people, shares, layout: Layout::Scattered }
    }

    /// The same, in another order.
    pub(crate) fn in_order(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    /// Removes what is left, so that nothing vacuums it while others are measured.
    pub(crate) async fn remove(self, bench: &Bench) {
        let sql = "SELECT partition_no FROM lethe.controllers WHERE controller_id = $1";
        let number: i32 = bench.world.one(sql, &[&self.controller]).await;
        let table = |name| format!("subject_data.{name}_p{number}");
        let tables = ["profiles", "profile_identities", "event_batches"].map(table).join(", ");
        bench.world.run(&format!("TRUNCATE {tables}")).await;
    }

    /// The profiles of a share, in the order in which they are met.
    pub(crate) fn mpids(&self, share: u64) -> Vec<i64> {
        let count = self.people.profiles / self.shares;
        let mpid = |index| match self.layout {
            Layout::Scattered => requests::person(share * count + index, self.people.profiles),
            Layout::Ordered => 1 + share + index * self.shares,
        };
        (0..count).map(|index| i64::try_from(mpid(index)).unwrap()).collect()
    }

    /// Rows of a share, all three tables.
    pub(crate) fn rows(&self) -> f64 {
        let profiles = self.people.profiles / self.shares;
        (profiles * (1 + IDENTITIES.len() as u64 + self.people.event_batches)) as f64
    }

    /// Rows of a share that are there.
    pub(crate) async fn left(&self, bench: &Bench, share: u64) -> i64 {
        let sql = "SELECT (SELECT count(*) FROM subject_data.profiles WHERE controller_id = $1 AND mpid = ANY ($2))
                        + (SELECT count(*) FROM subject_data.profile_identities WHERE controller_id = $1 AND mpid = ANY ($2))
                        + (SELECT count(*) FROM subject_data.event_batches WHERE controller_id = $1 AND mpid = ANY ($2))";
        bench.world.one(sql, &[&self.controller, &self.mpids(share)]).await
    }
}

pub(crate) async fn row(bench: &Bench, layout: Layout) -> Row {
    let (name, id) = match layout {
        Layout::Scattered => ("erasure, scattered", "erased"),
        Layout::Ordered => ("erasure, ordered", "erased-in-order"),
    };
    let mut row = Row::new(name, "rows/s", 0.8);
    let batches = bench.sizes.event_batches;
    let profiles = bench.sizes.erased_rows / (1 + IDENTITIES.len() as u64 + batches);
    let field = Field::new(bench, id, 2 * bench.sizes.runs, profiles, batches, 500).await.in_order(layout);
    for run in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, &field, 2 * run, 1).await.0);
        row.raw.push(raw(bench, &field, 2 * run + 1).await);
    }
    field.remove(bench).await;
    row
}

/// One request for each profile, released into slices; their ids.
async fn prepare(bench: &Bench, field: &Field, share: u64) -> Vec<i64> {
    let batch: i64 = bench
        .world
        .one(
            "INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
             SELECT 'erasure', now(), now(), max(version), 'released' FROM lethe.calendars RETURNING batch_id",
            &[],
        )
        .await;
    let made = "
        WITH people AS (
            SELECT mpid, (no - 1) / $4 AS slice FROM unnest($3::bigint[]) WITH ORDINALITY AS q (mpid, no)),
        slices AS (
            INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
            SELECT $1, $2, 'erasure', count(*), count(*), 0, 0 FROM people GROUP BY slice RETURNING slice_id),
        numbered AS (SELECT slice_id, row_number() OVER (ORDER BY slice_id) - 1 AS slice FROM slices),
        requests AS (
            INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status,
                                        lane, batch_id, slice_id, content_digest, group_digest, submitted_time,
                                        received_at, expected_completion_time, details_week)
            SELECT $2, gen_random_uuid(), '3.0', 'gdpr', 'erasure', 'pending', 'erasure', $1, slice_id,
                   sha256('x'), int8send(mpid), now(), now(), now(), w.week
              FROM people JOIN numbered USING (slice), lethe.week_of(now()) w
            RETURNING request_key, group_digest, details_week)
        INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, at_receipt)
        SELECT details_week, request_key, $2, 'x', ARRAY[('x' || encode(group_digest, 'hex'))::bit(64)::bigint]
          FROM requests";
    let session = bench.world.db.session().await.unwrap();
    let (mpids, slice) = (field.mpids(share), i64::try_from(SLICE).unwrap());
    session.execute(made, &[&batch, &field.controller, &mpids, &slice]).await.unwrap();
    bench
        .world
        .run(
            "UPDATE lethe.requests SET status = 'in_progress', in_progress_at = now();
             UPDATE lethe.slices s SET first_request = q.first, last_request = q.last
               FROM (SELECT slice_id, min(request_key) AS first, max(request_key) AS last
                       FROM lethe.requests GROUP BY slice_id) q
              WHERE s.slice_id = q.slice_id;
             ANALYZE lethe.requests, lethe.request_details, lethe.slices",
        )
        .await;
    bench.world.all("SELECT slice_id FROM lethe.slices ORDER BY slice_id", &[]).await
}

/// Lethe's side, with so many executors, and the scheduler, which seals the trail; and the most memory that the first of
/// them had.
pub(crate) async fn lethe(bench: &Bench, field: &Field, share: u64, executors: usize) -> (Run, Option<u64>) {
    bench.clean().await;
    let slices = prepare(bench, field, share).await;
    let workers = bench.workers(&[&vec!["erasure-executor"; executors][..], &["scheduler"]].concat(), DAILY).await;
    bench.is_led().await;
    bench.is_sealed().await;
    bench.settle().await;
    let link = Link::connect(bench).await;
    let meter = bench.meter(&workers);
    link.wake(ERASURE_EXECUTION.name, "slice_id", &slices).await;
    bench.reaches("SELECT count(*) FROM lethe.slices WHERE state = 'completed'", slices.len() as u64).await;
    bench.is_sealed().await;
    let run = meter.stop(field.rows());
    let memory = servers::peak_memory(workers[0].id());
    assert_eq!(field.left(bench, share).await, 0, "everything of this share is erased");
    assert_eq!(bench.count("SELECT count(*) FROM lethe.requests WHERE status <> 'completed'").await, 0);
    for worker in workers {
        Worker::stop(worker).await;
    }
    (run, memory)
}

/// The raw side.
pub(crate) async fn raw(bench: &Bench, field: &Field, share: u64) -> Run {
    bench.clean().await;
    let mpids = field.mpids(share);
    bench.settle().await;
    let meter = bench.raw_meter();
    delete_raw(&bench.raw_db, field.controller.as_str(), &mpids).await;
    let run = meter.stop(field.rows());
    assert_eq!(field.left(bench, share).await, 0, "everything of this share is deleted");
    run
}

const DELETES: [&str; 3] = [
    "DELETE FROM subject_data.profiles WHERE controller_id = $1 AND mpid = ANY ($2)",
    "DELETE FROM subject_data.profile_identities WHERE controller_id = $1 AND mpid = ANY ($2)",
    "DELETE FROM subject_data.event_batches WHERE controller_id = $1 AND mpid = ANY ($2)",
];

/// The raw program itself.
pub(crate) async fn delete_raw(db: &Db, controller: &str, mpids: &[i64]) {
    let share = mpids.len().div_ceil(CONNECTIONS).max(1);
    let connections = mpids.chunks(share).map(|mine| async move {
        let session = db.session().await.unwrap();
        let client = session.raw();
        let mut statements = Vec::new();
        for delete in DELETES {
            statements.push(session.prepared(delete).await.unwrap());
        }
        for group in mine.chunks(AT_ONCE) {
            let params: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&controller, &group];
            let (begun, one, two, three, committed) = futures_util::join!(
                client.batch_execute("BEGIN"),
                client.execute(&statements[0], &params),
                client.execute(&statements[1], &params),
                client.execute(&statements[2], &params),
                client.batch_execute("COMMIT"),
            );
            begun.and(one).and(two).and(three).unwrap();
            committed.unwrap();
        }
    });
    futures_util::future::join_all(connections).await;
}
