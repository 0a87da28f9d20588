//! An end for everything: the retention ends whatever is undelivered, and years later the records end as well.

use lethe_db::leader::{self, Term};
use lethe_db::purge::{Purged, Retention, Walk};
use lethe_db::{overview, records};
use lethe_testing::cli::{json, lethe};
use lethe_testing::details::has_details;
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Gateway, Publisher, Receiver, Reply, Request, Worker, World, seconds_with};
use serde_json::json;

#[tokio::test]
async fn the_retention_ends_whatever_is_undelivered_and_its_callbacks_are_given_up_with_a_reason() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let receiver = Receiver::start().await;
    receiver.script("/never", [Reply::Status(500)]);
    // The couriers would go on for three days.
    let scheduler = seconds_with(&[("LETHE_RETENTION", "1s"), ("LETHE_CALLBACK_GIVE_UP", "2s")]);
    let _scheduler = Worker::start(&world, "scheduler", &scheduler).await;
    let _others = Worker::several(&world, &queue_workers()[1..], &seconds_with(&[])).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/never"));
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    becomes("what is kept", seconds(20), false, async || has_details(&world, &request.id).await).await;
    let callbacks = "SELECT state || ' ' || coalesce(exhausted_because, '') FROM lethe.callbacks ORDER BY sequence";
    assert_eq!(world.all::<String>(callbacks, &[]).await, ["exhausted retention"; 3]);
    let told = "SELECT count(*) FROM lethe.audit_entries WHERE event = 'callback.exhausted'";
    assert_eq!(world.one::<i64>(told, &[]).await, 3);
    let ended = "SELECT extract(epoch FROM recorded_at - completed_at)::float8 FROM lethe.requests, lethe.audit_entries
                  WHERE event = 'details.dropped' AND (details ->> 'requests')::integer > 0";
    assert!(world.one::<f64>(ended, &[]).await >= 3.0, "not before the couriers may have given up");
}

/// Requests of a batch that has run, completed just now: the first ones have a callback that is due.
async fn finished(world: &World, all: i32, blocked: i32) {
    world
        .run(&format!(
            "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin,
                                          details_span)
             VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0', '1 hour');
             INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
             SELECT 'erasure', t, t, 1, 'completed' FROM (SELECT lethe.now() - interval '2 days') AS at (t);
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                         content_digest, details_week, submitted_time, received_at, expected_completion_time)
             SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', batch_id, sha256('x'), w.week, now(), now(), now()
               FROM lethe.week_of(lethe.now() - interval '25 hours') w, lethe.batches, generate_series(1, {all});
             INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request)
             SELECT details_week, request_key, controller_id, 'x' FROM lethe.requests;
             UPDATE lethe.requests SET status = 'in_progress';
             UPDATE lethe.requests SET status = 'completed', completed_at = lethe.now() - interval '1 day';
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, 0, 0, 1, 'pending', now(), 'ready', now(), now()
               FROM lethe.requests ORDER BY request_key LIMIT {blocked}"
        ))
        .await;
}

#[tokio::test]
async fn a_purge_moves_what_has_to_stay_and_drops_the_rest_with_its_week() {
    let world = World::new().await;
    world.controller("acme").await;
    finished(&world, 900, 700).await;
    let holder = uuid::Uuid::new_v4();
    let epoch = leader::acquire(&world.db, holder, std::time::Duration::from_hours(200)).await.unwrap().unwrap();
    let term = Term::without_clock(epoch);
    let retention = Retention { after_end: seconds(36_000), for_callbacks: seconds(86_400) };
    let purge = async |retention| {
        let (mut walk, mut all) = (Walk::default(), Purged::default());
        loop {
            let step = walk.step(&world.db, &term, retention, 100).await.unwrap();
            let sum = |a: &Purged, b: &Purged| (a.requests + b.requests, a.moved + b.moved, a.exhausted + b.exhausted);
            let (requests, moved, exhausted) = sum(&all, &step);
            all = Purged { requests, moved, exhausted, more: false };
            if !step.more {
                return all;
            }
        }
    };
    // One pass over them, and what has to stay is not in the way of the next one.
    assert_eq!(purge(retention).await, Purged { requests: 200, moved: 700, ..Purged::default() });
    assert_eq!(purge(retention).await, Purged::default());
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.request_details", &[]).await, 700);
    let told = "SELECT (details ->> 'requests')::bigint FROM lethe.audit_entries WHERE event = 'details.dropped'";
    assert_eq!(world.all::<i64>(told, &[]).await, [200]);
    // Beyond the time of the couriers nothing has to stay: a day after the end, and the retention, and what the week lasts.
    let later = world.now().await.checked_add(jiff::SignedDuration::from_hours(24 * 10)).unwrap();
    world.set_clock(later).await;
    assert_eq!(purge(retention).await, Purged { requests: 700, exhausted: 700, ..Purged::default() });
    assert_eq!(world.all::<i64>(told, &[]).await, [200, 700]);
}

