//! Whatever a scheduler waits for stops nothing else and costs nobody the lead: stores and brokers that take calls and never
//! answer, objects that cannot be deleted, batches that were lost.

use lethe_testing::cli::lethe;
use lethe_testing::details::has_details;
use lethe_testing::proxy::{Proxy, Way};
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::{Publisher, Receiver, Request, Worker, World, s3, seconds_with};

/// Longer than a lease lasts.
const LEASE: std::time::Duration = std::time::Duration::from_millis(15_500);

/// A request that has ended, with a result that expires at once; its bytes lie at each of these paths.
async fn expired_results(world: &World, paths: &[&str]) {
    for path in paths {
        world
            .run(&format!(
                "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                             content_digest, submitted_time, received_at, expected_completion_time)
                 VALUES ('acme', gen_random_uuid(), '3.0', 'access', 'pending', 'access', sha256('x'), now(), now(), now());
                 INSERT INTO lethe.results (result_id, request_key, token_salt, token_sha256, object_path, media_type,
                                            size_bytes, lines, wrapped_key, expiry_day, expires_at)
                 SELECT gen_random_uuid(), max(request_key), 'x', sha256('{path}'), '{path}', 'text/plain', 1, 1, 'x', now(),
                        now() - interval '1 hour' FROM lethe.requests"
            ))
            .await;
    }
}

async fn epoch(world: &World) -> i64 {
    world.one("SELECT epoch FROM lethe.leaders", &[]).await
}

async fn all_is_sealed(world: &World) {
    eventually("the trail is sealed", seconds(10), async || {
        world.one::<i64>("SELECT count(*) FROM lethe.audit_unsealed", &[]).await == 0
    })
    .await;
}

fn borrowed<'a>(settings: &'a [(&'static str, String)]) -> Vec<(&'static str, &'a str)> {
    settings.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

#[tokio::test]
async fn stores_that_never_answer_stop_no_release_and_cost_nobody_the_lead() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let silent = Proxy::start(&world.amqp_url, Way::Silent).await;
    let endpoint = silent.through("http://127.0.0.1:1");
    let mut stores = s3::settings("LETHE_KEY_STORE", &endpoint);
    stores.push(("LETHE_RESULT_STORE", "s3://results".to_owned()));
    let settings = seconds_with(&borrowed(&stores));
    expired_results(&world, &["a", "b", "c"]).await;
    let mut schedulers = Vec::new();
    for _ in 0..2 {
        schedulers.push(Worker::start(&world, "scheduler", &settings).await);
    }
    let first = epoch(&world).await;
    let _others = Worker::several(&world, &["identity-matcher", "erasure-executor"], &seconds_with(&[])).await;
    let publisher = Publisher::connect(&world).await;
    eventually("the links have ended", seconds(10), async || {
        world.one::<i64>("SELECT count(*) FROM lethe.results WHERE expired_at IS NULL", &[]).await == 0
    })
    .await;
    // Longer than a lease lasts, with work all along.
    let mut ids = Vec::new();
    let started = std::time::Instant::now();
    while started.elapsed() < LEASE {
        let request = Request::erasure("ada@example.com").expedited();
        publisher.request("acme", &request).await;
        world.reaches(&request.id, "completed").await;
        ids.push(request.id);
    }
    all_is_sealed(&world).await;
    assert!(ids.len() >= 3, "only {}", ids.len());
    assert_eq!(epoch(&world).await, first, "nobody lost the lead");
    for scheduler in schedulers {
        scheduler.stop().await;
    }
}

#[tokio::test]
async fn a_broker_that_never_answers_stops_neither_closing_nor_sealing_nor_a_release_that_need_not_wait_for_it() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let receiver = Receiver::start().await;
    let broker = Proxy::start(&world.amqp_url, Way::Open).await;
    let amqp_url = broker.through(&world.amqp_url);
    let settings = seconds_with(&[("AMQP_URL", amqp_url.as_str()), ("LETHE_RETENTION", "1s")]);
    let mut schedulers = Vec::new();
    for _ in 0..2 {
        schedulers.push(Worker::start(&world, "scheduler", &settings).await);
    }
    let _others =
        Worker::several(&world, &["identity-matcher", "erasure-executor", "callback-courier"], &seconds_with(&[]))
            .await;
    let publisher = Publisher::connect(&world).await;
    let done = Request::erasure("ada@example.com");
    publisher.request("acme", &done).await;
    world.reaches(&done.id, "completed").await;
    let first = epoch(&world).await;
    broker.set(Way::Silent);
    let silent_since = std::time::Instant::now();
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    publisher.request("acme", &request).await;
    let state =
        "SELECT state FROM lethe.batches JOIN lethe.requests USING (batch_id) WHERE subject_request_id::text = $1";
    let state = async || world.one::<String>(state, &[&request.id]).await;
    becomes("the batch", seconds(10), "closed".to_owned(), &state).await;
    all_is_sealed(&world).await;
    eventually("what has ended is purged", seconds(10), async || !has_details(&world, &done.id).await).await;
    assert_eq!(world.status(&request.id).await, "pending", "nobody can see whether cancellations are queued");
    world.run("UPDATE lethe.batches SET cancellations_handled_at = lethe.now() WHERE state = 'closed'").await;
    world.reaches(&request.id, "in_progress").await;
    // Then the wake-ups that were lost are made up for.
    eventually("a lease would be over", LEASE, async || silent_since.elapsed() > LEASE).await;
    assert_eq!(epoch(&world).await, first, "nobody lost the lead");
    broker.set(Way::Open);
    world.reaches(&request.id, "completed").await;
}

