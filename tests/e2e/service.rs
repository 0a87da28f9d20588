//! What every process has in common: options, exit codes, signals, the admin address (contract 1 and 2).

use std::process::Output;

use lethe_testing::wait::{eventually, patiently, seconds};
use lethe_testing::worker::{bare, environment, queue_workers};
use lethe_testing::{Certified, Publisher, Request, SECONDS, Worker, World};

async fn run(name: &str, arguments: &[&str], settings: &[(&str, String)]) -> Output {
    let mut command = bare(name);
    command.args(arguments).envs(settings.iter().map(|(name, value)| (name, value)));
    tokio::time::timeout(patiently(seconds(10)), command.output())
        .await
        .unwrap_or_else(|_| panic!("{name} did not end"))
        .unwrap()
}

#[tokio::test]
async fn help_names_every_option_with_its_variable_and_default() {
    for name in queue_workers() {
        let help = run(name, &["--help"], &[]).await;
        assert_eq!(help.status.code(), Some(0), "{name}");
        let text = String::from_utf8(help.stdout).unwrap();
        let options = text.lines().filter(|line| line.trim_start().starts_with("--")).count();
        assert!(options >= 6, "{name}: {text}");
        for paragraph in
            text.split("\n\n").flat_map(|part| part.split("\n      --")).filter(|part| part.contains("LETHE_"))
        {
            assert!(paragraph.contains("[env: LETHE_"), "{name}: {paragraph}");
        }
        for expected in ["LETHE_DRAIN_TIMEOUT", "[default: 30s]", "DATABASE_URL", "AMQP_URL", "Exit codes"] {
            assert!(text.contains(expected), "{name} --help lacks {expected}");
        }
        let version = run(name, &["--version"], &[]).await;
        assert_eq!(String::from_utf8(version.stdout).unwrap().trim(), format!("{name} {}", env!("CARGO_PKG_VERSION")));
    }
}

#[tokio::test]
async fn bad_configuration_is_said_before_anything_connects() {
    let world = World::new().await;
    // Where a process did connect, it would wait for these and not end.
    let mut good = environment(&world);
    for (name, value) in &mut good {
        match *name {
            "DATABASE_URL" => *value = "postgres://nobody@127.0.0.1:1/none".to_owned(),
            "AMQP_URL" => *value = "amqp://127.0.0.1:1/none".to_owned(),
            _ => {}
        }
    }
    let missing = world.folder.join("missing").display().to_string();
    let cases: [(&str, &str, Option<&str>, &str); 17] = [
        ("scheduler", "LETHE_MASTER_KEY_FILE", Some(&missing), "LETHE_MASTER_KEY_FILE"),
        ("scheduler", "LETHE_ERASURE_SCHEDULE", Some("61 * * * *"), "LETHE_ERASURE_SCHEDULE"),
        ("scheduler", "LETHE_ERASURE_SCHEDULE", Some("0 0 30 2 *"), "LETHE_ERASURE_SCHEDULE"),
        ("scheduler", "LETHE_ERASURE_WAITING_PERIOD", Some("-7d"), "LETHE_ERASURE_WAITING_PERIOD"),
        ("scheduler", "LETHE_RESULT_STORE", Some("ftp://example.com/x"), "LETHE_RESULT_STORE"),
        ("scheduler", "LETHE_SCHEDULER_INTERVAL", Some("0s"), "LETHE_SCHEDULER_INTERVAL"),
        ("identity-matcher", "LETHE_SIGNING_CERT_FILE", Some(&missing), "certificate"),
        ("identity-matcher", "LETHE_PUBLIC_URL", Some("https://elsewhere.example.com"), "LETHE_PUBLIC_URL"),
        ("identity-matcher", "LETHE_PROCESSOR_DOMAIN", Some("a/b"), "LETHE_PROCESSOR_DOMAIN"),
        ("identity-matcher", "LETHE_MASTER_KEY_FILE", None, "LETHE_MASTER_KEY_FILE"),
        ("identity-matcher", "AMQP_URL", Some("http://example.com"), "AMQP_URL"),
        ("callback-courier", "LETHE_CALLBACK_ALLOW", Some("everything"), "LETHE_CALLBACK_ALLOW"),
        ("callback-courier", "LETHE_CALLBACK_FIRST_RETRY", Some("soon"), "LETHE_CALLBACK_FIRST_RETRY"),
        ("erasure-executor", "DATABASE_URL", None, "DATABASE_URL"),
        ("erasure-executor", "LETHE_ERASURE_SLICES", Some("0"), "LETHE_ERASURE_SLICES"),
        (
            "access-compiler",
            "LETHE_MASTER_KEY_FILE",
            Some(&world.files.certificate.display().to_string()),
            "LETHE_MASTER_KEY_FILE",
        ),
        ("access-compiler", "LETHE_DRAIN_TIMEOUT", Some("1 fortnight"), "LETHE_DRAIN_TIMEOUT"),
    ];
    for (name, variable, value, expected) in cases {
        let mut settings: Vec<_> = good.iter().filter(|(name, _)| *name != variable).cloned().collect();
        settings.extend(value.map(|value| (variable, value.to_owned())));
        let ended = run(name, &[], &settings).await;
        let text = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(64), "{name} with {variable}={value:?}: {text}");
        assert!(text.contains(expected), "{name} with {variable}={value:?}: {text}");
    }
    let unknown = run("scheduler", &["--no-such-option"], &good).await;
    assert_eq!(unknown.status.code(), Some(64));
}

