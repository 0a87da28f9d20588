//! The operator's command line: the real binary, with tables and JSON, against real servers (contract 10).

use lethe_testing::cli::{json, lethe, write};
use lethe_testing::worker::bare;
use lethe_testing::{Request, Worker, World};

#[tokio::test]
async fn an_operator_adds_imports_submits_looks_and_cancels() {
    let world = World::new().await;
    let added = json(&world, &["controller", "add", "acme", "--any-amqp-user"]).await;
    assert_eq!(added["controller_id"], "acme");
    assert!(added["api_key"].as_str().unwrap().len() >= 32 && added["api_secret"].as_str().unwrap().len() >= 32);
    let hash: String = world.one("SELECT api_secret_hash FROM lethe.controllers", &[]).await;
    assert!(hash.starts_with("$argon2id$"), "the secret is stored as a hash");
    let rotated = json(&world, &["controller", "rotate-secret", "acme"]).await;
    assert_eq!(rotated["api_key"], added["api_key"]);
    assert_ne!(rotated["api_secret"], added["api_secret"]);
    let again = lethe(&world, &["controller", "add", "acme"]).await;
    assert_eq!(again.code, Some(1));
    assert!(again.err.contains("lethe controller list"), "{}", again.err);

    let profiles = write(
        &world,
        "profiles.jsonl",
        "{\"mpid\":1,\"identities\":{\"email\":\"Ada@example.com\",\"android_id\":\"\"}}\n\n{\"mpid\":2,\"identities\":{}}\n",
    );
    let imported = json(&world, &["import", "profiles", &profiles, "--controller", "acme"]).await;
    assert_eq!(imported["identities_left_out"], 1);
    let batches = write(&world, "batches.jsonl", "{\"mpid\":1,\"n\":1}\n{\"mpid\":\"1\",\"n\":2}\n");
    json(&world, &["import", "event-batches", &batches, "--controller", "acme"]).await;
    assert_eq!(world.rows_of(&"acme".parse().unwrap(), 1).await, (1, 1, 2));
    let bad = write(&world, "bad.jsonl", "{\"mpid\":1,\"n\":1}\n{\"n\":2}\n");
    let bad = lethe(&world, &["import", "event-batches", &bad, "--controller", "acme"]).await;
    assert_eq!(bad.code, Some(1));
    assert!(bad.err.contains("line 2") && bad.err.contains("--from-line 2"), "{}", bad.err);

    // The calendar is the scheduler's; the weekly batch stays open while we look at it.
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    let request = Request::erasure("ada@example.com");
    let body = write(&world, "request.json", request.bytes());
    let answer = lethe(&world, &["request", "submit", &body, "--controller", "acme"]).await.json();
    assert_eq!(answer["subject_request_id"], request.id.as_str());
    let listed = json(&world, &["batch", "list"]).await;
    let batch = listed[0]["batch_id"].to_string();
    assert_eq!((&listed[0]["lane"], &listed[0]["pending"]), (&"erasure".into(), &1.into()));
    let shown = json(&world, &["batch", "show", &batch]).await;
    let planned = &shown["planned"];
    assert_eq!((&planned["requests"], &planned["mpids"]), (&1.into(), &1.into()));
    assert_eq!(planned["rows_by_store"]["postgres"], 5, "profile, identity, three event batches: {shown}");
    let status = json(&world, &["request", "status", &request.id, "--controller", "acme"]).await;
    assert_eq!((&status["status"], &status["mpids"][0][0]), (&"pending".into(), &"receipt".into()));
    json(&world, &["request", "cancel", &request.id, "--controller", "acme"]).await;
    let cancelled = json(&world, &["request", "list", "--status", "cancelled"]).await;
    assert_eq!(cancelled[0]["subject_request_id"], request.id.as_str());
    assert_eq!(world.rows_of(&"acme".parse().unwrap(), 1).await, (1, 1, 3));
    let top = lethe(&world, &["top", "--once"]).await;
    assert!(top.code == Some(0) && top.out.contains("cancelled"), "{}{}", top.out, top.err);
    scheduler.stop().await;
}

#[tokio::test]
async fn the_doctor_finds_what_is_wrong_and_says_what_to_do() {
    let world = World::new().await;
    let young = lethe(&world, &["doctor", "--output", "json"]).await;
    assert_eq!(young.code, Some(1), "{}", young.out);
    assert!(young.out.contains("start a scheduler"), "there is no calendar yet: {}", young.out);
    world
        .run(
            "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
             VALUES ('30 12 * * MON', '30 12 * * *', '5 0 * * MON,THU', '7 days', '2 days')",
        )
        .await;
    let well = lethe(&world, &["doctor", "--output", "json"]).await;
    assert_eq!(well.code, Some(0), "{}{}", well.out, well.err);
    world.run("DELETE FROM public.refinery_schema_history WHERE version = (SELECT max(version) FROM public.refinery_schema_history)").await;
    std::fs::write(&world.files.master, "too short").unwrap();
    let ill = lethe(&world, &["doctor", "--output", "json"]).await;
    assert_eq!(ill.code, Some(1));
    for advice in ["run `lethe migrate`", "openssl rand -base64 32"] {
        assert!(ill.out.contains(advice), "{advice}: {}", ill.out);
    }
}

#[tokio::test]
async fn wrong_usage_is_64_and_help_is_0() {
    let world = World::new().await;
    for wrong in
        [&["frobnicate"][..], &["request", "status", "7", "--controller", "acme"], &["controller", "add", "a b"]]
    {
        let ran = lethe(&world, wrong).await;
        assert_eq!(ran.code, Some(64), "{wrong:?}: {}", ran.err);
    }
    let nowhere = bare("lethe").args(["batch", "list"]).output().await.unwrap();
    assert_eq!(nowhere.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("DATABASE_URL"));
    for right in [&["--help"][..], &["--version"], &["request", "approve", "--help"]] {
        assert_eq!(lethe(&world, right).await.code, Some(0), "{right:?}");
    }
}
