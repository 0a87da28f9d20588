//! Erasure: what is gone, what stays, and what the receipts say.

use jiff::SignedDuration;
use lethe_db::slices::{self, Claimed, Trouble, Turn};
use lethe_db::{DbError, requests};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::request::{ControllerId, Stage};
use lethe_testing::erasure::{Receipt, receipt};
use lethe_testing::wait::{eventually, seconds, stays};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};

#[tokio::test]
async fn erases_the_matched_profiles_of_that_controller_and_nothing_else() {
    let world = World::new().await;
    let (acme, other) = (world.controller("acme").await, world.controller("other").await);
    world.profile(&acme, 1, &[("email", "ada@example.com"), ("other2", "x")]).await;
    world.person(&acme, 2, "ADA@example.com ", 3).await;
    world.person(&acme, 3, "grace@example.com", 2).await;
    world.person(&other, 1, "ada@example.com", 2).await;
    let _workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("Ada@Example.com");
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
    assert_eq!(world.rows_of(&acme, 2).await, (0, 0, 0));
    assert_eq!(world.rows_of(&acme, 3).await, (1, 1, 2));
    assert_eq!(world.rows_of(&other, 1).await, (1, 1, 2));
    let expected = Receipt { deleted: 3 + 5, arrived: Some(0), verified: true, failure: None };
    assert_eq!(receipt(&world, &request.id).await, Some(expected));
}

const ERASURE: [&str; 3] = ["scheduler", "identity-matcher", "erasure-executor"];

/// A trigger on the partition of a controller; `body` is PL/pgSQL.
async fn trigger(world: &World, controller: &ControllerId, table: &str, level: &str, body: &str) {
    let number: i32 =
        world.one("SELECT partition_no FROM lethe.controllers WHERE controller_id = $1", &[controller]).await;
    world
        .run(&format!(
            "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN {body} RETURN OLD; END $f$;
             CREATE TRIGGER trap BEFORE DELETE ON subject_data.{table}_p{number} FOR EACH {level} EXECUTE FUNCTION public.trap()"
        ))
        .await;
}

#[tokio::test]
async fn what_arrives_after_the_start_stays_and_is_counted() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 4).await;
    // The executor is held up in the middle: it has begun, and the event batches are still to come.
    trigger(&world, &acme, "profiles", "ROW", "PERFORM pg_advisory_xact_lock(42);").await;
    let gate = world.db.begin("gate").await.unwrap();
    gate.batch_execute("SELECT pg_advisory_xact_lock(42)").await.unwrap();
    let _workers = Worker::several(&world, &ERASURE, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("the executor has begun", seconds(8), async || {
        world
            .one("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)", &[])
            .await
    })
    .await;
    world.event_batches(&acme, &[r#"{"mpid":1,"late":true}"#.to_owned()]).await;
    gate.rollback().await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 1), "what came later stays");
    let expected = Receipt { deleted: 6, arrived: Some(1), verified: true, failure: None };
    assert_eq!(receipt(&world, &request.id).await, Some(expected));
}

#[tokio::test]
async fn a_transaction_that_wrote_before_the_start_is_waited_for() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let writer = world.db.begin("writer").await.unwrap();
    let insert =
        r#"INSERT INTO subject_data.event_batches (controller_id, mpid, body) VALUES ('acme', 1, '{"mpid":1}')"#;
    writer.batch_execute(insert).await.unwrap();
    let _workers = Worker::several(&world, &ERASURE, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("the executor has begun", seconds(8), async || receipt(&world, &request.id).await.is_some()).await;
    stays("the wait for the writer", seconds(1), async || world.status(&request.id).await == "in_progress").await;
    writer.commit().await.unwrap();
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
    assert_eq!(receipt(&world, &request.id).await.unwrap().deleted, 4);
}

