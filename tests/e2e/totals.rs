//! Totals are kept and not counted, and are right through every change.

use std::time::Duration;

use lethe_db::overview::{self, Overview};
use lethe_db::{batches, leader};
use lethe_domain::request::{CallbackState, RequestStatus, RequestType};
use lethe_testing::World;
use lethe_testing::cli::json;
use uuid::Uuid;

const LEASE: Duration = Duration::from_secs(15);

type Requests = Vec<(RequestType, RequestStatus, i64)>;

/// What the totals must be.
async fn counted(world: &World) -> (Requests, Vec<(CallbackState, i64)>, Vec<(i64, String, i64)>) {
    let session = world.db.session().await.unwrap();
    let read = async |sql: &str| session.raw().query(sql, &[]).await.unwrap();
    let requests = read("SELECT request_type, status, count(*) FROM lethe.requests GROUP BY 1, 2 ORDER BY 1, 2").await;
    let callbacks = read("SELECT state, count(*) FROM lethe.callbacks GROUP BY 1 ORDER BY 1").await;
    let batches =
        "SELECT batch_id, status, count(*) FROM lethe.requests WHERE batch_id IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2";
    let batches = read(batches).await;
    (
        requests.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        callbacks.iter().map(|row| (row.get(0), row.get(1))).collect(),
        batches.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
    )
}

async fn are_right(world: &World, what: &str) {
    let session = world.db.session().await.unwrap();
    let Overview { requests, callbacks, .. } = overview::load(&session).await.unwrap();
    let wanted = counted(world).await;
    assert_eq!((requests, callbacks), (wanted.0, wanted.1), "{what}");
    let mut kept = Vec::new();
    for batch in batches::list(&session, None, 100).await.unwrap() {
        let by_status = [
            ("cancelled", batch.cancelled),
            ("completed", batch.completed),
            ("in_progress", batch.in_progress),
            ("pending", batch.pending),
        ];
        assert_eq!(batch.requests, by_status.iter().map(|(_, count)| count).sum::<i64>());
        let some = by_status.into_iter().filter(|(_, count)| *count > 0);
        kept.extend(some.map(|(status, count)| (batch.batch_id.0, status.to_owned(), count)));
    }
    kept.sort();
    assert_eq!(kept, wanted.2, "{what}");
}

const REQUESTS: &str = "
    INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                content_digest, submitted_time, received_at, expected_completion_time)
    SELECT 'acme', gen_random_uuid(), '3.0', CASE n % 3 WHEN 0 THEN 'access' ELSE 'erasure' END, 'pending', 'erasure',
           (SELECT min(batch_id) FROM lethe.batches) + n % 2, sha256('x'), now(), now(), now()
      FROM generate_series(1, 30) AS n";
const CALLBACKS: &str = "
    INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                 expected_completion_time, state, next_attempt_at, created_at)
    SELECT gen_random_uuid(), request_key, 0, 0, 1, 'pending', now(), 'ready', now(), now() FROM lethe.requests
    ON CONFLICT DO NOTHING";

async fn world_with_batches() -> World {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0');
             INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version)
             SELECT 'erasure', t, t, 1 FROM generate_series(1, 2) AS n, LATERAL (SELECT now() + n * interval '1 h') AS at (t)",
        )
        .await;
    world
}

#[tokio::test]
async fn totals_are_right_through_every_change_folded_or_not() {
    let world = world_with_batches().await;
    let epoch = leader::acquire(&world.db, Uuid::new_v4(), LEASE).await.unwrap().unwrap();
    are_right(&world, "nothing").await;
    let changes = [
        REQUESTS,
        CALLBACKS,
        "UPDATE lethe.requests SET status = 'in_progress' WHERE request_key % 2 = 0",
        "UPDATE lethe.callbacks SET lease_token = gen_random_uuid()",
        "UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() WHERE request_key % 5 = 1 AND status = 'pending'",
        "UPDATE lethe.callbacks SET state = 'delivered' WHERE request_key % 2 = 0",
        "UPDATE lethe.requests SET batch_id = NULL, approval = 'needed' WHERE request_key % 7 = 3 AND status = 'pending'",
        REQUESTS,
        "UPDATE lethe.requests SET status = 'completed' WHERE status = 'in_progress'",
        "UPDATE lethe.callbacks SET state = 'exhausted' WHERE state = 'ready' AND request_key % 3 = 0",
    ];
    for (number, change) in changes.into_iter().enumerate() {
        // What is rolled back is not counted.
        world.run(&format!("BEGIN; {change}; ROLLBACK")).await;
        are_right(&world, change).await;
        world.run(change).await;
        are_right(&world, change).await;
        if number % 3 == 0 {
            // In steps smaller than what there is.
            while overview::fold(&world.db, epoch, 2).await.unwrap() == 2 {
                are_right(&world, "in the middle of folding").await;
            }
            assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.request_deltas", &[]).await, 0);
            are_right(&world, "folded").await;
        }
    }
    let stale = overview::fold(&world.db, epoch - 1, 10).await;
    assert!(matches!(stale, Err(lethe_db::DbError::LeadershipLost)), "only the leader folds");
}

/// Before the triggers of V0016 nobody kept totals; between it and V0020 the workers go on.
#[tokio::test]
async fn what_was_there_before_is_taken_over_by_the_migration_exactly() {
    let world = world_with_batches().await;
    world
        .run(&format!(
            "SET session_replication_role = replica; {REQUESTS}; {CALLBACKS}; RESET session_replication_role"
        ))
        .await;
    world.run(REQUESTS).await;
    world.run("UPDATE lethe.requests SET status = 'in_progress' WHERE request_key % 4 = 0").await;
    world.run(CALLBACKS).await;
    world.run("UPDATE lethe.callbacks SET state = 'delivered' WHERE request_key % 3 = 0").await;
    let migration = include_str!("../../shared/db/schema/migrations/V0020__an_end_for_records.sql");
    let taking_over = migration.split(";\n").filter(|statement| statement.contains("_totals ("));
    let taking_over: Vec<&str> = taking_over.collect();
    assert_eq!(taking_over.len(), 3, "one for each kind of total");
    world.run(&taking_over.join(";\n")).await;
    are_right(&world, "taken over").await;
}

#[tokio::test]
async fn the_command_line_shows_the_totals() {
    let world = world_with_batches().await;
    world.run(REQUESTS).await;
    let listed = json(&world, &["batch", "list"]).await;
    assert_eq!(listed.as_array().unwrap().len(), 2);
    let all: i64 = listed.as_array().unwrap().iter().map(|batch| batch["pending"].as_i64().unwrap()).sum();
    assert_eq!(all, 30);
    let id = listed[0]["batch_id"].to_string();
    let one = batches::list(&world.db.session().await.unwrap(), Some(id.parse().unwrap()), 1).await.unwrap();
    assert_eq!((one.len(), one[0].requests), (1, 15));
}
