//! `lethe callback list` and `replay`, and lists of endpoints: served by indexes, however much there is.

use lethe_db::callback_list::{self, Filter, Replay};
use lethe_domain::request::CallbackState;
use lethe_testing::World;
use lethe_testing::plans::{PLANNED, explained};
use lethe_testing::wait::{becomes, seconds};

/// Two controllers; "acme" with 4 endpoints and a share of everything, "other" with 400 endpoints and the rest. Callbacks
/// of 12,000 requests, most of them delivered; the newest requests are all the other controller's.
async fn filled() -> World {
    let world = World::new().await;
    for controller in ["acme", "other", "third"] {
        world.controller(controller).await;
    }
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port)
             SELECT CASE WHEN n <= 4 THEN 'acme' ELSE 'other' END, 'https', n || '.example.com', 443
               FROM generate_series(1, 404) AS n;
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, details_week,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             SELECT CASE WHEN n % 20 = 0 AND n < 8000 THEN 'acme' ELSE 'other' END, gen_random_uuid(), '3.0', 'erasure',
                    'pending', 'erasure', w.week, sha256('x'), now(), now() - (12000 - n) * interval '1 s', now()
               FROM lethe.week_of(now()) w, generate_series(1, 12000) AS n;
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at, attempts)
             SELECT gen_random_uuid(), request_key, 0, sequence,
                    CASE controller_id WHEN 'acme' THEN 1 + request_key % 4 ELSE 5 + request_key % 400 END, 'pending', now(),
                    CASE WHEN request_key % 100 = 0 THEN 'exhausted' WHEN request_key % 100 = 1 THEN 'ready'
                         WHEN request_key % 100 = 2 THEN 'waiting' ELSE 'delivered' END,
                    received_at, received_at + sequence * interval '1 ms', 1
               FROM lethe.requests, generate_series(0, 1) AS sequence;
             INSERT INTO lethe.callback_attempts (callback_id, attempt, started_at, duration, status_code)
             SELECT callback_id, 1, now(), '0', 202 FROM lethe.callbacks;
             ANALYZE",
        )
        .await;
    world
}

/// Runs a statement under `EXPLAIN ANALYZE`: no table that grows is read as a whole, and few blocks are touched.
async fn is_served_by_indexes(
    world: &World,
    statements: &[(&str, &str)],
    (name, types, values): (&str, &str, &str),
    blocks: u64,
) {
    let mut reading = explained(world, statements, name, types, values, PLANNED).await;
    reading.whole.retain(|(table, _)| table != "controllers");
    assert!(reading.whole.is_empty(), "{name} ({values}): {reading:?}");
    assert!(reading.blocks <= blocks, "{name} ({values}): {reading:?}");
}

