//! Executors beside neighbours of any kind: how long a controller waits while the tables of another are locked, and how long
//! the largest subjects take where a statement may take three seconds.

use std::time::{Duration, Instant};

use lethe_broker::{Broker, Publisher};
use lethe_domain::request::{SliceId, Stage};
use lethe_runtime::wake;
use lethe_testing::Worker;

use super::told;
use crate::bench::{Bench, DAILY};
use crate::report::Report;

const DELAY: Duration = Duration::from_secs(5);
const BUSY: &str = "busy";
const QUIET: &str = "quiet";
const LARGE: &str = "large";

/// Releases so many slices of one request each, on the profiles that `mpids` makes.
async fn release(bench: &Bench, controller: &str, slices: u64, mpids: &str) -> Vec<i64> {
    bench
        .world
        .run(&format!(
            "WITH batch AS (
                 INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
                 SELECT 'erasure', clock_timestamp(), clock_timestamp(), max(version), 'released' FROM lethe.calendars
                 RETURNING batch_id),
             made AS (
                 INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
                 SELECT batch_id, '{controller}', 'erasure', 1, 1, 0, 0 FROM batch, generate_series(1, {slices})
                 RETURNING slice_id, batch_id),
             requests AS (
                 INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status,
                                             lane, batch_id, slice_id, content_digest, submitted_time, received_at,
                                             expected_completion_time, details_week)
                 SELECT '{controller}', gen_random_uuid(), '3.0', 'gdpr', 'erasure', 'pending', 'erasure', batch_id, slice_id,
                        sha256('x'), now(), now(), now(), w.week
                   FROM made, lethe.week_of(now()) w RETURNING request_key, details_week)
             INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, named)
             SELECT details_week, request_key, '{controller}', 'x', ARRAY (SELECT mpid FROM {mpids} AS mpid) FROM requests;
             UPDATE lethe.requests SET status = 'in_progress', in_progress_at = now()
              WHERE controller_id = '{controller}' AND status = 'pending';
             UPDATE lethe.slices s SET first_request = r.request_key, last_request = r.request_key
               FROM lethe.requests r WHERE r.slice_id = s.slice_id AND s.controller_id = '{controller}' AND s.first_request = 0"
        ))
        .await;
    let ready = "SELECT slice_id FROM lethe.slices WHERE controller_id = $1 AND state = 'ready' ORDER BY slice_id";
    let ids: Vec<i64> = bench.world.all(ready, &[&controller]).await;
    let publisher = Publisher::new(Broker::new(&bench.world.amqp_url, "lethe-bench").unwrap());
    wake::slices(&publisher, Stage::Erasure, ids.iter().copied().map(SliceId)).await;
    ids
}

async fn ready(bench: &Bench, controller: &str) -> i64 {
    let sql = "SELECT count(*) FROM lethe.slices WHERE controller_id = $1 AND state = 'ready'";
    bench.world.one(sql, &[&controller]).await
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    while !condition().await {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// How long one erasure of a controller takes while another has thousands of slices that stand before it, and tables that
/// somebody has locked.
pub(crate) async fn neighbour(bench: &Bench, size: u64, report: &mut Report) {
    for controller in [BUSY, QUIET] {
        bench.controller(controller).await;
    }
    bench.calendar(DAILY).await;
    bench.world.person(&QUIET.parse().unwrap(), 1, "ada@example.com", 10).await;
    release(bench, BUSY, bench.sizes.scale_slices, "generate_series(1, 250)").await;
    let number: i32 =
        bench.world.one("SELECT partition_no FROM lethe.controllers WHERE controller_id = $1", &[&BUSY]).await;
    let lock = bench.world.db.begin("lock").await.unwrap();
    lock.batch_execute(&format!("LOCK TABLE subject_data.profiles_p{number} IN SHARE MODE")).await.unwrap();
    let workers = bench.workers(&["erasure-executor", "scheduler"], DAILY).await;
    let begun = "SELECT count(*) FROM lethe.slices WHERE controller_id = 'busy' AND state = 'ready' AND attempts > 0";
    until(async || bench.count(begun).await > 0).await;
    let started = Instant::now();
    release(bench, QUIET, 1, "generate_series(1, 1)").await;
    until(async || ready(bench, QUIET).await == 0).await;
    told(report, size, "an erasure beside a controller with locked tables", started.elapsed(), DELAY);
    for worker in workers {
        Worker::stop(worker).await;
    }
    lock.rollback().await;
    // The rows after this one find nothing left of it.
    bench
        .world
        .run(
            "UPDATE lethe.requests SET status = 'completed', completed_at = now()
              WHERE controller_id = 'busy' AND status = 'in_progress';
             UPDATE lethe.slices SET state = 'completed', completed_at = now(), lease_token = NULL, lease_expires_at = NULL
              WHERE controller_id = 'busy' AND state = 'ready';
             DELETE FROM lethe.pauses",
        )
        .await;
    bench.world.purge("dsr.erasure-execution").await;
}

/// A subject with thousands of large event batches, and an approved request with hundreds of thousands of profiles, where no
/// statement may take longer than three seconds.
pub(crate) async fn large(bench: &Bench, size: u64, report: &mut Report) {
    bench.controller(LARGE).await;
    bench.calendar(DAILY).await;
    let (batches, profiles) = (bench.sizes.scale_batches, bench.sizes.scale_profiles);
    // In pieces: making one takes as long as a statement may.
    for begin in (0..batches).step_by(500) {
        let end = batches.min(begin + 500);
        bench
            .world
            .run(&format!(
                "INSERT INTO subject_data.event_batches (controller_id, mpid, body)
                 SELECT 'large', 1, json_build_object('mpid', 1, 'noise', (
                            SELECT string_agg(md5(random()::text || n || part), '') FROM generate_series(1, 6250) AS part))
                   FROM generate_series({begin} + 1, {end}) AS n"
            ))
            .await;
    }
    bench
        .world
        .run(&format!(
            "INSERT INTO subject_data.profiles (controller_id, mpid) SELECT 'large', n FROM generate_series(1, {profiles}) n;
             INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
             SELECT 'large', 'email', 'all@example.com', n FROM generate_series(1, {profiles}) n"
        ))
        .await;
    let separator = if bench.world.database_url.contains('?') { '&' } else { '?' };
    let hurried = format!("{}{separator}options=-c%20statement_timeout%3D3s", bench.world.database_url);
    let settings: Vec<_> = DAILY.iter().copied().chain([("DATABASE_URL", hurried.as_str())]).collect();
    let workers = bench.workers(&["erasure-executor"], &settings).await;
    for (what, mpids) in [
        (format!("a subject with {batches} event batches of 200 kB"), "generate_series(1, 1)".to_owned()),
        (format!("a request with {profiles} profiles"), format!("generate_series(1, {profiles})")),
    ] {
        let started = Instant::now();
        release(bench, LARGE, 1, &mpids).await;
        until(async || ready(bench, LARGE).await == 0).await;
        let figure = format!("{:.1} s", started.elapsed().as_secs_f64());
        report.fact(format!("{what}, no statement over 3 s, {size} requests"), figure, "it ends");
    }
    let left = "SELECT (SELECT count(*) FROM subject_data.profiles WHERE controller_id = 'large')
                     + (SELECT count(*) FROM subject_data.event_batches WHERE controller_id = 'large')";
    assert_eq!(bench.count(left).await, 0, "everything of it is erased");
    for worker in workers {
        Worker::stop(worker).await;
    }
}
