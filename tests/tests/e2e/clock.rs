//! A clock that is doubted: where PostgreSQL's is ahead of the time that has passed, nothing is done that cannot be undone.

use jiff::civil::Date;
use lethe_tests::cli::{json, lethe};
use lethe_tests::wait::{becomes, eventually, seconds, stays};
use lethe_tests::{Publisher, Request, Worker, World};

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
        let purged = "SELECT count(*) FROM lethe.requests WHERE sealed_request IS NULL";
        world.one::<i64>(open, &[]).await == 0 && world.one::<i64>(purged, &[]).await == 0 && key.exists()
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
