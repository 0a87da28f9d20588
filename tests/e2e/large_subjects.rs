//! Large subjects: steps that are too much for the server shrink until they are not. How slow the server is, is a trigger's
//! matter, so that it does not depend on the machine.

use std::collections::BTreeMap;

use jiff::Timestamp;
use lethe_db::Db;
use lethe_domain::request::{ControllerId, Mpid};
use lethe_stores::DataStore as _;
use lethe_stores::postgres::{self, PostgresStore};
use lethe_testing::erasure::{Receipt, receipt};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World, seconds_with};
use serde_json::json;

/// Each row of a controller's table takes so long to delete.
async fn slow_down(world: &World, table: &str, milliseconds: u32) {
    world
        .run(&format!(
            "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $f$
             BEGIN PERFORM pg_sleep({milliseconds} / 1000.0); RETURN OLD; END $f$;
             CREATE TRIGGER slow BEFORE DELETE ON subject_data.{table} FOR EACH ROW EXECUTE FUNCTION public.slow()"
        ))
        .await;
}

/// The same database, where a statement may take half a second: what is given after our own settings wins.
fn impatient(world: &World) -> String {
    format!("{}?options=-c%20statement_timeout%3D500ms", world.database_url)
}

#[tokio::test]
async fn a_profile_with_many_large_batches_is_erased_in_steps_that_fit() {
    const BATCHES: i64 = 80;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    // 20 kB each, which do not compress well.
    let insert = format!(
        "INSERT INTO subject_data.event_batches (controller_id, mpid, body)
         SELECT 'acme', 1, json_build_object('mpid', 1, 'noise', (SELECT string_agg(md5(random()::text || part), '')
                                                                    FROM generate_series(1, 625) AS part))
           FROM generate_series(1, {BATCHES}) AS n"
    );
    world.run(&insert).await;
    slow_down(&world, "event_batches", 20).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], SECONDS).await;
    let _executor = Worker::start(&world, "erasure-executor", &[("DATABASE_URL", &impatient(&world))]).await;
    let request = Request::erasure("ada@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
    let expected = Receipt { deleted: BATCHES + 2, arrived: Some(0), verified: true, failure: None };
    assert_eq!(receipt(&world, &request.id).await, Some(expected));
}

#[tokio::test]
async fn an_approved_request_with_many_profiles_is_erased_in_steps_that_fit() {
    const PROFILES: i64 = 700;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let lines: Vec<String> = (0..PROFILES)
        .map(|mpid| json!({"mpid": mpid, "identities": {"email": "all@example.com"}}).to_string())
        .collect();
    world.profiles(&acme, &lines).await;
    let batches: Vec<String> = (0..PROFILES).map(|mpid| json!({"mpid": mpid}).to_string()).collect();
    world.event_batches(&acme, &batches).await;
    slow_down(&world, "profiles", 2).await;
    let capped = seconds_with(&[("LETHE_MAX_MPIDS_PER_REQUEST", "3")]);
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &capped).await;
    let _executor = Worker::start(&world, "erasure-executor", &[("DATABASE_URL", &impatient(&world))]).await;
    let request = Request::erasure("all@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    let target = (acme.clone(), request.id.parse().unwrap());
    eventually("it can be approved", seconds(10), async || {
        lethe_db::requests::approve(&world.db, &target).await.unwrap().is_some()
    })
    .await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(receipt(&world, &request.id).await.unwrap().deleted, 3 * PROFILES);
    assert_eq!(world.one::<i64>("SELECT count(*) FROM subject_data.event_batches", &[]).await, 0);
}