#[tokio::test]
async fn an_executor_that_is_killed_in_the_middle_is_followed_by_one_that_counts_exactly() {
    const ROWS: i64 = 60_000;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    let rows = format!(
        "INSERT INTO subject_data.event_batches (controller_id, mpid, body)
         SELECT 'acme', 1, '{{\"mpid\":1}}' FROM generate_series(1, {ROWS})"
    );
    world.run(&rows).await;
    let half = "IF (SELECT sum(rows_deleted) FROM lethe.erasure_receipts) >= 30000 THEN PERFORM pg_advisory_xact_lock(42); END IF;";
    trigger(&world, &acme, "event_batches", "STATEMENT", half).await;
    let gate = world.db.begin("gate").await.unwrap();
    gate.batch_execute("SELECT pg_advisory_xact_lock(42)").await.unwrap();
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], SECONDS).await;
    let executor = Worker::start(&world, "erasure-executor", &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("half is erased", seconds(20), async || {
        receipt(&world, &request.id).await.is_some_and(|receipt| receipt.deleted >= 30_000)
    })
    .await;
    executor.kill().await;
    gate.rollback().await;
    let second = Worker::start(&world, "erasure-executor", &[]).await;
    assert_eq!(world.status(&request.id).await, "in_progress", "the lease of the dead one holds");
    let later = world.now().await + SignedDuration::from_secs(61);
    world.set_clock(later).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
    let expected = Receipt { deleted: ROWS + 2, arrived: Some(0), verified: true, failure: None };
    assert_eq!(receipt(&world, &request.id).await, Some(expected));
    assert_eq!(world.one::<i32>("SELECT attempts FROM lethe.slices", &[]).await, 2);
    second.stop().await;
}

#[tokio::test]
async fn a_request_whose_store_fails_keeps_no_neighbour_from_completing() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    for mpid in 1..=3 {
        world.person(&acme, mpid, &format!("p{mpid}@example.com"), 2).await;
    }
    trigger(
        &world,
        &acme,
        "profiles",
        "ROW",
        "IF OLD.mpid = 2 THEN RAISE EXCEPTION 'a bad block' USING ERRCODE = '58030'; END IF;",
    )
    .await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &ERASURE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let requests: Vec<Request> = (1..=3).map(|n| Request::erasure(&format!("p{n}@example.com")).expedited()).collect();
    for request in &requests {
        publisher.request("acme", request).await;
    }
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    for neighbour in [&requests[0], &requests[2]] {
        world.reaches(&neighbour.id, "completed").await;
    }
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.slices", &[]).await, 1, "they share a slice");
    eventually("it is tried again", seconds(10), async || {
        world.one::<i32>("SELECT attempts FROM lethe.slices", &[]).await >= 2
    })
    .await;
    assert_eq!(world.status(&requests[1].id).await, "in_progress");
    let failed = receipt(&world, &requests[1].id).await.unwrap();
    assert_eq!((failed.verified, failed.failure.as_deref()), (false, Some("sqlstate_58030")));
    assert_eq!(world.rows_of(&acme, 2).await, (1, 1, 2));
    world.run("DROP FUNCTION public.trap() CASCADE").await;
    world.reaches(&requests[1].id, "completed").await;
    for request in &requests {
        let expected = Receipt { deleted: 4, arrived: Some(0), verified: true, failure: None };
        assert_eq!(receipt(&world, &request.id).await, Some(expected));
    }
}

