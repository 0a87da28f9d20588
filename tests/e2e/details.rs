//! What is personal in requests lies by the week, and goes with it (ADR 0042).

use std::collections::BTreeSet;
use std::time::Duration;

use lethe_db::leader::{self, Term};
use lethe_db::purge::{Retention, Walk};
use lethe_testing::details::has_details;
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Publisher, Request, Worker, World, seconds_with};

/// A request of `acme` in the week of an instant.
async fn received(world: &World, instant: &str) {
    world
        .run(&format!(
            "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, details_week,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', w.week, sha256('x'), now(), now(), now()
               FROM lethe.week_of({instant}) w;
             INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request)
             SELECT details_week, request_key, controller_id, 'x' FROM lethe.requests ORDER BY request_key DESC LIMIT 1"
        ))
        .await;
}

async fn code_of(world: &World, sql: &str) -> Option<String> {
    let outcome = world.db.session().await.unwrap().batch_execute(sql).await;
    outcome.err().and_then(|error| error.code().map(|code| code.code().to_owned()))
}

const LONG_AGO: &str = "now() - interval '60 days'";
const DROP_FIRST: &str = "SELECT lethe.drop_week(min(week), '-10 years') FROM lethe.detail_weeks";
const RETENTION: Retention = Retention { after_end: Duration::from_hours(24 * 30), for_callbacks: Duration::ZERO };

async fn term(world: &World) -> Term {
    let epoch = leader::acquire(&world.db, uuid::Uuid::new_v4(), Duration::from_mins(1)).await.unwrap();
    Term::without_clock(epoch.unwrap())
}

#[tokio::test]
async fn many_who_need_a_week_at_once_open_one() {
    let world = World::new().await;
    let open = async || {
        let session = world.db.session().await.unwrap();
        session.value::<i64>("SELECT week FROM lethe.open_week(now())", &[]).await.unwrap()
    };
    let opened = futures_util::join!(open(), open(), open(), open());
    assert_eq!(BTreeSet::from([opened.0, opened.1, opened.2, opened.3]).len(), 1, "{opened:?}");
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'lethe.request_details'::regclass";
    assert_eq!(world.one::<i64>(partitions, &[]).await, 1);
    let monday = "SELECT to_char(starts_at AT TIME ZONE 'UTC', 'D HH24:MI:SS') FROM lethe.detail_weeks";
    assert_eq!(world.one::<String>(monday, &[]).await, "2 00:00:00");
    // What nobody can mean makes no tables without end, whoever asks: the gateway may.
    world.run("SELECT lethe.open_week(now() + n * interval '10 years') FROM generate_series(-50, 50) AS n").await;
    assert_eq!(world.one::<i64>(partitions, &[]).await, 2);
}

#[tokio::test]
async fn a_week_is_not_dropped_with_a_request_that_has_not_ended() {
    let world = World::new().await;
    world.controller("acme").await;
    received(&world, LONG_AGO).await;
    for status in ["pending", "in_progress"] {
        world.run(&format!("UPDATE lethe.requests SET status = '{status}' WHERE status <> '{status}'")).await;
        assert_eq!(code_of(&world, DROP_FIRST).await.as_deref(), Some("LT003"), "{status}");
    }
    world.run("UPDATE lethe.requests SET status = 'completed', completed_at = now() - interval '50 days'").await;
    // Nor with a callback that is to be sent, say because an operator has it sent once more.
    world
        .run(
            "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, 0, 0, 1, 'pending', now(), 'ready', now(), now() FROM lethe.requests",
        )
        .await;
    assert_eq!(code_of(&world, DROP_FIRST).await.as_deref(), Some("LT003"));
    world.run("UPDATE lethe.callbacks SET state = 'delivered'").await;
    // Nor before it is over.
    let early = "SELECT lethe.drop_week(min(week), interval '80 days') FROM lethe.detail_weeks";
    assert_eq!(world.one::<Option<i64>>(early, &[]).await, None);
    assert_eq!(code_of(&world, DROP_FIRST).await, None);
    let left = "SELECT count(*) FROM pg_class WHERE relname ~ '^request_details_w'";
    assert_eq!(world.one::<i64>(left, &[]).await, 0, "the table is gone, and its file with it");
    assert_eq!(
        world.one::<Option<i64>>("SELECT lethe.drop_week(1, '-10 years')", &[]).await,
        None,
        "there is none any more"
    );
}

/// Pending for months, say because nobody approves of it.
#[tokio::test]
async fn what_has_not_ended_moves_on_week_by_week() {
    let world = World::new().await;
    world.controller("acme").await;
    received(&world, LONG_AGO).await;
    received(&world, LONG_AGO).await;
    world
        .run(
            "UPDATE lethe.requests SET status = 'in_progress' WHERE request_key = 1;
             UPDATE lethe.requests SET status = 'completed', completed_at = now() - interval '60 days' WHERE request_key = 1;
             INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0')",
        )
        .await;
    let (term, mut walk) = (term(&world).await, Walk::default());
    let purged = walk.step(&world.db, &term, RETENTION, 100).await.unwrap();
    assert_eq!((purged.requests, purged.moved), (1, 1));
    let week = "SELECT starts_at <= lethe.now() AND lethe.now() < ends_at FROM lethe.detail_weeks";
    assert!(world.one::<bool>(week, &[]).await, "the one that is left is that of now");
    let has = "SELECT EXISTS (SELECT FROM lethe.request_details d JOIN lethe.requests r ON r.details_week = d.week
                               WHERE r.request_key = 2 AND d.request_key = 2)";
    assert!(world.one::<bool>(has, &[]).await);
    assert_eq!(walk.step(&world.db, &term, RETENTION, 100).await.unwrap(), lethe_db::purge::Purged::default());
}