#[tokio::test]
async fn records_end_years_later_and_a_repetition_is_known_for_good() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let receiver = Receiver::start().await;
    let settings = seconds_with(&[
        ("LETHE_RETENTION", "1s"),
        ("LETHE_RECORD_RETENTION", "3s"),
        ("LETHE_RESULT_LIFETIME", "1s"),
        ("LETHE_ERASURE_WAITING_PERIOD", "2s"),
    ]);
    let workers = Worker::several(&world, &queue_workers(), &settings).await;
    let gateway = Gateway::start(&world, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let erasure = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    let access = Request::access("ada@example.com");
    let cancelled = Request::erasure("eve@example.com").callback(&receiver.url("/y"));
    let first = publisher.request("acme", &erasure).await.json();
    publisher.request("acme", &access).await;
    publisher.request("acme", &cancelled).await;
    let cancellation = publisher.cancel("acme", &cancelled.id).await.json();
    let left = "SELECT (SELECT count(*) FROM lethe.requests) + (SELECT count(*) FROM lethe.callbacks)
                     + (SELECT count(*) FROM lethe.callback_attempts) + (SELECT count(*) FROM lethe.results)
                     + (SELECT count(*) FROM lethe.slice_receipts) + (SELECT count(*) FROM lethe.request_details)
                     + (SELECT count(*) FROM lethe.slices) + (SELECT count(*) FROM lethe.batch_totals WHERE total <> 0)
                     + (SELECT count(*) FROM lethe.batches WHERE state = 'completed')";
    becomes("what is left", seconds(60), 0, async || world.one::<i64>(left, &[]).await).await;
    assert_eq!(receiver.statuses("/x"), ["pending", "in_progress", "completed"]);
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.past_requests", &[]).await, 3);

    // Known all the same, over AMQP and HTTP.
    assert_eq!(publisher.request("acme", &erasure).await.json(), first, "the first answer once more");
    let other = Request::erasure("else@example.com").with("subject_request_id", json!(erasure.id));
    assert_eq!(publisher.ask(&publisher.sending("acme", "request", &other)).await.status, 409);
    let caller = gateway.caller(&world, "acme");
    assert_eq!(caller.request(erasure.bytes()).await.status, 201);
    assert_eq!(caller.post("/v3/requests", other.bytes()).await.status, 409);
    let status = caller.status(&erasure.id).await;
    assert_eq!((status.status, &status.json()["request_status"]), (200, &json!("completed")), "{}", status.text());
    assert_eq!(publisher.status("acme", &cancelled.id).await.json()["request_status"], "cancelled");
    assert_eq!(publisher.cancel("acme", &erasure.id).await.status, 409);
    assert_eq!(publisher.cancel("acme", &cancelled.id).await.json(), cancellation, "the first answer once more");
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await, 0, "nothing was recorded anew");
    world.controller("other").await;
    assert_eq!(gateway.caller(&world, "other").status(&erasure.id).await.status, 404, "another controller's");

    assert_eq!(world.told("requests.removed").await, 3);
    eventually("the trail is whole", seconds(10), async || lethe(&world, &["audit", "verify"]).await.code == Some(0))
        .await;
    let top = json_of_top(&world).await;
    assert!(!top.contains("completed"), "{top}");
    for worker in workers {
        assert!(!worker.log().contains("LT003"), "{}", worker.log());
    }
}

async fn json_of_top(world: &World) -> String {
    eventually("the differences are folded", seconds(10), async || {
        world.one::<i64>("SELECT count(*) FROM lethe.request_deltas", &[]).await == 0
    })
    .await;
    let _ = json(world, &["clock", "show"]).await;
    lethe(world, &["top", "--once"]).await.out
}

/// What stays of ended requests, as the removal writes it.
const PAST: &str = "
    INSERT INTO lethe.past_requests (controller_id, subject_request_id, request_key, api_version, request_type, status,
                                     content_digest, received_at, expected_completion_time, ended_at)
    SELECT controller_id, subject_request_id, request_key, api_version, request_type, status, content_digest, received_at,
           expected_completion_time, coalesce(completed_at, cancelled_at) FROM lethe.requests";

