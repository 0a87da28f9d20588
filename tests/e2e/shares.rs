//! Fair shares of work: a controller whose data cannot be worked on holds up nobody else, and a wake-up wakes for whatever
//! is due (ADR 0035).

use std::collections::BTreeSet;

use jiff::SignedDuration;
use lethe_broker::{Broker, Publisher as Wakes};
use lethe_db::obstacles;
use lethe_db::slices::{self, Claimed, Trouble, Turn};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::request::{ControllerId, SliceId, Stage};
use lethe_runtime::wake;
use lethe_testing::cli::json;
use lethe_testing::plans::touched;
use lethe_testing::wait::{becomes, eventually_some, seconds, stays};
use lethe_testing::{Publisher, Request, Worker, World};
use serde_json::{Value, json};

/// An erasure that names so many profiles, from `first` on: more than half a slice, so it has one to itself.
fn wide(first: i64) -> Request {
    let mpids: Vec<i64> = (first..first + 1_001).collect();
    Request::new("erasure")
        .with("api_version", json!("2.0"))
        .with("subject_identities", json!([]))
        .with("extensions", json!({"opendsr.mparticle.com": {"mpids": mpids, "skip_waiting_period": true}}))
}

/// The partition of a controller.
async fn partition(world: &World, table: &str, controller: &ControllerId) -> String {
    let number: i32 =
        world.one("SELECT partition_no FROM lethe.controllers WHERE controller_id = $1", &[controller]).await;
    format!("subject_data.{table}_p{number}")
}

/// Slices of a controller that somebody has begun.
async fn begun(world: &World, controller: &ControllerId) -> i64 {
    world.one("SELECT count(*) FROM lethe.slices WHERE controller_id = $1 AND attempts > 0", &[controller]).await
}