/// Whoever adds to a week and whoever drops it see each other, whichever comes first.
#[tokio::test]
async fn nothing_is_added_to_a_week_that_goes() {
    let world = World::new().await;
    world.controller("acme").await;
    received(&world, LONG_AGO).await;
    world.run("UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now()").await;
    let add = "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, details_week,
                                           content_digest, submitted_time, received_at, expected_completion_time)
               SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', 1, sha256('x'), now(), now(), now();
               INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request)
               SELECT 1, max(request_key), 'acme', 'x' FROM lethe.requests";
    // A drop waits for an addition, and sees it.
    let adding = world.db.begin("adding").await.unwrap();
    adding.batch_execute(add).await.unwrap();
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let finish = async {
        becomes("drops that wait", seconds(10), 1, async || world.one::<i64>(waiting, &[]).await).await;
        adding.commit().await.unwrap();
    };
    let (dropped, ()) = tokio::join!(code_of(&world, DROP_FIRST), finish);
    assert_eq!(dropped.as_deref(), Some("LT003"));
    // Nor does anybody add what belongs to no request of that controller and week.
    world.run("SELECT lethe.week_of(now())").await;
    for (key, controller) in [("1000000", "acme"), ("1", "other")] {
        let foreign = format!(
            "INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request)
             SELECT max(week), {key}, '{controller}', 'x' FROM lethe.detail_weeks"
        );
        assert_eq!(code_of(&world, &foreign).await.as_deref(), Some("LT003"), "{key} {controller}");
    }
    // An addition waits for a drop in the same way, and finds the week gone.
    world.run("UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() WHERE status = 'pending'").await;
    let dropping = world.db.begin("dropping").await.unwrap();
    dropping.batch_execute("DELETE FROM lethe.detail_weeks").await.unwrap();
    let finish = async {
        becomes("additions that wait", seconds(10), 1, async || world.one::<i64>(waiting, &[]).await).await;
        dropping.commit().await.unwrap();
    };
    let adding = format!("BEGIN; {add}; COMMIT");
    let (added, ()) = tokio::join!(code_of(&world, &adding), finish);
    assert_eq!(added.as_deref(), Some("23514"), "an intake is tried again then, and finds another week");
}

/// A matcher that stood still since it learnt of a week, while the clock was moved.
#[tokio::test]
async fn an_intake_that_knows_a_week_which_is_gone_finds_another_one() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    publisher.request("acme", &Request::erasure("ada@example.com")).await;
    world.run("UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now()").await;
    assert_eq!(code_of(&world, DROP_FIRST).await, None);
    let request = Request::erasure("eve@example.com");
    assert_eq!(publisher.request("acme", &request).await.status, 201);
    assert!(has_details(&world, &request.id).await);
}

/// A dump reads every table for hours.
#[tokio::test]
async fn a_week_that_somebody_reads_is_dropped_later_and_holds_up_nobody() {
    let world = World::new().await;
    world.controller("acme").await;
    received(&world, LONG_AGO).await;
    world.run("UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() - interval '40 days'").await;
    let reader = world.db.begin("a dump").await.unwrap();
    reader.batch_execute("SELECT FROM lethe.request_details").await.unwrap();
    let (term, mut walk) = (term(&world).await, Walk::default());
    // A request that was cancelled goes by itself, whatever is read.
    let purged = walk.step(&world.db, &term, RETENTION, 100).await.unwrap();
    assert_eq!(purged.requests, 1);
    assert!(world.one::<bool>("SELECT to_regclass('lethe.request_details_w1') IS NOT NULL", &[]).await);
    received(&world, "now()").await;
    assert!(!walk.step(&world.db, &term, RETENTION, 100).await.unwrap().more, "it rests for a minute");
    reader.commit().await.unwrap();
    let mut another = Walk::default();
    another.step(&world.db, &term, RETENTION, 100).await.unwrap();
    assert!(world.one::<bool>("SELECT to_regclass('lethe.request_details_w1') IS NULL", &[]).await);
}

#[tokio::test]
async fn a_scheduler_that_is_killed_before_it_commits_a_drop_has_dropped_nothing() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let settings = seconds_with(&[("LETHE_RETENTION", "1s")]);
    let faulty = seconds_with(&[("LETHE_RETENTION", "1s"), ("LETHE_FAULT", "kill@purge.before_commit:1")]);
    let mut first = Worker::start(&world, "scheduler", &faulty).await;
    let _others = Worker::several(&world, &queue_workers()[1..], &settings).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    first.exit(seconds(30)).await;
    assert!(has_details(&world, &request.id).await);
    let told = "SELECT count(*) FROM lethe.audit_entries WHERE event = 'details.dropped'";
    assert_eq!(world.one::<i64>(told, &[]).await, 0);
    let _second = Worker::start(&world, "scheduler", &settings).await;
    eventually("the next one drops it", seconds(30), async || !has_details(&world, &request.id).await).await;
    let sum = "SELECT sum((details ->> 'requests')::integer) FROM lethe.audit_entries WHERE event = 'details.dropped'";
    assert_eq!(world.one::<i64>(sum, &[]).await, 1, "and says so once");
}