#[tokio::test]
async fn a_request_that_matches_too_many_profiles_waits_for_an_operator() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let family = async |from: i64, to: i64, email: &str| {
        for mpid in from..to {
            world.person(&acme, mpid, email, 1).await;
        }
    };
    family(0, 5, "family@example.com").await;
    family(10, 12, "growing@example.com").await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &ERASURE, &[("LETHE_MAX_MPIDS_PER_REQUEST", "3")]).await;
    let publisher = Publisher::connect(&world).await;
    let wide = Request::erasure("family@example.com").expedited();
    let growing = Request::erasure("growing@example.com").expedited();
    let cancelled = Request::access("family@example.com");
    for request in [&wide, &growing, &cancelled] {
        publisher.request("acme", request).await;
    }
    family(12, 16, "growing@example.com").await;
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    let needed = async |id: &str| -> bool {
        let sql =
            "SELECT approval = 'needed' AND batch_id IS NULL FROM lethe.requests WHERE subject_request_id::text = $1";
        world.one(sql, &[&id]).await
    };
    eventually("the second is held back at the release", seconds(10), async || needed(&growing.id).await).await;
    for request in [&wide, &growing, &cancelled] {
        assert!(needed(&request.id).await);
        assert_eq!(publisher.status("acme", &request.id).await.json()["request_status"], "pending");
    }
    assert_eq!(publisher.cancel("acme", &cancelled.id).await.status, 202);
    for request in [&wide, &growing] {
        let target = (acme.clone(), request.id.parse().unwrap());
        let (_, slot) = requests::approve(&world.db, &target).await.unwrap().expect("it waits for approval");
        assert_eq!(slot.runs_at.to_string(), "2054-11-23T12:30:00Z");
        assert!(requests::approve(&world.db, &target).await.unwrap().is_none(), "approved once");
    }
    assert_eq!(world.rows_of(&acme, 0).await, (1, 1, 1));
    world.set_clock("2054-11-23T12:30:00Z".parse().unwrap()).await;
    for request in [&wide, &growing] {
        world.reaches(&request.id, "completed").await;
    }
    assert_eq!(receipt(&world, &wide.id).await.unwrap().deleted, 5 * 3);
    assert_eq!(receipt(&world, &growing.id).await.unwrap().deleted, 6 * 3);
    assert_eq!(world.status(&cancelled.id).await, "cancelled");
}

#[tokio::test]
async fn the_holder_of_an_expired_lease_is_refused() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let workers = Worker::several(&world, &["scheduler", "identity-matcher"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "in_progress").await;
    drop(workers);
    let session = world.db.session().await.unwrap();
    let claim = async |stage| slices::claim(&session, stage, &Turn::default()).await.unwrap();
    assert!(claim(Stage::Compilation).await.is_none(), "it is not a compilation");
    let first = claim(Stage::Erasure).await.expect("the slice is free");
    assert!(claim(Stage::Erasure).await.is_none(), "it is leased");
    let later = world.now().await + SignedDuration::from_secs(61);
    world.set_clock(later).await;
    let second = claim(Stage::Erasure).await.expect("the lease has expired");
    assert_eq!((second.slice_id, second.as_of), (first.slice_id, first.as_of), "the start of the execution is kept");
    let lost = |outcome: Result<_, DbError>| matches!(outcome, Err(DbError::LeaseLost));
    assert!(lost(slices::hold(&session, &first).await));
    assert!(lost(slices::keep_writers(&session, &first, &[]).await));
    assert!(lost(slices::finish_erasure(&world.db, &first, &[], &[]).await.map(drop)));
    let receipts = slices::open_receipts(&session, &first, "postgres").await.unwrap();
    assert!(lost(slices::record_failure(&world.db, &first, &receipts, &[], "late").await));
    slices::hold(&session, &second).await.unwrap();
    give_back(&world, &first, Trouble::Controller).await;
    slices::hold(&session, &second).await.expect("the late one could not give away what is not its own");
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.pauses", &[]).await, 0, "nor stop its controller");
    // A lease of a clock that was ahead, whose holder has died.
    world.set_clock(later - SignedDuration::from_hours(2)).await;
    world.run("UPDATE lethe.slices SET next_attempt_at = lethe.now()").await;
    let third = claim(Stage::Erasure).await.expect("a lease that is longer than a lease has run out");
    assert!(lost(slices::hold(&session, &second).await));
    slices::hold(&session, &third).await.unwrap();
}

async fn give_back(world: &World, claimed: &Claimed, trouble: Trouble) {
    let backoff = BackoffPolicy::new(seconds(5), seconds(60)).unwrap();
    slices::give_back(&world.db, claimed, backoff, trouble, "test", 1.0).await.unwrap();
}
