//! Writers: those from before the start of an execution are waited for, whatever they are, and nobody else.

use lethe_db::Tx;
use lethe_testing::erasure::receipt;
use lethe_testing::wait::{becomes, eventually, seconds, stays};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};

const ERASURE: [&str; 3] = ["scheduler", "identity-matcher", "erasure-executor"];
const INSERT: &str =
    r#"INSERT INTO subject_data.event_batches (controller_id, mpid, body) VALUES ('acme', 1, '{"mpid":1}')"#;

/// A controller with one person: a profile, an identity, an event batch.
async fn world_of_acme() -> World {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    world
}

async fn writer(world: &World, statement: &str) -> Tx {
    let writer = world.db.begin("writer").await.unwrap();
    writer.batch_execute(statement).await.unwrap();
    writer
}

/// Sends an erasure and waits until its execution has found somebody to wait for.
async fn begin(world: &World) -> (Vec<Worker>, Request) {
    let workers = Worker::several(world, &ERASURE, SECONDS).await;
    let request = Request::erasure("ada@example.com");
    Publisher::connect(world).await.request("acme", &request).await;
    eventually("the execution waits", seconds(10), async || {
        receipt(world, &request.id).await.is_some_and(|receipt| receipt.failure.as_deref() == Some("writers_under_way"))
    })
    .await;
    (workers, request)
}

async fn rows(world: &World) -> (i64, i64, i64) {
    world.rows_of(&"acme".parse().unwrap(), 1).await
}

#[tokio::test]
async fn later_writers_that_never_cease_hold_up_no_erasure() {
    let world = world_of_acme().await;
    let first = writer(&world, INSERT).await;
    let (_workers, request) = begin(&world).await;
    // From now on there is always one, and each begins before the one before it ends.
    let mut later = writer(&world, INSERT).await;
    for _ in 0..3 {
        let next = writer(&world, INSERT).await;
        later.commit().await.unwrap();
        later = next;
        let attempts: i32 = world.one("SELECT attempts FROM lethe.slices", &[]).await;
        eventually("another attempt", seconds(10), async || {
            world.one::<i32>("SELECT attempts FROM lethe.slices", &[]).await > attempts
        })
        .await;
    }
    assert_eq!(world.status(&request.id).await, "in_progress", "the first one is still there");
    first.commit().await.unwrap();
    world.reaches(&request.id, "completed").await;
    later.commit().await.unwrap();
    assert_eq!(rows(&world).await, (0, 0, 4), "what came later stays");
    let receipt = receipt(&world, &request.id).await.unwrap();
    assert_eq!((receipt.deleted, receipt.arrived), (4, Some(3)), "one of the later ones was not visible yet");
}

#[tokio::test]
async fn a_prepared_transaction_is_waited_for() {
    let world = world_of_acme().await;
    let prepared = writer(&world, INSERT).await;
    prepared.batch_execute(&format!("PREPARE TRANSACTION '{}'", world.name)).await.unwrap();
    let (_workers, request) = begin(&world).await;
    stays("the wait for it", seconds(1), async || world.status(&request.id).await == "in_progress").await;
    world.run(&format!("COMMIT PREPARED '{}'", world.name)).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(rows(&world).await, (0, 0, 0));
    assert_eq!(receipt(&world, &request.id).await.unwrap().deleted, 4);
}

#[tokio::test]
async fn a_writer_that_is_prepared_meanwhile_is_waited_for() {
    let world = world_of_acme().await;
    let first = writer(&world, INSERT).await;
    let (_workers, request) = begin(&world).await;
    first.batch_execute(&format!("PREPARE TRANSACTION '{}'", world.name)).await.unwrap();
    let attempts: i32 = world.one("SELECT attempts FROM lethe.slices", &[]).await;
    eventually("two more attempts", seconds(10), async || {
        world.one::<i32>("SELECT attempts FROM lethe.slices", &[]).await >= attempts + 2
    })
    .await;
    assert_eq!(world.status(&request.id).await, "in_progress");
    let writers: Vec<String> = world.one("SELECT writers FROM lethe.slices", &[]).await;
    assert!(writers.len() == 1 && writers[0].starts_with("prepared/"), "{writers:?}");
    world.run(&format!("COMMIT PREPARED '{}'", world.name)).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(rows(&world).await, (0, 0, 0));
}

