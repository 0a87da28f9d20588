//! A clock that is doubted: where PostgreSQL's is ahead of the time that has passed, nothing is done that cannot be undone.

use jiff::civil::Date;
use lethe_testing::cli::{json, lethe};
use lethe_testing::wait::{becomes, eventually, seconds, stays};
use lethe_testing::{Publisher, Request, Worker, World};

const AHEAD: &str = "UPDATE lethe.clock SET drift = '30 days'";
const BACK: &str = "UPDATE lethe.clock SET drift = '0'";

async fn readiness(worker: &Worker) -> (u16, String) {
    worker.get("/readyz").await.unwrap_or_default()
}

async fn doubts(worker: &Worker) {
    eventually("the clock is doubted", seconds(10), async || {
        let (status, text) = readiness(worker).await;
        status == 503 && text.contains("clock")
    })
    .await;
}

/// Until then a jump would be the first clock that it sees.
async fn believes(world: &World) {
    eventually("a clock is believed", seconds(15), async || {
        world.one::<bool>("SELECT known_clock IS NOT NULL FROM lethe.leaders", &[]).await
    })
    .await;
}

fn key_of(world: &World, day: Date) -> std::path::PathBuf {
    world.folder.join("keys").join(format!("{day}.key"))
}

#[tokio::test]
async fn a_clock_that_jumps_ahead_closes_releases_and_destroys_nothing_until_an_operator_agrees() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let scheduler = Worker::start(&world, "scheduler", &[("LETHE_RETENTION", "10d")]).await;
    let _matcher = Worker::start(&world, "identity-matcher", &[]).await;
    let publisher = Publisher::connect(&world).await;
    let (request, cancelled) = (Request::erasure("ada@example.com"), Request::erasure("eve@example.com"));
    publisher.request("acme", &request).await;
    publisher.request("acme", &cancelled).await;
    publisher.cancel("acme", &cancelled.id).await;
    let today = world.now().await.to_zoned(jiff::tz::TimeZone::UTC).date();
    let key = key_of(&world, today.tomorrow().unwrap());
    std::fs::write(&key, b"sealed").unwrap();
    believes(&world).await;

    let untouched = async || {
        let open = "SELECT count(*) FROM lethe.batches WHERE state <> 'open'";
        let kept = "SELECT count(*) FROM lethe.request_details";
        world.one::<i64>(open, &[]).await == 0 && world.one::<i64>(kept, &[]).await == 2 && key.exists()
    };
    world.run(AHEAD).await;
    doubts(&scheduler).await;
    stays("nothing is done that cannot be undone", seconds(3), untouched).await;
    assert!(scheduler.log().contains("ahead of the time that has passed"));
    let metrics = scheduler.get("/metrics").await.unwrap().1;
    assert!(metrics.lines().any(|line| line.starts_with("lethe_clock_ahead_seconds 25")), "{metrics}");
    let shown = json(&world, &["clock", "show"]).await;
    assert_eq!(shown["doubted"], true, "{shown}");
    let doctor = lethe(&world, &["doctor"]).await;
    assert!(doctor.code == Some(1) && doctor.out.contains("lethe clock agree"), "{}", doctor.out);

    world.run(BACK).await;
    scheduler.ready().await;
    stays("it was nothing", seconds(1), untouched).await;
    world.run(AHEAD).await;
    doubts(&scheduler).await;
    json(&world, &["clock", "agree"]).await;
    world.reaches(&request.id, "in_progress").await;
    eventually("the keys of days that are over go", seconds(10), async || !key.exists()).await;
    let agreed = "SELECT count(*) FROM lethe.audit_entries WHERE event = 'clock.agreed'";
    assert_eq!(world.one::<i64>(agreed, &[]).await, 1, "it is on the trail");
    scheduler.ready().await;
}

#[tokio::test]
async fn a_new_leader_is_not_fooled_and_the_shift_of_tests_counts_as_agreed() {
    let world = World::new().await;
    let first = Worker::start(&world, "scheduler", &[]).await;
    believes(&world).await;
    first.kill().await;
    world.run(AHEAD).await;
    let second = Worker::spawn(&world, "scheduler", &[]);
    doubts(&second).await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.calendars", &[]).await, 1);
    world.run(BACK).await;
    second.ready().await;
    world.run("UPDATE lethe.clock SET shift = '400 days'").await;
    stays("a shift is agreed on", seconds(2), async || readiness(&second).await.0 == 200).await;
}

/// A lease that was taken by a clock that was ahead would last for as long as it was ahead.
#[tokio::test]
async fn a_lease_from_the_far_future_is_taken_over() {
    let world = World::new().await;
    world
        .run(
            "UPDATE lethe.leaders SET epoch = 7, holder = gen_random_uuid(), expires_at = lethe.now() + interval '30 days'",
        )
        .await;
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    becomes("the epoch", seconds(10), 8, async || world.one::<i64>("SELECT epoch FROM lethe.leaders", &[]).await).await;
}

/// What is put off by a clock that was ahead is due when that clock is reached; here 30 days later.
#[tokio::test]
async fn what_was_put_off_while_the_clock_was_ahead_is_brought_back() {
    let world = World::new().await;
    world.controller("acme").await;
    world.run(AHEAD).await;
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port, consecutive_failures, open_until)
             VALUES ('acme', 'https', 'example.com', 443, 20, lethe.now() + interval '5 minutes');
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             VALUES ('acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', sha256('x'), now(), now(), now());
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, n, 0, endpoint_id, 'pending', now(), 'ready',
                    CASE n WHEN 1 THEN now() + interval '50 minutes' ELSE lethe.now() + interval '6 hours' END, now()
               FROM lethe.requests, lethe.endpoints, generate_series(1, 3) AS n;
             INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('30 12 * * MON', '30 12 * * *', '5 0 * * MON,THU', '7 days', '2 days');
             INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
             SELECT 'erasure', now(), now(), max(version), 'released' FROM lethe.calendars;
             INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request,
                                       next_attempt_at)
             SELECT max(batch_id), 'acme', 'erasure', 1, 1, 1, 1, lethe.now() + interval '10 minutes' FROM lethe.batches;
             INSERT INTO lethe.results (result_id, request_key, token_salt, token_sha256, object_path, media_type, size_bytes,
                                        lines, wrapped_key, expiry_day, expires_at, expired_at, delete_after)
             SELECT gen_random_uuid(), request_key, 'x', sha256('x'), 'x', 'text/plain', 1, 1, NULL, now(), now(), now(),
                    lethe.now() + interval '6 hours' FROM lethe.requests",
        )
        .await;
    world.run(BACK).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    let put_off = async |what: &str, wait: &str| {
        let sql = format!("SELECT count(*) FROM lethe.{what} > lethe.now() + interval '{wait}'");
        world.one::<i64>(&sql, &[]).await
    };
    eventually("all of it is brought back", seconds(15), async || {
        put_off("callbacks WHERE next_attempt_at", "1 hour").await == 0
            && put_off("endpoints WHERE open_until", "5 minutes").await == 0
            && put_off("slices WHERE next_attempt_at", "10 minutes").await == 0
            && put_off("results WHERE delete_after", "6 hours").await == 0
    })
    .await;
    assert!(scheduler.log().contains("items=5"), "what waits as it should is left alone: {}", scheduler.log());
}
