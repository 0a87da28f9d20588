//! Whatever loops and commands ask again and again is served by an index: asserted by what the plans read, since a machine may
//! be slow and an index is not (DESIGN rule 18).

use lethe_db::{
    audit, batches, callbacks, leader, overview, purge, put_off, records, release, request_lists, requests, results,
    slices,
};
use lethe_domain::request::{BatchId, RequestKey, RequestStatus, Stage};
use lethe_testing::World;
use lethe_testing::cli::json;
use lethe_testing::history::History;
use lethe_testing::plans::{Kept, explained, reading};
use tokio_postgres::types::ToSql;

const HISTORY: History = History { requests: 20_000, batches: 40, endpoints: 50 };
/// What an index leads to, with room; a statement that reads its table reads 20,000 and more.
const MOST: u64 = 2_000;

/// History, and a little of everything that is open; and plans from before there was anything.
async fn world_with_history() -> (World, Kept) {
    let world = World::new().await;
    let kept = Kept::plan(&world).await;
    let acme = world.controller("acme").await;
    world.controller("quiet").await;
    HISTORY.make(&world, &acme).await;
    world
        .run(
            "INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
             SELECT 'erasure', lethe.now() + n * interval '1 day', lethe.now() + n * interval '1 day', 1,
                    CASE n WHEN 1 THEN 'released' ELSE 'open' END FROM generate_series(1, 3) AS n;
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                         content_digest, details_week, submitted_time, received_at, expected_completion_time)
             SELECT CASE n % 40 WHEN 0 THEN 'quiet' ELSE 'acme' END, gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure',
                    (SELECT max(batch_id) FROM lethe.batches) - n % 3, sha256('x'), w.week, now(), now(), now()
               FROM lethe.week_of(now()) w, generate_series(1, 120) AS n;
             INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
             SELECT batch_id, controller_id, 'erasure', count(*), 1, min(request_key), max(request_key) FROM lethe.requests
              WHERE batch_id = (SELECT max(batch_id) - 2 FROM lethe.batches) GROUP BY 1, 2;
             UPDATE lethe.requests r SET status = 'in_progress', slice_id = s.slice_id FROM lethe.slices s
              WHERE s.state = 'ready' AND s.batch_id = r.batch_id AND s.controller_id = r.controller_id;
             SET session_replication_role = replica;
             UPDATE lethe.requests r SET details_week = w.week FROM lethe.week_of(now() - interval '7 days') w
              WHERE r.status = 'completed';
             UPDATE lethe.requests r SET slice_id = s.slice_id FROM lethe.slices s
              WHERE r.status = 'completed' AND s.batch_id = r.batch_id AND s.controller_id = r.controller_id
                AND r.request_key BETWEEN s.first_request AND s.last_request;
             RESET session_replication_role;
             INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, at_receipt)
             SELECT details_week, request_key, controller_id, 'x', '{1}' FROM lethe.requests WHERE details_week IS NOT NULL;
             INSERT INTO lethe.slice_receipts (slice_id, store, as_of, request_keys, rows_deleted, rows_arrived, verified_at, failures)
             SELECT slice_id, 'postgres', now(), array_agg(request_key ORDER BY request_key), array_agg(2), array_agg(NULL::bigint),
                    array_agg(NULL::timestamptz), array_agg(NULL::text)
               FROM lethe.requests WHERE status = 'completed' GROUP BY slice_id;
             INSERT INTO lethe.results (result_id, request_key, token_salt, token_sha256, object_path, media_type, size_bytes,
                                        lines, wrapped_key, expiry_day, expires_at)
             SELECT gen_random_uuid(), request_key, 'x', sha256(request_key::text::bytea), 'x', 'text/plain', 1, 1, 'x', now(),
                    now() + interval '1 day' FROM lethe.requests WHERE status = 'completed' LIMIT 5000;
             UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() WHERE status = 'pending' AND request_key % 10 = 0;
             UPDATE lethe.requests SET batch_id = NULL, approval = 'needed' WHERE status = 'pending' AND request_key % 10 = 1;
             INSERT INTO lethe.audit_entries (controller_id, slice_id, event, details, requests)
             SELECT CASE n % 2 WHEN 0 THEN 'acme' ELSE 'quiet' END, n, 'requests.completed', '{\"columns\":[]}', '[[]]'
               FROM generate_series(1, 20000) AS n;
             DELETE FROM lethe.audit_unsealed WHERE entry_id < (SELECT max(entry_id) - 10 FROM lethe.audit_entries)",
        )
        .await;
    (world, kept)
}

/// Asks with a plan that was made for nothing, or with one for what is asked.
enum How {
    Kept(Box<Kept>),
    Planned,
}

