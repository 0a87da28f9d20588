//! What a key store must be able to do: refuse to write a key twice, and forget what is deleted. One that cannot is refused.

use lethe_testing::cli::lethe_with;
use lethe_testing::s3::{Kind, S3};
use lethe_testing::wait::{eventually, seconds, stays};
use lethe_testing::{Publisher, Request, Worker, World, seconds_with};

#[tokio::test]
async fn a_key_store_that_writes_a_key_twice_is_found_and_refused() {
    is_refused(Kind::IgnoresConditions, "does not refuse to write a key that already exists").await;
}

#[tokio::test]
async fn a_key_store_that_keeps_versions_is_found_and_refused() {
    is_refused(Kind::Versioned, "keeps versions of what is deleted").await;
}

async fn is_refused(kind: Kind, found: &str) {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let s3 = S3::start(kind).await;
    let store = s3.key_store();
    let store: Vec<(&str, &str)> = store.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let doctor = lethe_with(&world, &["doctor", "--output", "json"], &store).await;
    assert!(doctor.code == Some(1) && doctor.out.contains(found), "{}", doctor.out);

    let settings = seconds_with(&store);
    let workers = [Worker::spawn(&world, "scheduler", &settings), Worker::spawn(&world, "access-compiler", &settings)];
    for worker in &workers {
        eventually("it is not ready", seconds(20), async || {
            let (status, text) = worker.get("/readyz").await.unwrap_or_default();
            status == 503 && text.contains("key_store") && worker.log().contains(found)
        })
        .await;
    }
    // Erasures need no key.
    let _others = Worker::several(&world, &["identity-matcher", "erasure-executor"], &seconds_with(&[])).await;
    let publisher = Publisher::connect(&world).await;
    let (access, erasure) = (Request::access("ada@example.com"), Request::erasure("ada@example.com"));
    publisher.request("acme", &access).await;
    publisher.request("acme", &erasure).await;
    world.reaches(&erasure.id, "completed").await;
    world.reaches(&access.id, "in_progress").await;
    stays("nothing is compiled", seconds(1), async || world.status(&access.id).await == "in_progress").await;
}

#[tokio::test]
async fn a_key_store_that_speaks_s3_properly_is_used() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let s3 = S3::start(Kind::Proper).await;
    let store = s3.key_store();
    let store: Vec<(&str, &str)> = store.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let settings = seconds_with(&store);
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "access-compiler"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    let access = Request::access("ada@example.com");
    publisher.request("acme", &access).await;
    world.reaches(&access.id, "completed").await;
}
