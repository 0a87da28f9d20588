//! Access and portability: what is in the file, who can open it, and when it ends (contract 7).

use jiff::SignedDuration;
use lethe_domain::result_link;
use lethe_testing::requests::fixture;
use lethe_testing::results::{files_below, lines, open, record, unzip};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World, seconds_with};
use serde_json::{Value, json};

const ACCESS: [&str; 3] = ["scheduler", "identity-matcher", "access-compiler"];

/// The people of the published event batches.
const ADA: i64 = -3_718_039_598_335_680_576;
const GRACE: i64 = 7_036_874_417_766_412_345;

/// Imports the published event batches and a profile for each of two people; returns the lines of the batches.
async fn people(world: &World, controller: &str) -> Vec<String> {
    let id = world.controller(controller).await;
    for (mpid, extra) in [(ADA, "cust-1001"), (GRACE, "cust-1002")] {
        world.profile(&id, mpid, &[("email", "Family@example.com"), ("controller_customer_id", extra)]).await;
    }
    world.person(&id, 77, "stranger@example.com", 1).await;
    let text = String::from_utf8(fixture("mparticle/event-batches.jsonl")).unwrap();
    let lines: Vec<String> = text.split('\n').filter(|line| !line.is_empty()).map(str::to_owned).collect();
    world.event_batches(&id, &lines).await;
    lines
}

/// The lines of both people in the order of the file: by profile, then by arrival.
fn batches_of_both(lines: &[String]) -> Vec<&str> {
    let place = |numbers: &[usize]| numbers.iter().map(|number| lines[number - 1].as_str()).collect::<Vec<_>>();
    [place(&[1, 2, 3, 8]), place(&[4, 5, 9])].concat()
}

fn check_profiles(lines: &[&str]) {
    assert_eq!(lines.len(), 2);
    for (line, (mpid, customer)) in lines.iter().zip([(ADA, "cust-1001"), (GRACE, "cust-1002")]) {
        let profile: Value = serde_json::from_str(line).unwrap();
        assert_eq!(profile["mpid"], json!(mpid));
        assert_eq!(profile["identities"], json!({"email": "Family@example.com", "controller_customer_id": customer}));
        assert_eq!(profile["attributes"], json!({"city": "Ghent"}));
        assert!(!line.contains("secret") && !line.contains("audiences"), "inferred data is left out");
    }
}

#[tokio::test]
async fn the_files_hold_every_line_exactly_and_the_profiles_first() {
    let world = World::new().await;
    let lines = people(&world, "acme").await;
    people(&world, "other").await;
    world.run("UPDATE lethe.controllers SET include_profile = false WHERE controller_id = 'other'").await;
    let _workers = Worker::several(&world, &ACCESS, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let access = Request::access("family@example.com");
    let portability = Request::new("portability").identity("email", "family@example.com");
    let bare = Request::new("portability").identity("email", "family@example.com");
    for (controller, request) in [("acme", &access), ("acme", &portability), ("other", &bare)] {
        publisher.request(controller, request).await;
    }
    for request in [&access, &portability, &bare] {
        world.reaches(&request.id, "completed").await;
    }
    let events = batches_of_both(&lines);
    let file = String::from_utf8(open(&world, &access.id).await).unwrap();
    let file: Vec<&str> = file.strip_suffix('\n').unwrap().split('\n').collect();
    check_profiles(&file[..2]);
    assert_eq!(file[2..], events, "byte for byte, in the order of arrival");
    let status = publisher.status("acme", &access.id).await.json();
    assert_eq!(status["results_count"], json!(9));
    assert_eq!(record(&world, &access.id).await.get::<_, &str>("media_type"), "text/plain; charset=utf-8");

    let files = unzip(open(&world, &portability.id).await);
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["profile.jsonl", "events-00001.jsonl"]);
    let text = std::str::from_utf8(&files[0].1).unwrap();
    check_profiles(&text.lines().collect::<Vec<_>>());
    let expected: String = events.iter().flat_map(|line| [*line, "\n"]).collect();
    assert_eq!(std::str::from_utf8(&files[1].1).unwrap(), expected);

    let files = unzip(open(&world, &bare.id).await);
    assert_eq!(files.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["events-00001.jsonl"]);
    assert_eq!(publisher.status("other", &bare.id).await.json()["results_count"], json!(7));
    // Nothing of it can be read in the store.
    for path in files_below(&world.folder.join("results")) {
        let bytes = std::fs::read(path).unwrap();
        assert!(!bytes.windows(9).any(|window| window == b"cust-1001"));
    }
    assert_eq!(world.rows_of(&"acme".parse().unwrap(), ADA).await, (1, 2, 4), "a copy takes nothing away");
}

