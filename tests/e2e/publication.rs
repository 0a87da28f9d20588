//! A publication for all tables: erasures go on, and what waiting does not mend shows as that.

use lethe_testing::cli::{json, lethe};
use lethe_testing::erasure::receipt;
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};

const ERASURE: [&str; 3] = ["scheduler", "identity-matcher", "erasure-executor"];

/// From 18 on a publication leaves out the digest in the key of identities, unless it is told otherwise.
async fn leaves_out_generated_columns(world: &World) -> bool {
    world.one("SELECT current_setting('server_version_num')::int >= 180000", &[]).await
}

async fn with_generated_columns(world: &World) -> &'static str {
    if leaves_out_generated_columns(world).await { "WITH (publish_generated_columns = stored)" } else { "" }
}

#[tokio::test]
async fn a_publication_for_all_tables_stops_no_erasure() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    world.run("CREATE PUBLICATION captured FOR ALL TABLES").await;
    let _workers = Worker::several(&world, &ERASURE, SECONDS).await;
    let request = Request::erasure("ada@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    if leaves_out_generated_columns(&world).await {
        eventually("the failure is on record", seconds(20), async || {
            world.optional::<bool>("SELECT needs_operator FROM lethe.slices", &[]).await == Some(true)
        })
        .await;
        let doctor = lethe(&world, &["doctor", "--output", "json"]).await;
        let advice = "ALTER PUBLICATION captured SET (publish_generated_columns = stored)";
        assert!(doctor.out.contains(advice), "{}", doctor.out);
        world.run(advice).await;
        let retried = lethe(&world, &["request", "retry", &request.id, "--controller", "acme"]).await;
        assert_eq!(retried.code, Some(0), "{}", retried.err);
    }
    world.reaches(&request.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
}

#[tokio::test]
async fn every_table_says_what_identifies_its_rows() {
    let world = World::new().await;
    world.controller("acme").await;
    let without = "SELECT c.oid::regclass::text FROM pg_class c
                    WHERE c.relnamespace IN ('lethe'::regnamespace, 'subject_data'::regnamespace) AND c.relkind = 'r'
                      AND c.relreplident <> 'f'
                      AND NOT EXISTS (SELECT FROM pg_index i
                                       WHERE i.indrelid = c.oid
                                         AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END)";
    assert_eq!(world.all::<String>(without, &[]).await, Vec::<String>::new());
}

#[tokio::test]
async fn what_waiting_does_not_mend_shows_as_that() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    let number: i32 = world.one("SELECT partition_no FROM lethe.controllers", &[]).await;
    let partition = format!("subject_data.event_batches_p{number}");
    world.run(&format!("ALTER TABLE {partition} REPLICA IDENTITY NOTHING")).await;
    world.run(&format!("CREATE PUBLICATION captured FOR ALL TABLES {}", with_generated_columns(&world).await)).await;
    let _workers = Worker::several(&world, &ERASURE, SECONDS).await;
    let request = Request::erasure("ada@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    eventually("the failure is on record", seconds(10), async || {
        world.optional::<bool>("SELECT needs_operator FROM lethe.slices", &[]).await == Some(true)
    })
    .await;
    let failure = receipt(&world, &request.id).await.unwrap().failure.unwrap();
    assert_eq!(failure, "sqlstate_55000");
    let status = json(&world, &["request", "status", &request.id, "--controller", "acme"]).await;
    assert_eq!(
        (&status["work"]["last_error"], &status["work"]["needs_operator"]),
        (&failure.as_str().into(), &true.into())
    );
    let batch = json(&world, &["batch", "show", &status["batch_id"].to_string()]).await;
    assert_eq!(batch["kept_by"][0]["needs_operator"], true, "{batch}");
    let doctor = lethe(&world, &["doctor", "--output", "json"]).await;
    assert_eq!(doctor.code, Some(1));
    for found in [format!("{partition} has no key"), format!("acme: {failure}, 1 slices")] {
        assert!(doctor.out.contains(&found), "{found}: {}", doctor.out);
    }
    world.run(&format!("ALTER TABLE {partition} REPLICA IDENTITY DEFAULT")).await;
    world.reaches(&request.id, "completed").await;
}