#[tokio::test]
async fn a_wait_for_writers_does_not_show_that_the_tables_can_be_worked_on() {
    let world = world_of_acme().await;
    let first = writer(&world, INSERT).await;
    let pause = "INSERT INTO lethe.pauses (stage, controller_id, class, since, paused_at, paused_until)
                 SELECT 'erasure', 'acme', 'sqlstate_55P03', i, i, i FROM (SELECT lethe.now() - interval '1 minute') c (i)";
    world.run(pause).await;
    let (_workers, request) = begin(&world).await;
    eventually("another attempt", seconds(10), async || {
        world.one::<i32>("SELECT attempts FROM lethe.slices", &[]).await >= 2
    })
    .await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.pauses", &[]).await, 1);
    first.commit().await.unwrap();
    world.reaches(&request.id, "completed").await;
    let pauses = async || world.one::<i64>("SELECT count(*) FROM lethe.pauses", &[]).await;
    becomes("pauses", seconds(10), 0, pauses).await;
}

/// The time of receipt is computed before the row finds its partition: with a large first row that takes a while.
#[tokio::test]
async fn a_writer_whose_first_row_has_no_partition_yet_is_waited_for() {
    let world = world_of_acme().await;
    world.controller("other").await;
    let elsewhere = INSERT.replace("acme", "other");
    // One that writes to somebody else's partition.
    let foreign = writer(&world, &elsewhere).await;
    let first = writer(&world, "LOCK TABLE ONLY subject_data.event_batches IN ROW EXCLUSIVE MODE").await;
    let received_at: jiff::Timestamp = world.one("SELECT clock_timestamp()", &[]).await;
    let (_workers, request) = begin(&world).await;
    let late = INSERT.replace("(controller_id", "(received_at, controller_id").replace("('acme'", "($1, 'acme'");
    first.raw().execute(&late, &[&received_at]).await.unwrap();
    first.commit().await.unwrap();
    world.reaches(&request.id, "completed").await;
    assert_eq!(rows(&world).await, (0, 0, 0));
    foreign.commit().await.unwrap();
}

#[tokio::test]
async fn an_erasure_is_no_writer_for_another_one() {
    let world = world_of_acme().await;
    let deleting = "DELETE FROM subject_data.profiles WHERE controller_id = 'acme' AND mpid = 2";
    let writers = async || world.one::<Vec<String>>("SELECT lethe.writers('acme')", &[]).await.len();
    let somebody = writer(&world, deleting).await;
    assert_eq!(writers().await, 1, "whoever deletes may have inserted before");
    somebody.rollback().await;
    let of_ours =
        writer(&world, &format!("SELECT pg_advisory_xact_lock_shared(lethe.eraser_lock()); {deleting}")).await;
    assert_eq!(writers().await, 0);
    of_ours.rollback().await;
    // The executor's own, which waits for a row that somebody has locked.
    let locked = writer(&world, "SELECT FROM subject_data.event_batches WHERE controller_id = 'acme' FOR UPDATE").await;
    let _workers = Worker::several(&world, &ERASURE, SECONDS).await;
    let request = Request::erasure("ada@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    eventually("it waits with rows deleted, and is not a writer", seconds(20), async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity a
                                   WHERE a.datname = current_database() AND a.wait_event_type = 'Lock'
                                     AND a.query LIKE '%::DELETE_EVENT_BATCHES %')
                      AND lethe.writers('acme') = '{}'";
        world.one(sql, &[]).await
    })
    .await;
    locked.commit().await.unwrap();
    world.reaches(&request.id, "completed").await;
    assert_eq!(rows(&world).await, (0, 0, 0));
}
