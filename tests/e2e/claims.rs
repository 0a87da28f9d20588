//! Claims of callbacks, as the database hands them out: exact, and as cheap after a million deliveries as after one
//! (ADR 0025).

use jiff::SignedDuration;
use lethe_db::callbacks::{self, EndpointLimits};
use lethe_domain::request::EndpointId;
use lethe_testing::World;
use lethe_testing::plans::touched;
use lethe_testing::wait::{eventually, seconds};
use serde_json::Value;
use uuid::Uuid;

const LIMIT: i32 = 8;

/// One endpoint, and one request with so many callbacks that are due for it.
async fn world_with(callbacks: i32) -> World {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port) VALUES ('acme', 'https', 'example.com', 443);
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             VALUES ('acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', sha256('x'), now(), now(), now())",
        )
        .await;
    add(&world, 0, callbacks, "now() - interval '1 minute'").await;
    world.run("ANALYZE lethe.callbacks").await;
    world
}

/// Callbacks from the number `first` on, due at an instant; one after the other.
async fn add(world: &World, first: i32, count: i32, due: &str) {
    world
        .run(&format!(
            "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, {first} + n, 0, endpoint_id, 'pending', now(), 'ready',
                    {due} + n * interval '1 ms', now()
               FROM lethe.requests, lethe.endpoints, generate_series(1, {count}) AS n ORDER BY n"
        ))
        .await;
}

fn claim_sql(wanted: i32) -> String {
    format!(
        "SELECT url_no::int FROM lethe.claim_due_callbacks(ARRAY(SELECT endpoint_id FROM lethe.endpoints), ARRAY[{wanted}], gen_random_uuid(), 60, {LIMIT})"
    )
}

/// For the next half minute no claim looks at what lies before its place.
const LOOK_NO_MORE: &str = "UPDATE lethe.endpoints SET looked_back_at = lethe.now() + interval '30 s'";
/// The next claim does.
const LOOK_NOW: &str = "UPDATE lethe.endpoints SET looked_back_at = '-infinity'";

/// Claims up to so many; their numbers, in order.
async fn claim(world: &World, wanted: i32) -> Vec<i32> {
    let mut claimed: Vec<i32> = world.all(&claim_sql(wanted), &[]).await;
    claimed.sort_unstable();
    claimed
}

const DELIVERED: &str = "state = 'delivered', lease_token = NULL, lease_expires_at = NULL, finished_at = now()";

async fn deliver(world: &World, numbers: &[i32]) {
    let sql = format!("UPDATE lethe.callbacks SET {DELIVERED} WHERE url_no = ANY ($1::int[]) RETURNING callback_id");
    let delivered: Vec<Uuid> = world.all(&sql, &[&numbers]).await;
    assert_eq!(delivered.len(), numbers.len());
}

#[tokio::test]
async fn an_endpoint_gets_what_is_due_in_order_up_to_its_limit() {
    let world = world_with(20).await;
    assert_eq!(claim(&world, 5).await, [1, 2, 3, 4, 5]);
    assert_eq!(claim(&world, 5).await, [6, 7, 8]);
    assert!(claim(&world, 5).await.is_empty());
    deliver(&world, &[2, 7]).await;
    assert_eq!(claim(&world, 1).await, [9]);
    assert_eq!(claim(&world, 9).await, [10]);
    deliver(&world, &[1, 3, 4, 5, 6, 8, 9, 10]).await;
    assert_eq!(claim(&world, 9).await, (11..=18).collect::<Vec<_>>());
    deliver(&world, &(11..=18).collect::<Vec<_>>()).await;
    assert_eq!(claim(&world, 9).await, [19, 20]);
}

#[tokio::test]
async fn a_lease_that_has_run_out_is_claimed_once_more_and_counts_once() {
    let world = world_with(20).await;
    claim(&world, 3).await;
    assert_eq!(claim(&world, 2).await, [4, 5]);
    deliver(&world, &[1, 4]).await;
    world.set_clock(world.now().await + SignedDuration::from_secs(61)).await;
    world.run(LOOK_NO_MORE).await;
    assert_eq!(claim(&world, 4).await, [2, 3, 5, 6], "the oldest are behind no place");
    assert_eq!(claim(&world, 9).await, [7, 8, 9, 10], "four are in flight, whoever claimed them first");
    let attempts: Vec<i32> = world.all("SELECT attempts FROM lethe.callbacks ORDER BY url_no LIMIT 6", &[]).await;
    assert_eq!(attempts, [1, 2, 2, 1, 2, 1]);
}

#[tokio::test]
async fn what_is_committed_late_is_found_within_seconds() {
    let world = world_with(20).await;
    claim(&world, 8).await;
    add(&world, 100, 1, "now() - interval '1 hour'").await;
    deliver(&world, &[1]).await;
    world.run(LOOK_NO_MORE).await;
    let mut claimed = claim(&world, 1).await;
    assert_eq!(claimed, [9], "the other one lies before the place of the last claim");
    world.run("UPDATE lethe.endpoints SET looked_back_at = lethe.now()").await;
    eventually("the late one is claimed", seconds(10), async || {
        deliver(&world, &claimed).await;
        claimed = claim(&world, 1).await;
        claimed == [101]
    })
    .await;
}