#[tokio::test]
async fn an_object_that_cannot_be_deleted_stops_no_other() {
    let world = World::new().await;
    world.controller("acme").await;
    let file = |path: &str| world.folder.join("results").join(path);
    // More than one look takes. Where a file lies in the place of a folder, nothing can be looked for in it.
    let stuck: Vec<String> = (100..200).map(|number| format!("{number}/1")).collect();
    for number in 100..200 {
        std::fs::write(file(&number.to_string()), b"x").unwrap();
    }
    for folder in ["2", "3"] {
        std::fs::create_dir(file(folder)).unwrap();
        std::fs::write(file(folder).join("1"), b"x").unwrap();
    }
    let paths: Vec<&str> = stuck.iter().map(String::as_str).chain(["2/1", "3/1"]).collect();
    expired_results(&world, &paths).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    becomes("objects that are left", seconds(10), stuck.clone(), async || {
        let left = "SELECT object_path FROM lethe.results WHERE object_path IS NOT NULL ORDER BY object_path";
        world.all::<String>(left, &[]).await
    })
    .await;
    assert!(!file("2/1").exists() && !file("3/1").exists());
    let tried = "SELECT count(*) FROM lethe.results
                  WHERE object_path IS NOT NULL AND delete_after > lethe.now() AND delete_tries = 1";
    becomes("objects that are tried again later", seconds(10), 100, async || world.one::<i64>(tried, &[]).await).await;
    assert!(scheduler.log().contains("tried again later"));
    for number in 100..200 {
        std::fs::remove_file(file(&number.to_string())).unwrap();
    }
    world.set_clock(world.now().await + jiff::SignedDuration::from_secs(60)).await;
    becomes("objects that are left", seconds(10), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.results WHERE object_path IS NOT NULL", &[]).await
    })
    .await;
}

#[tokio::test]
async fn much_that_is_to_be_forgotten_goes_in_many_steps_that_follow_each_other() {
    let world = World::new().await;
    world
        .run(
            "INSERT INTO lethe.message_failures (message_digest, queue, last_failed_at)
             SELECT sha256(n::text::bytea), 'x', now() - interval '20 days' FROM generate_series(1, 2000) AS n",
        )
        .await;
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    // A pause of ten seconds between steps of five hundred would not do.
    becomes("remembered messages", seconds(10), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.message_failures", &[]).await
    })
    .await;
}

#[tokio::test]
async fn requests_and_callbacks_that_name_what_is_not_there_are_found_and_told() {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', 4711, sha256('x'), now(), now(), now()
               FROM generate_series(1, 3);
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), min(request_key), 0, 0, 4712, 'pending', now(), 'ready', now(), now() FROM lethe.requests",
        )
        .await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    eventually("it is measured", seconds(10), async || {
        let metrics = scheduler.get("/metrics").await.map(|(_, text)| text).unwrap_or_default();
        let has = |line: &str| metrics.lines().any(|one| one == line);
        has("lethe_requests_without_batch 3") && has("lethe_lost_endpoints 1")
    })
    .await;
    assert!(scheduler.log().contains("batch=4711"), "{}", scheduler.log());
    let doctor = lethe(&world, &["doctor"]).await;
    assert!(
        doctor.code == Some(1) && doctor.out.contains("4711") && doctor.out.contains("lost endpoints"),
        "{}",
        doctor.out
    );
}