#[tokio::test]
async fn every_list_of_callbacks_is_served_by_an_index() {
    let world = filled().await;
    let session = world.db.session().await.unwrap();
    let all = "SELECT count(*) FROM lethe.callbacks c JOIN lethe.requests USING (request_key)
                WHERE ($1::text IS NULL OR controller_id = $1) AND ($2::text IS NULL OR state = $2)";
    for controller in [None, Some("acme"), Some("third")] {
        for state in [None].into_iter().chain(CallbackState::ALL.iter().copied().map(Some)) {
            let filter = Filter { controller_id: controller.map(|id| id.parse().unwrap()), state, request: None };
            let found = callback_list::list(&session, &filter, 20).await.unwrap();
            let there: i64 = world.one(all, &[&controller, &state]).await;
            let label = format!("{controller:?}, {state:?}");
            assert_eq!(i64::try_from(found.len()).unwrap(), there.min(20), "{label}");
            assert!(found.iter().all(|one| state.is_none_or(|state| one.state == state)), "{label}");
            assert!(found.iter().all(|one| controller.is_none_or(|id| one.controller_id.as_str() == id)), "{label}");
            assert!(found.windows(2).all(|pair| pair[0].created_at >= pair[1].created_at), "{label}: latest first");
            // The latest of all that there are.
            let latest = "SELECT max(c.created_at) FROM lethe.callbacks c JOIN lethe.requests USING (request_key)
                           WHERE ($1::text IS NULL OR controller_id = $1) AND ($2::text IS NULL OR state = $2)";
            let latest: Option<jiff::Timestamp> = world.one(latest, &[&controller, &state]).await;
            assert_eq!(found.first().map(|one| one.created_at), latest, "{label}");
        }
    }
    let statements = callback_list::STATEMENTS;
    for (name, types, values, blocks) in [
        ("LATEST", "text, bigint", "NULL, 20", 1_000),
        ("LATEST", "text, bigint", "'delivered', 20", 1_000),
        // Behind four thousand requests of the other controller.
        ("LATEST_OF_CONTROLLER", "text, bigint, text", "NULL, 20, 'acme'", 1_000),
        ("LATEST_OF_CONTROLLER", "text, bigint, text", "'delivered', 20, 'acme'", 1_000),
        ("LATEST_OF_CONTROLLER", "text, bigint, text", "NULL, 20, 'third'", 1_000),
        // Two looks for each endpoint that has such.
        ("UNDELIVERED", "text, bigint", "'exhausted', 20", 4_000),
        ("UNDELIVERED", "text, bigint", "'waiting', 20", 4_000),
        ("UNDELIVERED_OF_CONTROLLER", "text, bigint, text", "'exhausted', 20, 'acme'", 1_000),
        ("UNDELIVERED_OF_CONTROLLER", "text, bigint, text", "'ready', 20, 'third'", 1_000),
        ("OF_REQUEST", "text, bigint, text, uuid", "NULL, 20, NULL, gen_random_uuid()", 100),
        ("EXHAUSTED_TO_REPLAY", "text, bigint", "'acme', 20", 1_000),
        ("DELIVERED_TO_REPLAY", "text, bigint", "'acme', 20", 1_000),
        ("REPLAY", "uuid[], text, text, bigint", "ARRAY[gen_random_uuid()], NULL, 'exhausted', 20", 100),
    ] {
        is_served_by_indexes(&world, statements, (name, types, values), blocks).await;
    }
}

#[tokio::test]
async fn every_list_of_endpoints_is_served_by_an_index() {
    let world = filled().await;
    world
        .run("UPDATE lethe.endpoints SET consecutive_failures = 3 WHERE endpoint_id % 50 = 0; ANALYZE lethe.endpoints")
        .await;
    for (name, values) in [
        ("LIST", "NULL, 0, 10"),
        ("LIST_OF_CONTROLLER", "'acme', 0, 10"),
        ("LIST_IN_TROUBLE", "NULL, 0, 10"),
        ("LIST_IN_TROUBLE", "'other', 0, 10"),
        ("FIND", "NULL, 7, 1"),
    ] {
        let statements = lethe_db::endpoint_list::STATEMENTS;
        is_served_by_indexes(&world, statements, (name, "text, bigint, bigint", values), 1_000).await;
    }
}

#[tokio::test]
async fn a_replay_waits_for_a_purge_that_is_under_way_and_sends_nothing_of_it() {
    // Of one request, and of a whole week.
    for purge in [
        "UPDATE lethe.requests SET details_week = NULL",
        "SELECT lethe.drop_week(max(week), '-10 years') FROM lethe.detail_weeks",
    ] {
        a_replay_waits_for(purge).await;
    }
}

async fn a_replay_waits_for(statement: &str) {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port) VALUES ('acme', 'https', 'example.com', 443);
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, details_week,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', w.week, sha256('x'), now(), now(), now()
               FROM lethe.week_of(now()) w;
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, 0, 0, endpoint_id, 'pending', now(), 'delivered', now(), now()
               FROM lethe.requests, lethe.endpoints",
        )
        .await;
    let acme = "acme".parse().unwrap();
    let what = Replay { callbacks: None, controller_id: Some(&acme), state: CallbackState::Delivered, limit: 10 };
    let purge = world.db.begin("purging").await.unwrap();
    purge.batch_execute(statement).await.unwrap();
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let purging = async {
        becomes("replays that wait", seconds(10), 1, async || world.one::<i64>(waiting, &[]).await).await;
        purge.commit().await.unwrap();
    };
    let (replayed, ()) = tokio::join!(callback_list::replay(&world.db, &what), purging);
    assert!(replayed.unwrap().0.is_empty());
    assert_eq!(world.one::<String>("SELECT state FROM lethe.callbacks", &[]).await, "delivered");
}