#[tokio::test]
async fn every_worker_drains_on_sigterm_and_shows_its_health_and_metrics() {
    let world = World::new().await;
    world.controller("acme").await;
    let workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    for worker in &workers {
        assert_eq!(worker.get("/livez").await.unwrap().0, 200);
        assert_eq!(worker.get("/readyz").await.unwrap(), (200, "ready\n".to_owned()));
    }
    let expected: [(usize, &[&str]); 3] = [
        (0, &["lethe_leader_epoch", "lethe_requests{", "lethe_oldest_ready_seconds", "lethe_requests_released_total"]),
        (1, &["lethe_deliveries_total", "lethe_group_size", "lethe_handling_seconds", "lethe_transaction_seconds"]),
        (2, &["lethe_requests_completed_total", "lethe_slices_total", "lethe_slice_seconds"]),
    ];
    for (index, names) in expected {
        eventually(&format!("the metrics have {names:?}"), seconds(15), async || {
            workers[index].get("/metrics").await.is_some_and(|(_, text)| names.iter().all(|name| text.contains(name)))
        })
        .await;
    }
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test]
async fn an_encrypted_broker_is_used_if_its_certificate_is_trusted_and_not_otherwise() {
    let world = World::new().await;
    let (trusted, strangers) = (Certified::write(&world.folder, false), Certified::write(&world.folder, true));
    let roots = trusted.file.to_str().unwrap();
    let url = trusted.before_broker(&world.amqp_url).await;
    let worker = Worker::start(&world, "erasure-executor", &[("AMQP_URL", &url), ("SSL_CERT_FILE", roots)]).await;
    assert!(worker.log().contains("INFO consuming"), "{}", worker.log());
    worker.stop().await;
    let url = strangers.before_broker(&world.amqp_url).await;
    let worker = Worker::spawn(&world, "erasure-executor", &[("AMQP_URL", &url), ("SSL_CERT_FILE", roots)]);
    eventually("it refuses the certificate", seconds(20), async || worker.log().contains("invalid peer certificate"))
        .await;
    assert!(!worker.log().contains("INFO consuming"));
    worker.stop().await;
    // Roots that cannot be read are named, and once they are put right the next connection has them.
    let late = world.folder.join("late-roots.pem");
    let url = trusted.before_broker(&world.amqp_url).await;
    let late_roots = late.to_str().unwrap();
    let worker = Worker::spawn(&world, "erasure-executor", &[("AMQP_URL", &url), ("SSL_CERT_FILE", late_roots)]);
    eventually("it says which file", seconds(20), async || {
        worker.log().contains("there are no root certificates") && worker.log().contains("late-roots.pem")
    })
    .await;
    std::fs::copy(&trusted.file, &late).unwrap();
    eventually("it consumes", seconds(40), async || worker.log().contains("INFO consuming")).await;
    worker.stop().await;
}

#[tokio::test]
async fn an_encrypted_address_is_never_spoken_to_in_the_clear() {
    let world = World::new().await;
    let encrypted = world.amqp_url.replacen("amqp://", "amqps://", 1);
    let worker = Worker::spawn(&world, "erasure-executor", &[("AMQP_URL", &encrypted)]);
    eventually("it says that it cannot connect", seconds(20), async || worker.log().contains("consuming has stopped"))
        .await;
    assert_eq!(worker.get("/readyz").await.unwrap().0, 503);
    assert!(!worker.log().contains("INFO consuming"));
    worker.stop().await;
    let database = format!("{}?sslmode=require", world.database_url);
    let worker = Worker::spawn(&world, "erasure-executor", &[("DATABASE_URL", &database)]);
    eventually("it waits for an encrypted connection", seconds(20), async || {
        worker.log().contains("waiting for PostgreSQL")
    })
    .await;
    assert_eq!(worker.get("/readyz").await.unwrap().0, 503);
    worker.stop().await;
}
