//! Servers that change under us: read-only, another one, behind a pooler, in an alarm; and keys that are not ours.

use base64::Engine as _;
use lethe_db::{Db, DbError};
use lethe_testing::proxy::{Proxy, Way};
use lethe_testing::wait::{becomes, eventually, patiently, seconds};
use lethe_testing::worker::{bare, environment, queue_workers};
use lethe_testing::{Gateway, Publisher, Request, SECONDS, Worker, World};

const WEEKLY: &[(&str, &str)] = &[];

async fn backend(db: &Db) -> i32 {
    db.session().await.unwrap().query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_session_that_became_read_only_is_not_used_again() {
    let world = World::new().await;
    // One session: whoever asks next gets the same one, or a new one.
    let db = Db::new(&world.database_url, 1, "lethe-testing").unwrap();
    let first = backend(&db).await;
    assert_eq!(backend(&db).await, first);
    let read_only = "SET default_transaction_read_only = on";
    db.session().await.unwrap().batch_execute(read_only).await.unwrap();
    let tx = db.begin("test").await.unwrap();
    let refused = tx.execute("UPDATE lethe.clock SET shift = '0'", &[]).await.unwrap_err();
    assert_eq!(refused.disposition(), lethe_domain::disposition::Disposition::Transient, "{refused}");
    tx.rollback().await;
    let second = backend(&db).await;
    assert_ne!(second, first, "the session was used again");
    // Found by looking, too: nobody has to fail first.
    db.session().await.unwrap().batch_execute(read_only).await.unwrap();
    assert!(matches!(db.ping().await, Err(DbError::ReadOnly)));
    assert_ne!(backend(&db).await, second);
    db.ping().await.unwrap();
}

#[tokio::test]
async fn nobody_connects_to_a_standby() {
    let world = World::new().await;
    world.run(&format!(r#"ALTER DATABASE "{}" SET default_transaction_read_only = on"#, world.name)).await;
    let worker = Worker::spawn(&world, "erasure-executor", WEEKLY);
    eventually("it waits", seconds(20), async || worker.log().contains("waiting for PostgreSQL")).await;
    assert_eq!(worker.get("/readyz").await.unwrap().0, 503);
    world.run(&format!(r#"ALTER DATABASE "{}" RESET default_transaction_read_only"#, world.name)).await;
    worker.ready().await;
    worker.stop().await;
}

#[tokio::test]
async fn a_pooler_that_swallows_settings_is_named_and_ends_the_process() {
    let world = World::new().await;
    let proxy = Proxy::start(&world.database_url, Way::WithoutOptions).await;
    let url = proxy.through(&world.database_url);
    for name in queue_workers() {
        let mut worker = Worker::spawn(&world, name, &[("DATABASE_URL", &url)]);
        assert_eq!(worker.exit(seconds(20)).await.code(), Some(64), "{name}: {}", worker.log());
        assert!(worker.log().contains("pooler"), "{name}: {}", worker.log());
    }
}

#[tokio::test]
async fn another_master_key_ends_the_process_before_it_takes_anything() {
    let world = World::new().await;
    let (_scheduler, _gateway) = Gateway::with_scheduler(&world, WEEKLY).await;
    let other = world.folder.join("other.key");
    std::fs::write(&other, base64::engine::general_purpose::STANDARD.encode([7; 32])).unwrap();
    let other = other.display().to_string();
    for name in queue_workers().into_iter().filter(|name| *name != "erasure-executor") {
        let mut worker = Worker::spawn(&world, name, &[("LETHE_MASTER_KEY_FILE", &other)]);
        assert_eq!(worker.exit(seconds(20)).await.code(), Some(64), "{name}: {}", worker.log());
        assert!(worker.log().contains("LETHE_MASTER_KEY_FILE: the database was used with another"), "{}", worker.log());
    }
    let mut submit = bare("lethe");
    submit.args(["request", "submit", "-", "--controller", "acme"]).envs(environment(&world));
    let submit = submit.env("LETHE_MASTER_KEY_FILE", &other).stdin(std::process::Stdio::null());
    let ended = tokio::time::timeout(patiently(seconds(10)), submit.output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(64), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[tokio::test]
async fn a_wrong_key_does_not_become_the_one_of_a_database_with_data() {
    let world = World::new().await;
    world.controller("acme").await;
    let (scheduler, gateway) = Gateway::with_scheduler(&world, WEEKLY).await;
    let request = Request::erasure("x@example.com");
    assert_eq!(gateway.caller(&world, "acme").request(request.bytes()).await.status, 201);
    scheduler.stop().await;
    // As after the upgrade from a release that recorded no key.
    world.run("DELETE FROM lethe.installation").await;
    let other = world.folder.join("other.key");
    std::fs::write(&other, base64::engine::general_purpose::STANDARD.encode([7; 32])).unwrap();
    let other = other.display().to_string();
    let mut wrong = Worker::spawn(&world, "scheduler", &[("LETHE_MASTER_KEY_FILE", &other)]);
    assert_eq!(wrong.exit(seconds(20)).await.code(), Some(64), "{}", wrong.log());
    // A gateway cannot tell, and leaves it to others.
    let waiting = Worker::spawn(&world, "gateway", &[("LETHE_MASTER_KEY_FILE", &other)]);
    eventually("it waits", seconds(20), async || waiting.log().contains("start a scheduler")).await;
    let right = Worker::start(&world, "scheduler", WEEKLY).await;
    let mut waiting = waiting;
    assert_eq!(waiting.exit(seconds(20)).await.code(), Some(64), "{}", waiting.log());
    right.stop().await;
}

#[tokio::test]
async fn a_batch_that_a_failover_has_lost_is_opened_again() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    let before = Request::erasure("x@example.com").callback("https://callbacks.example.com/x");
    publisher.request("acme", &before).await;
    // What the new server never had; and every session ends with the old one.
    world
        .run(
            "BEGIN;
             SET LOCAL session_replication_role = replica;
             DELETE FROM lethe.callbacks; DELETE FROM lethe.requests; DELETE FROM lethe.batches; DELETE FROM lethe.endpoints;
             COMMIT;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        .await;
    let after = Request::erasure("y@example.com").callback("https://callbacks.example.com/x");
    publisher.request("acme", &after).await;
    world.reaches(&after.id, "pending").await;
    let sql = "SELECT EXISTS (SELECT FROM lethe.requests JOIN lethe.batches USING (batch_id))
                  AND EXISTS (SELECT FROM lethe.callbacks JOIN lethe.endpoints USING (endpoint_id))";
    assert!(world.one::<bool>(sql, &[]).await, "the request belongs to a batch that is not there");
}

#[tokio::test]
async fn an_alarm_of_the_broker_costs_one_connection() {
    let world = World::new().await;
    world.controller("acme").await;
    let proxy = Proxy::start(&world.amqp_url, Way::Open).await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[("AMQP_URL", &proxy.through(&world.amqp_url))]).await;
    let acme = gateway.caller(&world, "acme");
    let submit = async || {
        let request = Request::erasure("x@example.com").callback("https://callbacks.example.com/x");
        assert_eq!(acme.request(request.bytes()).await.status, 201);
    };
    submit().await;
    becomes("the wake-up is published", seconds(20), true, async || world.messages("dsr.callback-delivery").await > 0)
        .await;
    let (connections, threads) = (proxy.taken(), gateway.worker.threads());
    proxy.set(Way::Blocked);
    let lost = async || {
        let text = gateway.worker.get("/metrics").await.unwrap().1;
        let line = text.lines().find_map(|line| line.strip_prefix("lethe_wake_ups_lost_total "));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    for n in 1..=5 {
        submit().await;
        eventually("the broker takes nothing", seconds(30), async || lost().await >= n).await;
    }
    // Whatever is published meanwhile: no other connection, and no thread for it.
    assert_eq!(proxy.taken(), connections);
    assert!(gateway.worker.threads() <= threads + 1, "{} threads, {threads} before", gateway.worker.threads());
    gateway.worker.stop().await;
}

#[tokio::test]
async fn a_variable_that_is_empty_is_not_set() {
    let world = World::new().await;
    let empty = [
        "LETHE_ADMIN_LISTEN",
        "LETHE_LOG_FORMAT",
        "LETHE_TLS_CERT_FILE",
        "LETHE_TRUSTED_PROXIES",
        "LETHE_CALLBACK_ALLOW",
        "LETHE_SIGNING_EC_KEY_FILE",
        "LETHE_SIGNING_SWITCH_AT",
        "LETHE_CALLBACK_CA_FILE",
        "LETHE_DENIED_IDENTITIES",
        "LETHE_EXTENSION_DOMAINS",
        "LETHE_ERASURE_SCHEDULE",
        "LETHE_DRAIN_TIMEOUT",
        "LETHE_AUDIT_FORMER_CERTS",
        "LETHE_HTTP_LISTEN_TLS",
        "DATABASE_URL_FILE",
        "LETHE_OUTPUT",
    ];
    let mut settings: Vec<(&str, &str)> = SECONDS.iter().copied().filter(|(name, _)| !empty.contains(name)).collect();
    // The harness waits by the address that the admin listener writes down.
    settings.extend(empty.iter().skip(1).map(|name| (*name, "")));
    for worker in Worker::several(&world, &queue_workers(), &settings).await {
        worker.stop().await;
    }
    let mut list = bare("lethe");
    list.args(["batch", "list"]).envs(environment(&world)).envs(settings);
    let ended = tokio::time::timeout(patiently(seconds(10)), list.output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
}
