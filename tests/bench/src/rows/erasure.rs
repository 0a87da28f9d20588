//! Erasure: slices that are ready, until all of them are completed. Rows of all three tables count.
//!
//! The raw program runs `DELETE … = ANY` of 1,000 mpids on the same three tables, one transaction for each thousand, on
//! as many connections as Lethe has slices in hand. It knows no lease, writes no receipts, asks nobody again and reports
//! nothing. The profiles of a run are spread evenly over tables that hold those of all runs; event batches lie as they
//! arrive, so that those of a profile are scattered.

use lethe_broker::topology::ERASURE_EXECUTION;
use lethe_db::Db;
use lethe_domain::request::ControllerId;
use lethe_testing::Worker;

use crate::bench::{Bench, DAILY};
use crate::broker::{self, Link, Route};
use crate::meter::Run;
use crate::people::{IDENTITIES, People, fill};
use crate::report::Row;

/// Requests of a slice, as the release cuts them.
const SLICE: u64 = 250;
/// Mpids that the raw program deletes in one transaction.
const AT_ONCE: usize = 1_000;
/// Slices in hand by default, hence connections of the raw program.
const CONNECTIONS: usize = 2;

/// A controller whose profiles are erased share by share: those whose mpid leaves the remainder `share` by `shares`.
pub(crate) struct Field {
    pub(crate) controller: ControllerId,
    people: People,
    shares: u64,
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
        Self { controller, people, shares }
    }

    /// Removes what is left, so that nothing vacuums it while others are measured.
    pub(crate) async fn remove(self, bench: &Bench) {
        let sql = "SELECT partition_no FROM lethe.controllers WHERE controller_id = $1";
        let number: i32 = bench.world.one(sql, &[&self.controller]).await;
        let table = |name| format!("subject_data.{name}_p{number}");
        let tables = ["profiles", "profile_identities", "event_batches"].map(table).join(", ");
        bench.world.run(&format!("TRUNCATE {tables}")).await;
    }

    /// The profiles of a share.
    pub(crate) fn mpids(&self, share: u64) -> Vec<i64> {
        (1..=self.people.profiles).filter(|n| n % self.shares == share).map(|n| i64::try_from(n).unwrap()).collect()
    }

    /// Rows of a share, all three tables.
    pub(crate) fn rows(&self) -> f64 {
        let profiles = self.people.profiles / self.shares;
        (profiles * (1 + IDENTITIES.len() as u64 + self.people.event_batches)) as f64
    }

    /// Rows of a share that are there.
    pub(crate) async fn left(&self, bench: &Bench, share: u64) -> i64 {
        let count = |table| {
            format!(
                "(SELECT count(*) FROM subject_data.{table} WHERE controller_id = '{}' AND mpid % {} = {share})",
                self.controller, self.shares
            )
        };
        let sql =
            format!("SELECT {} + {} + {}", count("profiles"), count("profile_identities"), count("event_batches"));
        bench.count(&sql).await
    }
}

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("erasure", "rows/s", 0.8);
    let batches = bench.sizes.event_batches;
    let profiles = bench.sizes.erased_rows / (1 + IDENTITIES.len() as u64 + batches);
    let field = Field::new(bench, "erased", 2 * bench.sizes.runs, profiles, batches, 500).await;
    for run in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, &field, 2 * run, 1).await);
        row.raw.push(raw(bench, &field, 2 * run + 1).await);
    }
    field.remove(bench).await;
    row
}

/// One request for each profile, released into slices; returns how many slices there are.
async fn prepare(bench: &Bench, field: &Field, share: u64) -> u64 {
    let Field { controller, people, shares } = field;
    bench
        .world
        .run(&format!(
            "WITH batch AS (
                 INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
                 SELECT 'erasure', now(), now(), max(version), 'released' FROM lethe.calendars RETURNING batch_id),
             slices AS (
                 INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count,
                                           first_request, last_request)
                 SELECT batch_id, '{controller}', 'erasure', {SLICE}, {SLICE}, 0, 0
                   FROM batch, generate_series(0, ({profiles} / {shares} - 1) / {SLICE}) RETURNING slice_id),
             numbered AS (SELECT slice_id, row_number() OVER (ORDER BY slice_id) - 1 AS no FROM slices),
             people AS (
                 SELECT n AS mpid, (row_number() OVER (ORDER BY n) - 1) / {SLICE} AS no
                   FROM generate_series(1, {profiles}) n WHERE n % {shares} = {share}),
             requests AS (
                 INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status,
                                             lane, batch_id, slice_id, content_digest, group_digest, submitted_time,
                                             received_at, expected_completion_time)
                 SELECT '{controller}', gen_random_uuid(), '3.0', 'gdpr', 'erasure', 'pending', 'erasure', batch_id, slice_id,
                        sha256('x'), int8send(mpid), now(), now(), now()
                   FROM batch, people JOIN numbered USING (no) ORDER BY mpid RETURNING request_key, group_digest)
             INSERT INTO lethe.request_mpids (request_key, mpid, source)
             SELECT request_key, ('x' || encode(group_digest, 'hex'))::bit(64)::bigint, 'receipt' FROM requests;
             UPDATE lethe.requests SET status = 'in_progress', in_progress_at = now();
             UPDATE lethe.slices s SET first_request = q.first, last_request = q.last
               FROM (SELECT slice_id, min(request_key) AS first, max(request_key) AS last
                       FROM lethe.requests GROUP BY slice_id) q
              WHERE s.slice_id = q.slice_id;
             ANALYZE lethe.requests, lethe.request_mpids, lethe.slices",
            profiles = people.profiles,
        ))
        .await;
    u64::try_from(bench.count("SELECT count(*) FROM lethe.slices").await).unwrap()
}

/// Lethe's side, with so many executors.
pub(crate) async fn lethe(bench: &Bench, field: &Field, share: u64, executors: usize) -> Run {
    bench.clean().await;
    let slices = prepare(bench, field, share).await;
    bench.settle().await;
    let link = Link::connect(bench).await;
    let ids: Vec<i64> = bench.world.all("SELECT slice_id FROM lethe.slices ORDER BY slice_id", &[]).await;
    let wake_ups: Vec<Vec<u8>> = ids.iter().map(|id| format!(r#"{{"slice_id":{id}}}"#).into_bytes()).collect();
    let workers = bench.workers(&vec!["erasure-executor"; executors], &[]).await;
    let meter = bench.meter(&workers);
    let run = {
        let route = Route { exchange: "", routing_key: ERASURE_EXECUTION.name, reply_to: None };
        let persistent = lapin::BasicProperties::default().with_delivery_mode(2);
        link.publish_all(route, wake_ups.iter().map(Vec::as_slice), &persistent).await;
        broker::reaches(bench, "SELECT count(*) FROM lethe.slices WHERE state = 'completed'", slices).await;
        meter.stop(field.rows())
    };
    assert_eq!(field.left(bench, share).await, 0, "everything of this share is erased");
    assert_eq!(bench.count("SELECT count(*) FROM lethe.requests WHERE status <> 'completed'").await, 0);
    for worker in workers {
        Worker::stop(worker).await;
    }
    run
}

/// The raw side.
pub(crate) async fn raw(bench: &Bench, field: &Field, share: u64) -> Run {
    bench.clean().await;
    let mpids = field.mpids(share);
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