async fn is_served(
    world: &World,
    how: &How,
    statements: &[(&str, &str)],
    name: &str,
    parameters: &[&(dyn ToSql + Sync)],
) {
    let read = match how {
        How::Planned => reading(world, statements, name, parameters).await,
        How::Kept(kept) => {
            let sql = statements.iter().find(|(one, _)| *one == name).unwrap().1;
            let Some(read) = kept.reading(sql, parameters).await else { return };
            read
        }
    };
    assert!(read.rows <= MOST, "{name} reads {} rows: {:?}", read.rows, read.whole);
    // Small tables may be read as a whole: batches, totals, leaders.
    let large = ["requests", "callbacks", "results", "callback_attempts", "audit_entries", "slice_receipts"];
    let is_large = |table: &str| large.contains(&table) || table.starts_with("request_details");
    let whole = read.whole.iter().find(|(table, rows)| *rows > 0 && is_large(table));
    assert!(whole.is_none(), "{name}: {whole:?}");
}

async fn lists(world: &World, how: &How) {
    let (limit, nobody, quiet) = (50_i64, None::<String>, Some("quiet".to_owned()));
    let lists = request_lists::STATEMENTS;
    for name in ["LATEST", "CANCELLED"] {
        is_served(world, how, lists, name, &[&limit]).await;
    }
    for name in ["LATEST_OF_CONTROLLER", "CANCELLED_OF_CONTROLLER"] {
        is_served(world, how, lists, name, &[&limit, &"quiet"]).await;
    }
    for who in [&nobody, &quiet] {
        is_served(world, how, lists, "AWAITING_APPROVAL", &[&limit, who]).await;
        is_served(world, how, lists, "IN_PROGRESS", &[&limit, who]).await;
        for (status, states) in
            [("pending", &["open", "closed"][..]), ("completed", &["closed", "released", "completed"])]
        {
            is_served(world, how, lists, "BY_BATCH", &[&limit, who, &status, &states]).await;
        }
    }
    for only in [None, Some(BatchId(1))] {
        is_served(world, how, batches::STATEMENTS, "LIST", &[&only, &20_i64]).await;
    }
    // Calls for statuses in groups, and the work on slices.
    let some =
        "SELECT subject_request_id FROM lethe.requests WHERE controller_id = 'acme' ORDER BY request_key LIMIT 64";
    let ids: Vec<uuid::Uuid> = world.all(some, &[]).await;
    let theirs = vec!["acme"; ids.len()];
    for name in ["STATUS", "PAST_STATUS"] {
        is_served(world, how, requests::STATEMENTS, name, &[&theirs, &ids]).await;
    }
    let slice: i64 = world.one("SELECT max(slice_id) FROM lethe.slices WHERE state = 'completed'", &[]).await;
    is_served(world, how, slices::STATEMENTS, "MEMBERS", &[&slice]).await;
    is_served(world, how, slices::STATEMENTS, "COMPLETE_ERASED", &[&slice, &vec!["postgres"], &vec![1_i64]]).await;
    let delivered: Vec<uuid::Uuid> = world.all("SELECT callback_id FROM lethe.callbacks LIMIT 64", &[]).await;
    is_served(world, how, callbacks::STATEMENTS, "EXHAUST_PURGED", &[&delivered, &uuid::Uuid::new_v4()]).await;
    // Of a batch of 500 the requests, and of each its profiles and receipts.
    for name in ["EXECUTED_MPIDS", "EXECUTED_ROWS"] {
        is_served(world, how, batches::STATEMENTS, name, &[&BatchId(1)]).await;
    }
}

async fn what_the_leader_asks(world: &World, how: &How) {
    for name in ["DUE", "TO_RELEASE", "WITHOUT_BATCH"] {
        is_served(world, how, batches::STATEMENTS, name, &[]).await;
    }
    for name in ["BY_STATUS", "CALLBACKS_BY_STATE", "OLDEST_CALLBACK"] {
        is_served(world, how, overview::STATEMENTS, name, &[]).await;
    }
    is_served(world, how, overview::STATEMENTS, "OLDEST", &[&Stage::ALL]).await;
    for name in ["FOLD_REQUESTS", "FOLD_CALLBACKS"] {
        is_served(world, how, overview::STATEMENTS, name, &[&1_000_i64]).await;
    }
    for (name, _) in put_off::STATEMENTS {
        is_served(world, how, put_off::STATEMENTS, name, &[&3_600.0, &500_i64]).await;
    }
    let left_out: Vec<&str> = Vec::new();
    is_served(world, how, audit::STATEMENTS, "TAKE", &[&left_out, &2_000_i64, &16_000_000_i64]).await;
    is_served(world, how, audit::STATEMENTS, "COMPLETIONS", &[&RequestKey(1)]).await;
    let holder = uuid::Uuid::new_v4();
    is_served(world, how, leader::STATEMENTS, "ACQUIRE", &[&holder, &15.0, &None::<jiff::Timestamp>]).await;
    for name in ["EXPIRE", "EXPIRED_OBJECTS"] {
        is_served(world, how, results::STATEMENTS, name, &[&500_i64]).await;
    }
    let open: BatchId = world.one("SELECT max(batch_id) FROM lethe.batches", &[]).await;
    let first = RequestKey(0);
    is_served(world, how, release::STATEMENTS, "TAKE", &[&open, &500_i64, &4_000_000_i64, &"", &first]).await;
    is_served(world, how, release::STATEMENTS, "FINISH", &[&open]).await;
    let days = 30.0 * 86_400.0;
    is_served(world, how, purge::STATEMENTS, "DUE", &[&days, &Vec::<i64>::new()]).await;
    let key = RequestKey(0);
    for week in world.all::<i64>("SELECT week FROM lethe.detail_weeks", &[]).await {
        is_served(world, how, purge::STATEMENTS, "OF_WEEK", &[&days, &days, &200_i64, &week, &key]).await;
    }
    let epoch = jiff::Timestamp::UNIX_EPOCH;
    is_served(world, how, purge::STATEMENTS, "OF_CANCELLED", &[&days, &days, &200_i64, &epoch, &key]).await;
    is_served(world, how, records::STATEMENTS, "NEXT_BATCH", &[&days, &Vec::<BatchId>::new()]).await;
    is_served(world, how, records::STATEMENTS, "WALK", &[&days, &BatchId(1), &"", &0_i64, &200_i64]).await;
    is_served(world, how, records::STATEMENTS, "WALK_WITHOUT_BATCH", &[&days, &"", &0_i64, &200_i64]).await;
}