#[tokio::test]
async fn erasures_of_others_do_not_wait_for_a_controller_whose_tables_are_locked() {
    let world = World::new().await;
    let (acme, other) = (world.controller("acme").await, world.controller("other").await);
    world.person(&other, 1, "ada@example.com", 1).await;
    world.set_clock("2054-11-22T12:29:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let of_acme: Vec<Request> = (0..5).map(|n| wide(n * 2_000)).collect();
    for request in &of_acme {
        publisher.request("acme", request).await;
    }
    let of_other = Request::erasure("ada@example.com").expedited();
    publisher.request("other", &of_other).await;
    let lock = world.db.begin("lock").await.unwrap();
    let locked = partition(&world, "profiles", &acme).await;
    lock.batch_execute(&format!("LOCK TABLE {locked} IN SHARE MODE")).await.unwrap();
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    world.count_reaches("in_progress", 6).await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.slices", &[]).await, 6);
    // After a failure acme waits for longer than this test may take.
    let settings = [("LETHE_ERASURE_SLICES", "2"), ("LETHE_STORE_FIRST_RETRY", "1h"), ("LETHE_STORE_MAX_RETRY", "1h")];
    let _executor = Worker::start(&world, "erasure-executor", &settings).await;
    world.reaches(&of_other.id, "completed").await;
    assert_eq!(begun(&world, &acme).await, 1, "five of acme stood before the other one in the queue");
    let find = "SELECT subject_request_id::text FROM lethe.requests JOIN lethe.slices USING (slice_id)
                 WHERE last_error IS NOT NULL";
    let kept = eventually_some("acme fails", seconds(10), async || world.optional::<String>(find, &[]).await).await;
    let status = json(&world, &["request", "status", &kept, "--controller", "acme"]).await;
    let work = &status["work"];
    assert_eq!((&work["last_error"], &work["needs_operator"]), (&"sqlstate_55P03".into(), &false.into()));
    assert_eq!(work["pause"]["class"], "sqlstate_55P03");
    let batch = json(&world, &["batch", "show", &status["batch_id"].to_string()]).await;
    assert_eq!((&batch["kept_by"][0]["class"], &batch["kept_by"][0]["slices"]), (&"sqlstate_55P03".into(), &5.into()));
    lock.rollback().await;
    // One that goes well lets the others go on.
    json(&world, &["request", "retry", &kept, "--controller", "acme"]).await;
    world.count_reaches("completed", 6).await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.pauses", &[]).await, 0);
}

#[tokio::test]
async fn compilations_of_others_do_not_wait_for_a_controller_whose_compilations_are_slow() {
    let world = World::new().await;
    let (acme, other) = (world.controller("acme").await, world.controller("other").await);
    world.person(&acme, 1, "ada@example.com", 1).await;
    world.person(&other, 1, "ada@example.com", 1).await;
    world.set_clock("2054-11-23T00:04:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    for _ in 0..5 {
        publisher.request("acme", &Request::access("ada@example.com")).await;
    }
    let of_other = Request::access("ada@example.com");
    publisher.request("other", &of_other).await;
    let lock = world.db.begin("lock").await.unwrap();
    let locked = partition(&world, "event_batches", &acme).await;
    world.set_clock("2054-11-23T00:05:00Z".parse().unwrap()).await;
    world.count_reaches("in_progress", 6).await;
    lock.batch_execute(&format!("LOCK TABLE {locked} IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    // After a failure acme waits for longer than this test may take.
    let settings = [("LETHE_COMPILATIONS", "4"), ("LETHE_STORE_FIRST_RETRY", "1h"), ("LETHE_STORE_MAX_RETRY", "1h")];
    let _compiler = Worker::start(&world, "access-compiler", &settings).await;
    world.reaches(&of_other.id, "completed").await;
    becomes("compilations of acme", seconds(10), 2, async || begun(&world, &acme).await).await;
    stays("acme has its share and no more", seconds(1), async || begun(&world, &acme).await == 2).await;
    let leased = "SELECT count(*) FROM lethe.slices WHERE lease_token IS NOT NULL AND state = 'ready'";
    assert_eq!(world.one::<i64>(leased, &[]).await, 2, "two permits are free, and more of acme is due");
    lock.rollback().await;
    world.count_reaches("completed", 6).await;
}

/// A world with controllers and slices, all due, as a release would have made them.
async fn world_with(slices: &[(&str, i32)]) -> World {
    let world = World::new().await;
    world
        .run(
            "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0');
             INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version)
             SELECT 'erasure', lethe.now(), lethe.now(), version FROM lethe.calendars",
        )
        .await;
    for (controller, count) in slices {
        world
            .run(&format!(
                "INSERT INTO lethe.controllers (controller_id, api_key, api_secret_hash) VALUES ('{controller}', '{controller}', 'x');
                 INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
                 SELECT batch_id, '{controller}', 'erasure', 1, 1, n, n FROM lethe.batches, generate_series(1, {count}) AS n"
            ))
            .await;
    }
    world
}

async fn claim(world: &World, turn: &Turn) -> Option<Claimed> {
    slices::claim(&world.db.session().await.unwrap(), Stage::Erasure, turn).await.unwrap()
}

/// Claims one after the other, as one process does; whose they are.
async fn claims(world: &World, count: usize) -> Vec<String> {
    let (mut turn, mut whose) = (Turn::default(), Vec::new());
    for _ in 0..count {
        let Some(claimed) = claim(world, &turn).await else { break };
        whose.push(claimed.controller_id.to_string());
        turn.served_last = Some(claimed.controller_id);
    }
    whose
}

#[tokio::test]
async fn whoever_has_the_fewest_leases_is_served_and_equals_take_turns() {
    let world = world_with(&[("a", 4), ("b", 1), ("c", 2)]).await;
    assert_eq!(claims(&world, 9).await, ["a", "b", "c", "a", "c", "a", "a"]);
    // What is given up by one is the next one's, oldest first.
    world.run("UPDATE lethe.slices SET lease_token = NULL, lease_expires_at = NULL WHERE controller_id = 'a'").await;
    let limited = Turn { at_limit: vec!["a".parse().unwrap()], ..Turn::default() };
    assert!(claim(&world, &limited).await.is_none(), "a uses up its share of this process");
    let oldest: SliceId = world.one("SELECT min(slice_id) FROM lethe.slices WHERE controller_id = 'a'", &[]).await;
    assert_eq!(claim(&world, &Turn::default()).await.unwrap().slice_id, oldest);
}

/// A renewal may come between the instant of a claim and its look at the leases.
#[tokio::test]
async fn a_lease_that_is_renewed_while_another_is_claimed_is_not_taken_over() {
    let world = world_with(&[("acme", 2)]).await;
    let turn = Turn::default();
    let first = claim(&world, &turn).await.unwrap();
    let renew = async |seconds: f64| {
        let sql =
            "UPDATE lethe.slices SET lease_expires_at = lethe.now() + make_interval(secs => $1) WHERE slice_id = $2";
        world.db.session().await.unwrap().execute(sql, &[&seconds, &first.slice_id]).await.unwrap();
    };
    renew(75.0).await;
    assert_ne!(claim(&world, &turn).await.unwrap().slice_id, first.slice_id);
    assert!(claim(&world, &turn).await.is_none());
    // That one was given by a clock that was ahead.
    renew(150.0).await;
    assert_eq!(claim(&world, &turn).await.unwrap().slice_id, first.slice_id);
}

#[tokio::test]
async fn with_one_permit_equals_are_served_in_turn_however_much_one_has() {
    let world = world_with(&[("a", 9), ("b", 2), ("c", 1)]).await;
    let (mut turn, mut whose) = (Turn::default(), Vec::new());
    for _ in 0..6 {
        let claimed = claim(&world, &turn).await.unwrap();
        world.run("UPDATE lethe.slices SET state = 'completed' WHERE lease_token IS NOT NULL").await;
        whose.push(claimed.controller_id.to_string());
        turn.served_last = Some(claimed.controller_id);
    }
    assert_eq!(whose, ["a", "b", "c", "a", "b", "a"]);
}

/// Blocks that a claim touches.
async fn blocks(world: &World, served_last: &str) -> u64 {
    let plan: Value = world
        .one(
            &format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM lethe.claim_slice('erasure', 60, '{served_last}', '{{}}')"),
            &[],
        )
        .await;
    touched(&plan, 1.0)
}

#[tokio::test]
async fn a_claim_costs_the_same_with_thousands_of_slices_and_hundreds_of_controllers() {
    let world = world_with(&[("a", 4_000), ("b", 1)]).await;
    world
        .run(
            "INSERT INTO lethe.controllers (controller_id, api_key, api_secret_hash)
             SELECT 'c' || n, 'c' || n, 'x' FROM generate_series(1, 300) AS n;
             INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
             SELECT batch_id, 'c' || n, 'erasure', 1, 1, n, n FROM lethe.batches, generate_series(1, 300) AS n",
        )
        .await;
    // Without a warm cache of the catalogue the first one costs more.
    blocks(&world, "").await;
    for served_last in ["", "b", "c150", "zzz"] {
        let touched = blocks(&world, served_last).await;
        assert!(touched < 300, "{touched} blocks behind {served_last:?}");
    }
    let whose: BTreeSet<String> = claims(&world, 250).await.into_iter().collect();
    assert!(whose.len() >= 248, "each has its turn: {}", whose.len());
}

#[tokio::test]
async fn a_controller_that_fails_pauses_and_is_then_tried_one_slice_at_a_time() {
    let world = world_with(&[("a", 4), ("b", 3)]).await;
    let backoff = BackoffPolicy::new(seconds(10), seconds(600)).unwrap();
    let fail = async |claimed: &Claimed, trouble| {
        slices::give_back(&world.db, claimed, backoff, trouble, "sqlstate_55P03", 1.0).await.unwrap();
    };
    let session = world.db.session().await.unwrap();
    let woken = async || slices::to_wake(&session, Stage::Erasure, 0.0, 100).await.unwrap().len();
    let both = [
        claim(&world, &Turn::default()).await.unwrap(),
        claim(&world, &Turn { at_limit: vec!["b".parse().unwrap()], ..Turn::default() }).await.unwrap(),
    ];
    for claimed in &both {
        assert_eq!(claimed.controller_id.as_str(), "a");
        fail(claimed, Trouble::Controller).await;
    }
    assert_eq!(world.one::<i32>("SELECT failures FROM lethe.pauses", &[]).await, 1, "they failed together");
    assert_eq!(claims(&world, 2).await, ["b", "b"]);
    assert_eq!(woken().await, 1, "the last one of b, and none of a");
    world.set_clock(world.now().await + SignedDuration::from_secs(11)).await;
    assert_eq!(woken().await, 2, "one of each");
    let probe = claim(&world, &Turn::default()).await.unwrap();
    assert_eq!(probe.controller_id.as_str(), "a");
    assert_eq!(claims(&world, 9).await, ["b"], "while one of a is tried, no other is");
    fail(&probe, Trouble::Controller).await;
    assert_eq!(world.one::<i32>("SELECT failures FROM lethe.pauses", &[]).await, 2);
    // Twice as long.
    world.set_clock(world.now().await + SignedDuration::from_secs(11)).await;
    assert!(claim(&world, &Turn::default()).await.is_none());
    world.set_clock(world.now().await + SignedDuration::from_secs(10)).await;
    let probe = claim(&world, &Turn::default()).await.unwrap();
    slices::went_well(&world.db, &probe).await.unwrap();
    assert_eq!(claims(&world, 9).await, ["a", "a", "a"]);
}

#[tokio::test]
async fn trouble_of_a_single_slice_stops_no_other_and_ends_a_pause() {
    let world = world_with(&[("a", 3)]).await;
    let backoff = BackoffPolicy::new(seconds(10), seconds(600)).unwrap();
    for trouble in [Trouble::Slice, Trouble::Operator] {
        let claimed = claim(&world, &Turn::default()).await.unwrap();
        slices::give_back(&world.db, &claimed, backoff, trouble, "test", 1.0).await.unwrap();
    }
    let marked: Vec<bool> = world.all("SELECT needs_operator FROM lethe.slices ORDER BY slice_id", &[]).await;
    assert_eq!(marked, [false, true, false]);
    let third = claim(&world, &Turn::default()).await.unwrap();
    slices::give_back(&world.db, &third, backoff, Trouble::Controller, "test", 1.0).await.unwrap();
    world.set_clock(world.now().await + SignedDuration::from_secs(20)).await;
    let probe = claim(&world, &Turn::default()).await.unwrap();
    slices::give_back(&world.db, &probe, backoff, Trouble::Slice, "test", 1.0).await.unwrap();
    assert_eq!(claims(&world, 9).await.len(), 2, "the store answers: only that slice waits");
    // What a clock that was ahead has left behind holds up nothing: a wake-up, a lease, a pause.
    world
        .run(
            "UPDATE lethe.slices SET next_attempt_at = lethe.now(), last_nudged_at = lethe.now() + interval '30 days',
                                     lease_token = gen_random_uuid(), lease_expires_at = lethe.now() + interval '30 days';
             INSERT INTO lethe.pauses (stage, controller_id, class, since, paused_at, paused_until)
             SELECT 'erasure', 'a', 'test', i, i, i + interval '10 minutes' FROM (SELECT lethe.now() + interval '30 days') AS c (i)",
        )
        .await;
    let session = world.db.session().await.unwrap();
    assert_eq!(slices::to_wake(&session, Stage::Erasure, 60.0, 100).await.unwrap().len(), 1, "one, after a pause");
    assert!(claim(&world, &Turn::default()).await.is_some());
}

#[tokio::test]
async fn a_pause_without_work_is_not_shown() {
    let world = world_with(&[("a", 1)]).await;
    world
        .run(
            "INSERT INTO lethe.pauses (stage, controller_id, class, failures, since, paused_at, paused_until)
             SELECT 'erasure', 'a', 'test', 3, i, i, i FROM (SELECT lethe.now()) AS c (i)",
        )
        .await;
    let session = world.db.session().await.unwrap();
    let shown = async || obstacles::find(&session).await.unwrap().failing.len();
    assert_eq!(shown().await, 1);
    world.run("UPDATE lethe.slices SET state = 'completed'").await;
    assert_eq!(shown().await, 0);
}

#[tokio::test]
async fn a_wake_up_begins_one_slice_at_most_and_any_that_is_due() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.set_clock("2054-11-22T12:29:00Z".parse().unwrap()).await;
    let workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    for n in 0..3 {
        publisher.request("acme", &wide(n * 2_000)).await;
    }
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    world.count_reaches("in_progress", 3).await;
    for worker in workers {
        worker.stop().await;
    }
    world.purge("dsr.erasure-execution").await;
    let _executor = Worker::start(&world, "erasure-executor", &[]).await;
    let waker = Wakes::new(Broker::new(&world.amqp_url, "lethe-testing").unwrap());
    let wake = async |ids: &[i64]| {
        wake::slices(&waker, Stage::Erasure, ids.iter().map(|id| SliceId(*id))).await;
        becomes("wake-ups that are left", seconds(20), 0, async || world.messages("dsr.erasure-execution").await).await;
    };
    // One that names nothing that exists wakes as well.
    wake(&[987_654]).await;
    world.count_reaches("completed", 1).await;
    assert_eq!(begun(&world, &acme).await, 1);
    let done: i64 = world.one("SELECT slice_id FROM lethe.slices WHERE state = 'completed'", &[]).await;
    wake(&[done, done, done, done, done]).await;
    world.count_reaches("completed", 3).await;
    assert_eq!(world.one::<i64>("SELECT sum(attempts)::bigint FROM lethe.slices", &[]).await, 3);
}