#[tokio::test]
async fn a_repetition_that_meets_the_removal_of_its_request_is_known() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    let first = publisher.request("acme", &request).await.json();
    world.run("UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now(), details_week = NULL").await;
    let removal = world.db.begin("test").await.unwrap();
    let remove = format!("SET LOCAL lethe.removing_records = 'on'; {PAST}; DELETE FROM lethe.requests");
    removal.batch_execute(&remove).await.unwrap();
    let again = publisher.begin_asking(&publisher.sending("acme", "request", &request)).await;
    eventually("the intake waits for the removal", seconds(10), async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity
                                   WHERE datname = current_database() AND wait_event = 'transactionid')";
        world.one::<bool>(sql, &[]).await
    })
    .await;
    removal.commit().await.unwrap();
    assert_eq!(again.await.unwrap().json(), first, "the first answer once more");
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await, 0, "nothing was recorded anew");
}

#[tokio::test]
async fn nothing_but_what_is_over_can_be_removed() {
    let world = World::new().await;
    world.controller("acme").await;
    finished(&world, 3, 1).await;
    let session = world.db.session().await.unwrap();
    let past = format!("{PAST};");
    let purge = "DELETE FROM lethe.detail_weeks;";
    let delivered = "UPDATE lethe.callbacks SET state = 'delivered';";
    for (steps, allowed) in [
        ("DELETE FROM lethe.requests".to_owned(), false),
        (format!("{purge} DELETE FROM lethe.requests"), false),
        (format!("{past} DELETE FROM lethe.requests"), false),
        (format!("{past} {purge} DELETE FROM lethe.callbacks"), false),
        (format!("{past} {purge} DELETE FROM lethe.requests; DELETE FROM lethe.callbacks"), false),
        ("DELETE FROM lethe.batches".to_owned(), false),
        (format!("{past} {purge} {delivered} DELETE FROM lethe.requests; DELETE FROM lethe.callbacks"), true),
        (format!("{past} {purge} {delivered} DELETE FROM lethe.requests; DELETE FROM lethe.batches"), true),
    ] {
        for (announced, allowed) in [(false, false), (true, allowed)] {
            let setting = if announced { "SET LOCAL lethe.removing_records = 'on';" } else { "" };
            let outcome = session.batch_execute(&format!("BEGIN; {setting} {steps}")).await;
            let code = outcome.as_ref().err().and_then(|error| error.code()).map(|code| code.code().to_owned());
            session.batch_execute("ROLLBACK").await.unwrap();
            assert_eq!(code.as_deref(), if allowed { None } else { Some("LT003") }, "{steps}: {outcome:?}");
        }
    }
}

/// The end of a batch waits for a fold that is under way, and sees what it has made.
#[tokio::test]
async fn a_fold_that_meets_the_end_of_a_batch_leaves_no_total_behind() {
    let world = World::new().await;
    let epoch = leader::acquire(&world.db, uuid::Uuid::new_v4(), seconds(60)).await.unwrap().unwrap();
    world
        .run(
            "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0');
             INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state, completed_at)
             SELECT 'erasure', t, t, 1, 'completed', t FROM (SELECT now() - interval '1 h') AS at (t);
             INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
             SELECT batch_id, 'erasure', 'completed', delta FROM lethe.batches, (VALUES (1), (-1)) AS deltas (delta)",
        )
        .await;
    let sql = overview::STATEMENTS.iter().find(|(name, _)| *name == "FOLD_REQUESTS").unwrap().1;
    let fold = world.db.begin("fold").await.unwrap();
    assert_eq!(fold.query_one(sql, &[&100_i64]).await.unwrap().get::<_, i64>(0), 2);
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let folding = async {
        becomes("ends of batches that wait", seconds(10), 1, async || world.one::<i64>(waiting, &[]).await).await;
        fold.commit().await.unwrap();
    };
    let (mut walk, term) = (records::Walk::default(), Term::without_clock(epoch));
    let (ended, ()) = tokio::join!(walk.step(&world.db, &term, seconds(1), 100), folding);
    ended.unwrap();
    for table in ["batches", "batch_totals", "request_deltas"] {
        let left = format!("SELECT count(*) FROM lethe.{table}");
        assert_eq!(world.one::<i64>(&left, &[]).await, 0, "{table}");
    }
}