#[tokio::test]
async fn plans_from_before_there_was_anything_read_no_more() {
    let (world, kept) = world_with_history().await;
    let how = How::Kept(Box::new(kept));
    lists(&world, &how).await;
    what_the_leader_asks(&world, &how).await;
}

/// Beside row-level security only plain comparisons choose rows of an index (ADR 0020).
#[tokio::test]
async fn certificates_and_statuses_are_found_by_indexes_under_the_role_of_the_gateway() {
    let (world, _) = world_with_history().await;
    world.run("ANALYZE").await;
    let request: i64 = world
        .one("SELECT max(request_key) FROM lethe.requests WHERE controller_id = 'acme' AND slice_id IS NOT NULL", &[])
        .await;
    let of_request = "SELECT subject_request_id FROM lethe.requests WHERE request_key = $1";
    let id: uuid::Uuid = world.one(of_request, &[&request]).await;
    let acting = "SET LOCAL ROLE lethe_gateway; SET LOCAL lethe.controller_id = 'acme'; SET LOCAL plan_cache_mode = ";
    for mode in ["force_custom_plan", "force_generic_plan"] {
        let read = explained(
            &world,
            audit::STATEMENTS,
            "COMPLETIONS",
            "bigint",
            &request.to_string(),
            &format!("{acting}{mode}"),
        )
        .await;
        assert!(read.rows <= 10, "{mode}: {}", read.plan);
        let values = format!("ARRAY['acme'], ARRAY['{id}'::uuid]");
        let settings = format!("{acting}{mode}");
        let read = explained(&world, requests::STATEMENTS, "STATUS", "text[], uuid[]", &values, &settings).await;
        assert!(read.rows <= 20, "{mode}: {}", read.plan);
    }
}

#[tokio::test]
async fn lists_of_requests_and_batches_read_what_they_list() {
    let (world, _) = world_with_history().await;
    world.run("ANALYZE").await;
    lists(&world, &How::Planned).await;
    let shown = json(&world, &["batch", "show", "1"]).await;
    assert_eq!((&shown["requests"], &shown["executed"]["rows"][0][1]), (&500.into(), &1_000.into()), "{shown}");
    // And they list what they should.
    let counts = [("pending", 50), ("in_progress", 40), ("completed", 50), ("cancelled", 8)];
    for (status, wanted) in counts {
        let listed = json(&world, &["request", "list", "--status", status]).await;
        let listed = listed.as_array().unwrap();
        assert_eq!(listed.len(), wanted, "{status}");
        assert!(listed.iter().all(|one| one["status"] == status));
    }
    let of_quiet: i64 = world.one("SELECT count(*) FROM lethe.requests WHERE controller_id = 'quiet'", &[]).await;
    let all = json(&world, &["request", "list", "--controller", "quiet"]).await;
    assert_eq!(all.as_array().unwrap().len(), usize::try_from(of_quiet).unwrap());
    let mut by_status = 0;
    for status in RequestStatus::ALL {
        let listed = json(&world, &["request", "list", "--controller", "quiet", "--status", status.as_str()]).await;
        by_status += listed.as_array().unwrap().len();
    }
    assert_eq!(by_status, usize::try_from(of_quiet).unwrap(), "each is in the list of its status");
    let waiting: i64 = world.one("SELECT count(*) FROM lethe.requests WHERE approval = 'needed'", &[]).await;
    let listed = json(&world, &["request", "list", "--awaiting-approval"]).await;
    assert_eq!(listed.as_array().unwrap().len(), usize::try_from(waiting).unwrap());
}

#[tokio::test]
async fn what_the_leader_asks_again_and_again_reads_no_history() {
    let (world, _) = world_with_history().await;
    world.run("ANALYZE").await;
    what_the_leader_asks(&world, &How::Planned).await;
}