/// The large batch is due first; it is tried once in a round, in a smaller step each time.
#[tokio::test]
async fn a_batch_whose_steps_are_too_much_holds_up_no_other() {
    const REQUESTS: usize = 300;
    let world = World::new().await;
    world.controller("acme").await;
    let first = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let mut requests: Vec<Request> = (0..REQUESTS).map(|_| Request::erasure("ada@example.com").expedited()).collect();
    requests.push(Request::erasure("bob@example.com"));
    publisher.send_all(&requests.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    world.count_reaches("pending", i64::try_from(requests.len()).unwrap()).await;
    drop(first);
    world
        .run(
            "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $f$
             BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END $f$;
             CREATE TRIGGER slow BEFORE UPDATE ON lethe.requests FOR EACH ROW
                WHEN (NEW.status = 'in_progress') EXECUTE FUNCTION public.slow()",
        )
        .await;
    world.set_clock(world.now().await + jiff::SignedDuration::from_hours(24 * 20)).await;
    let _matcher = Worker::start(&world, "identity-matcher", &[]).await;
    let _scheduler = Worker::start(&world, "scheduler", &[("DATABASE_URL", &impatient(&world))]).await;
    world.count_reaches("in_progress", i64::try_from(requests.len()).unwrap()).await;
    let others_first = "
        SELECT min(s.created_at) FILTER (WHERE s.batch_id = small.batch_id)
               < min(s.created_at) FILTER (WHERE s.batch_id <> small.batch_id)
          FROM lethe.slices s, (SELECT batch_id FROM lethe.requests WHERE subject_request_id::text = $1) small";
    assert!(world.one::<bool>(others_first, &[&requests[REQUESTS].id]).await);
}

/// Slow to read: a policy of the gateway's role, which the owner of the tables is not under.
#[tokio::test]
async fn what_is_left_is_counted_in_pieces_that_fit() {
    const PROFILES: i64 = 400;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let lines: Vec<String> = (0..PROFILES).map(|mpid| json!({"mpid": mpid}).to_string()).collect();
    world.profiles(&acme, &lines).await;
    world
        .run(
            "GRANT SELECT ON subject_data.profiles, subject_data.profile_identities, subject_data.event_batches TO lethe_gateway;
             ALTER TABLE subject_data.profiles ENABLE ROW LEVEL SECURITY;
             CREATE POLICY slow ON subject_data.profiles TO lethe_gateway USING (pg_sleep(0.005)::text = '')",
        )
        .await;
    let db = Db::with_role(&impatient(&world), 2, "lethe-testing", Some("lethe_gateway")).unwrap().acting_for(&acme);
    let mpids: Vec<Mpid> = (0..PROFILES).map(Mpid).collect();
    let held = PostgresStore::new(db).count(&acme, &mpids, Timestamp::now()).await.unwrap();
    assert_eq!(held.values().map(|held| held.before).sum::<i64>(), PROFILES);
}

/// Deletes one step; how many rows of each profile, behind which row to go on, and whether to.
async fn step(
    world: &World,
    acme: &ControllerId,
    mpids: &[i64],
    after: i64,
    (rows, bytes): (i64, i64),
) -> (BTreeMap<i64, i64>, i64, bool) {
    let (_, sql) = postgres::STATEMENTS.iter().find(|(name, _)| *name == "DELETE_EVENT_BATCHES").unwrap();
    let session = world.db.session().await.unwrap();
    let now = Timestamp::now();
    let found = session.raw().query(*sql, &[acme, &mpids, &now, &after, &rows, &bytes]).await.unwrap();
    let deleted = found.iter().map(|row| (row.get(0), row.get(1))).collect();
    found.last().map_or((deleted, 0, false), |last| {
        (found.iter().map(|row| (row.get(0), row.get(1))).collect(), last.get(2), last.get(3))
    })
}

#[tokio::test]
async fn a_step_is_bounded_in_rows_and_bytes_and_goes_on_behind_the_last_row() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let line = |mpid: i64, size: usize| json!({"mpid": mpid, "x": "y".repeat(size)}).to_string();
    // The first one by itself is more than the limit.
    let lines: Vec<String> =
        [(1, 1_500), (1, 100), (1, 100), (2, 100), (3, 100), (3, 100)].map(|(mpid, size)| line(mpid, size)).to_vec();
    world.event_batches(&acme, &lines).await;
    let ids: Vec<i64> = world.all("SELECT id FROM subject_data.event_batches ORDER BY id", &[]).await;
    let limits = (3, 1_000);
    let (deleted, after, more) = step(&world, &acme, &[1, 2, 3], i64::MIN, limits).await;
    assert_eq!((deleted, after, more), (BTreeMap::from([(1, 1)]), ids[0], true));
    let (deleted, after, more) = step(&world, &acme, &[1, 2, 3], after, limits).await;
    assert_eq!((deleted, after, more), (BTreeMap::from([(1, 2), (2, 1)]), ids[3], true));
    let (deleted, _, more) = step(&world, &acme, &[2, 3], after, limits).await;
    assert_eq!((deleted, more), (BTreeMap::from([(3, 2)]), false));
}