#[tokio::test]
async fn a_clock_that_is_set_back_strands_nothing() {
    let world = world_with(20).await;
    world.run("UPDATE lethe.clock SET shift = '10 minutes'").await;
    let ahead = claim(&world, 8).await;
    deliver(&world, &ahead).await;
    for shift in ["9 minutes 30 s", "0"] {
        world.run(&format!("UPDATE lethe.clock SET shift = '{shift}'")).await;
        let claimed = claim(&world, 2).await;
        assert_eq!(claimed.len(), 2, "with a shift of {shift}");
        deliver(&world, &claimed).await;
    }
    world.run("UPDATE lethe.endpoints SET last_nudged_at = lethe.now() + interval '1 hour'").await;
    let woken = lethe_db::endpoints::to_wake(&world.db.session().await.unwrap(), 2.0, 10).await.unwrap();
    assert_eq!(woken.len(), 1);
}

/// The clock was set back, nobody claimed for as long, and it is where the last claim was: as if it had stood still, but
/// something has become due meanwhile.
#[tokio::test]
async fn what_became_due_while_a_clock_caught_up_is_claimed_at_once() {
    let world = world_with(2).await;
    world.run("UPDATE lethe.clock SET shift = '10 minutes'").await;
    for back in ["0 s", "3 s", "-1 s"] {
        let claimed = claim(&world, 8).await;
        deliver(&world, &claimed).await;
        add(&world, 100, 1, "now() + interval '1 minute'").await;
        let claimed_at: jiff::Timestamp = world.one("SELECT max(claimed_at) FROM lethe.endpoints", &[]).await;
        let sql = format!("UPDATE lethe.clock SET shift = $1 - clock_timestamp() - interval '{back}' RETURNING true");
        assert!(world.one::<bool>(&sql, &[&claimed_at]).await);
        assert_eq!(claim(&world, 8).await, [101], "{back} before the last claim");
        deliver(&world, &[101]).await;
        world.run("UPDATE lethe.callbacks SET url_no = url_no + 1000 WHERE state = 'delivered'").await;
        world.run("UPDATE lethe.clock SET shift = shift + interval '10 minutes'").await;
    }
}

/// Blocks that a claim of eight touches.
async fn blocks(world: &World, looks_back: bool) -> u64 {
    world.run(&format!("UPDATE lethe.callbacks SET {DELIVERED} WHERE lease_token IS NOT NULL")).await;
    world.run(if looks_back { LOOK_NOW } else { LOOK_NO_MORE }).await;
    let plan: Value = world.one(&format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {}", claim_sql(LIMIT)), &[]).await;
    touched(&plan, 8.0)
}

/// As during a dump or an import: PostgreSQL keeps whatever the oldest snapshot may see, in the indexes as well.
#[tokio::test]
async fn a_claim_costs_the_same_however_much_was_delivered_before_it() {
    let world = world_with(4_000).await;
    let dump = world.db.session().await.unwrap();
    dump.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM lethe.callbacks").await.unwrap();
    let first = blocks(&world, false).await;
    world
        .run(&format!(
            "DO $$ BEGIN FOR turn IN 1..400 LOOP
                 UPDATE lethe.callbacks SET {DELIVERED} WHERE lease_token IS NOT NULL; COMMIT;
                 PERFORM FROM ({}) claimed; COMMIT;
             END LOOP; END $$",
            claim_sql(LIMIT)
        ))
        .await;
    let later = blocks(&world, false).await;
    assert!(later <= first + 200, "{first} blocks for the first claim, {later} for the 402nd");
    // What it would cost from the beginning.
    let back = blocks(&world, true).await;
    assert!(back > later + 2_000, "{later} blocks, {back} from the beginning");
    dump.batch_execute("COMMIT").await.unwrap();
}

/// A purge and a replay of the release before could meet. The records of a request with an open callback never end.
#[tokio::test]
async fn what_is_claimed_of_a_purged_request_is_exhausted_with_all_the_others_of_it() {
    let world = world_with(3).await;
    world.run("UPDATE lethe.callbacks SET state = 'waiting' WHERE url_no = 3").await;
    let session = world.db.session().await.unwrap();
    let limits = EndpointLimits { in_flight: LIMIT, lease: seconds(60) };
    let endpoint: EndpointId = world.one("SELECT endpoint_id FROM lethe.endpoints", &[]).await;
    let claimed = callbacks::claim(&session, &world.keys(), limits, &[(endpoint, 1)]).await.unwrap();
    assert!(claimed.is_empty());
    let exhausted = "SELECT count(*) FROM lethe.callbacks
                      WHERE state = 'exhausted' AND exhausted_because = 'retention' AND lease_token IS NULL";
    assert_eq!(world.one::<i64>(exhausted, &[]).await, 3);
}