#[tokio::test]
async fn the_link_is_known_to_the_holder_and_to_nobody_who_reads_the_database() {
    let world = World::new().await;
    people(&world, "acme").await;
    let _workers = Worker::several(&world, &ACCESS, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let some = Request::access("family@example.com");
    let none = Request::access("nobody-here@example.com");
    for request in [&some, &none] {
        publisher.request("acme", request).await;
        world.reaches(&request.id, "completed").await;
        let url = publisher.status("acme", &request.id).await.json()["results_url"].as_str().unwrap().to_owned();
        let token = url.strip_prefix("http://localhost:8080/v3/results/").expect("the public URL and the version");
        let digest: Vec<u8> = record(&world, &request.id).await.get("token_sha256");
        assert_eq!(digest, result_link::token_digest(token));
        let whole: String = world.one("SELECT string_agg(s::text, ' ') FROM lethe.results s", &[]).await;
        assert!(!whole.contains(token));
    }
    let empty = record(&world, &none.id).await;
    assert_eq!(empty.get::<_, i64>("lines"), 0);
    assert_eq!(empty.get::<_, Option<String>>("object_path"), None);
    assert_eq!(publisher.status("acme", &none.id).await.json()["results_count"], json!(0));
    assert_eq!(files_below(&world.folder.join("results")).len(), 1);
}

#[tokio::test]
async fn at_expiry_key_and_bytes_are_gone_and_the_key_of_the_day_after_it() {
    let world = World::new().await;
    people(&world, "acme").await;
    let _workers = Worker::several(&world, &ACCESS, &seconds_with(&[("LETHE_RESULT_LIFETIME", "7d")])).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::access("family@example.com");
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    open(&world, &request.id).await;
    let expires_at: jiff::Timestamp = record(&world, &request.id).await.get("expires_at");
    // What a compiler made visible that was no longer the one at work, and died before it could delete it.
    let file = files_below(&world.folder.join("results")).remove(0);
    for left in ["1-left", "2-left#1"] {
        std::fs::write(file.with_file_name(left), b"left").unwrap();
    }
    world.set_clock(expires_at - SignedDuration::from_hours(1)).await;
    assert_eq!(record(&world, &request.id).await.get::<_, Option<jiff::Timestamp>>("expired_at"), None);
    world.set_clock(expires_at - SignedDuration::from_secs(1)).await;
    eventually("the bytes are gone", seconds(10), async || files_below(&world.folder.join("results")).is_empty()).await;
    eventually("the record says so", seconds(5), async || {
        record(&world, &request.id).await.get::<_, Option<String>>("object_path").is_none()
    })
    .await;
    let row = record(&world, &request.id).await;
    assert!(row.get::<_, jiff::Timestamp>("expired_at") >= expires_at);
    assert_eq!(row.get::<_, Option<Vec<u8>>>("wrapped_key"), None);
    assert_eq!(files_below(&world.folder.join("keys")).len(), 1, "others may expire on the same day");
    world.set_clock(expires_at + SignedDuration::from_hours(24)).await;
    eventually("the key of the day is gone", seconds(10), async || files_below(&world.folder.join("keys")).is_empty())
        .await;
}

#[tokio::test]
async fn a_result_store_that_fails_delays_and_never_completes_by_halves() {
    let world = World::new().await;
    people(&world, "acme").await;
    let _workers = Worker::several(&world, &ACCESS, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let folder = world.folder.join("results");
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::write(&folder, b"a file is in the way").unwrap();
    let request = Request::access("family@example.com");
    publisher.request("acme", &request).await;
    eventually("it was tried twice", seconds(15), async || {
        world.optional::<i32>("SELECT attempts FROM lethe.slices", &[]).await.is_some_and(|attempts| attempts >= 2)
    })
    .await;
    assert_eq!(world.status(&request.id).await, "in_progress");
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.results", &[]).await, 0);
    let error: Option<String> = world.one("SELECT last_error FROM lethe.slices", &[]).await;
    assert_eq!(error.as_deref(), Some("result_store"));
    std::fs::remove_file(&folder).unwrap();
    std::fs::create_dir(&folder).unwrap();
    world.reaches(&request.id, "completed").await;
    assert_eq!(lines(&open(&world, &request.id).await), 9);
    assert_eq!(files_below(&folder).len(), 1);
}

#[tokio::test]
async fn a_compiler_that_is_killed_is_followed_by_one_that_compiles_the_whole() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    world
        .run("INSERT INTO subject_data.event_batches (controller_id, mpid, body)
              SELECT 'acme', 1, json_build_object('mpid', 1, 'n', n, 'x', repeat('x', 500)) FROM generate_series(1, 30000) n")
        .await;
    let _workers = Worker::several(&world, &ACCESS[..2], SECONDS).await;
    let compiler = Worker::start(&world, "access-compiler", &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::access("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("it has begun", seconds(10), async || {
        world.optional::<i32>("SELECT attempts FROM lethe.slices", &[]).await.is_some_and(|attempts| attempts == 1)
    })
    .await;
    compiler.kill().await;
    assert_eq!(world.status(&request.id).await, "in_progress");
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.results", &[]).await, 0);
    let _second = Worker::start(&world, "access-compiler", &[]).await;
    let later = world.now().await + SignedDuration::from_secs(61);
    world.set_clock(later).await;
    world.reaches(&request.id, "completed").await;
    let file = open(&world, &request.id).await;
    assert_eq!(lines(&file), 30_001);
    assert_eq!(
        files_below(&world.folder.join("results")).iter().filter(|path| !path.to_string_lossy().contains('#')).count(),
        1
    );
}

/// A failover may lose the claim of an attempt that is still under way: its successor has the same number.
#[tokio::test]
async fn a_successor_with_the_same_number_keeps_its_file() {
    a_successor_keeps_its_file("stop@compile.file_written:1").await;
}

#[tokio::test]
async fn whoever_was_about_to_delete_what_others_left_deletes_nothing_of_a_successor() {
    a_successor_keeps_its_file("stop@compile.before_delete:1").await;
}

async fn a_successor_keeps_its_file(stopped_at: &str) {
    let world = World::new().await;
    let lines = people(&world, "acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], SECONDS).await;
    let first = Worker::start(&world, "access-compiler", &[("LETHE_FAULT", stopped_at)]).await;
    let request = Request::access("family@example.com");
    Publisher::connect(&world).await.request("acme", &request).await;
    let is_stopped = async || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", first.id())).unwrap();
        stat.rsplit_once(')').unwrap().1.trim_start().starts_with('T')
    };
    eventually("the first one stands still", seconds(20), is_stopped).await;
    world.run("UPDATE lethe.slices SET attempts = 0, lease_token = NULL, lease_expires_at = NULL").await;
    let second = Worker::start(&world, "access-compiler", &[]).await;
    world.reaches(&request.id, "completed").await;
    first.signal("CONT").await;
    eventually("the first one has lost", seconds(20), async || first.log().contains("the lease was lost")).await;
    let text = String::from_utf8(open(&world, &request.id).await).unwrap();
    assert_eq!(text.lines().count(), 2 + batches_of_both(&lines).len());
    assert_eq!(files_below(&world.folder.join("results")).len(), 1, "each has deleted what nobody names");
    second.stop().await;
    first.stop().await;
}
