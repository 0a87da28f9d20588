//! Cancellations: before, after, instead of and at the same time as the release (contract 3 and 5).

use jiff::SignedDuration;
use lethe_testing::erasure::{deleted_in_all, receipt};
use lethe_testing::wait::{becomes, eventually, patiently, seconds, stays};
use lethe_testing::{Publisher, Receiver, Request, Worker, World, seconds_with};
use serde_json::{Value, json};

const ERASURE: [&str; 4] = ["scheduler", "identity-matcher", "erasure-executor", "callback-courier"];

async fn delivers(receiver: &Receiver, path: &str, statuses: &[&str]) {
    let wanted: Vec<String> = statuses.iter().map(|&status| status.to_owned()).collect();
    becomes("the statuses that were delivered", seconds(20), wanted, async || receiver.statuses(path)).await;
}

#[tokio::test]
async fn before_the_release_nothing_is_erased_and_after_it_is_too_late() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.controller("other").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let receiver = Receiver::start().await;
    let _workers = Worker::several(&world, &ERASURE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").expedited().callback(&receiver.url("/early"));
    let late = Request::erasure("grace@example.com").expedited();
    for request in [&request, &late] {
        publisher.request("acme", request).await;
    }
    let first = publisher.cancel("acme", &request.id).await;
    assert_eq!(first.status, 202);
    let body = first.json();
    let received_time = body["received_time"].clone();
    let expected = json!({
        "controller_id": "acme", "received_time": received_time, "subject_request_id": request.id,
        "expected_completion_time": null, "api_version": "3.0",
    });
    assert_eq!(body, expected);
    assert!(first.is_signed("X-OpenDSR-Signature"));
    let again = publisher.cancel("acme", &request.id).await;
    assert_eq!((again.status, &again.json()["received_time"]), (202, &received_time), "the first time stays");
    // Another controller's cancellation is for a request of its own, which may still come.
    assert_eq!(publisher.cancel("other", &late.id).await.status, 202);
    assert_eq!(world.status(&late.id).await, "pending");
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    world.reaches(&late.id, "completed").await;
    let refused = publisher.cancel("acme", &late.id).await;
    assert_eq!(refused.status, 409, "{}", refused.json());
    assert_eq!(publisher.cancel("acme", "7").await.status, 400);
    delivers(&receiver, "/early", &["pending", "cancelled"]).await;
    assert_eq!(world.status(&request.id).await, "cancelled");
    assert_eq!(world.rows_of(&acme, 1).await, (1, 1, 2));
    assert_eq!(receipt(&world, &request.id).await, None);
    assert_eq!(publisher.status("acme", &request.id).await.json()["request_status"], "cancelled");
}

#[tokio::test]
async fn one_that_overtakes_its_request_is_remembered_for_a_waiting_period() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let receiver = Receiver::start().await;
    let _workers = Worker::several(&world, &ERASURE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    let forgotten = Request::erasure("grace@example.com");
    let first = publisher.cancel("acme", &request.id).await;
    assert_eq!((first.status, &first.json()["api_version"]), (202, &Value::Null));
    assert_eq!(publisher.cancel("acme", &forgotten.id).await.status, 202);
    publisher.request("acme", &request).await;
    assert_eq!(world.status(&request.id).await, "cancelled");
    let again = publisher.cancel("acme", &request.id).await;
    assert_eq!((again.status, again.json()["received_time"].clone()), (202, first.json()["received_time"].clone()));
    delivers(&receiver, "/x", &["pending", "cancelled"]).await;
    // A waiting period later the other one has come to nothing.
    world.set_clock("2054-11-29T10:00:00Z".parse().unwrap()).await;
    publisher.request("acme", &forgotten).await;
    assert_eq!(world.status(&forgotten.id).await, "pending");
    world.set_clock("2054-12-20T09:00:00Z".parse().unwrap()).await;
    world.reaches(&forgotten.id, "completed").await;
    assert_eq!(world.rows_of(&acme, 1).await, (1, 1, 1));
}

#[tokio::test]
async fn in_a_race_with_the_release_exactly_one_wins_and_the_answer_says_which() {
    const ALL: i64 = 600;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let profiles: Vec<String> = (0..ALL)
        .map(|n| json!({"mpid": n, "identities": {"email": format!("p{n}@example.com")}}).to_string())
        .collect();
    world.profiles(&acme, &profiles).await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &ERASURE[..3], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let requests: Vec<Request> = (0..ALL).map(|n| Request::erasure(&format!("p{n}@example.com")).expedited()).collect();
    let all: Vec<_> = requests.iter().map(|one| publisher.sending("acme", "request", one)).collect();
    publisher.send_all(&all).await;
    world.count_reaches("pending", ALL).await;
    world.set_clock("2054-11-22T12:29:58.5Z".parse().unwrap()).await;
    let mut asked = Vec::new();
    for (n, request) in requests.iter().enumerate() {
        if n == requests.len() - 50 {
            eventually("the release has begun", seconds(10), async || {
                world.in_status("in_progress").await + world.in_status("completed").await > 0
            })
            .await;
        }
        let body = json!({ "subject_request_id": request.id }).to_string();
        asked.push(publisher.begin_asking(&publisher.sending("acme", "cancellation", body)).await);
    }
    let mut won = 0;
    let mut answers = Vec::new();
    for answer in asked {
        let answer = tokio::time::timeout(patiently(seconds(20)), answer).await.unwrap().unwrap();
        assert!(matches!(answer.status, 202 | 409), "{}", answer.json());
        won += i64::from(answer.status == 202);
        answers.push(answer.status);
    }
    world.count_reaches("completed", ALL - won).await;
    assert_eq!(world.in_status("cancelled").await, won);
    for ((n, request), answer) in (0..).zip(&requests).zip(answers) {
        let (status, rows) = if answer == 202 { ("cancelled", (1, 1, 0)) } else { ("completed", (0, 0, 0)) };
        assert_eq!((world.status(&request.id).await.as_str(), world.rows_of(&acme, n).await), (status, rows));
    }
    assert!(won > 0 && won < ALL, "no race: {won} of {ALL} cancelled");
    assert_eq!(deleted_in_all(&world).await, 2 * (ALL - won));
}

#[tokio::test]
async fn a_late_batch_waits_until_the_cancellations_before_it_are_handled() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    let matcher = Worker::start(&world, "identity-matcher", &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    let other = Request::erasure("grace@example.com");
    for request in [&request, &other] {
        publisher.request("acme", request).await;
    }
    scheduler.stop().await;
    matcher.stop().await;
    let cancellation = json!({ "subject_request_id": request.id }).to_string();
    publisher.send(&publisher.sending("acme", "cancellation", cancellation)).await;
    world.set_clock("2054-12-01T00:00:00Z".parse().unwrap()).await;
    let _rest = Worker::several(&world, &["scheduler", "erasure-executor"], &[]).await;
    eventually("the batch is closed", seconds(10), async || {
        world.one("SELECT EXISTS (SELECT FROM lethe.batches WHERE state = 'closed')", &[]).await
    })
    .await;
    stays("the batch", seconds(2), async || world.in_status("pending").await == 2).await;
    let _matcher = Worker::start(&world, "identity-matcher", &[]).await;
    world.reaches(&other.id, "completed").await;
    assert_eq!(world.status(&request.id).await, "cancelled");
    assert_eq!(world.rows_of(&acme, 1).await, (1, 1, 1));
}

#[tokio::test]
async fn one_that_is_repeated_in_one_burst_before_its_request_comes_holds_up_nobody() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = seconds_with(&[("LETHE_ERASURE_WAITING_PERIOD", "1h")]);
    let _workers = Worker::several(&world, &ERASURE[..2], &settings).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    let cancellation = json!({ "subject_request_id": request.id }).to_string();
    let mut asked = Vec::new();
    for _ in 0..20 {
        asked.push(publisher.begin_asking(&publisher.sending("acme", "cancellation", cancellation.clone())).await);
    }
    let mut times = std::collections::BTreeSet::new();
    for answer in asked {
        let answer = tokio::time::timeout(patiently(seconds(20)), answer).await.unwrap().unwrap();
        assert_eq!(answer.status, 202);
        times.insert(answer.json()["received_time"].to_string());
    }
    assert_eq!(times.len(), 1);
    publisher.request("acme", &request).await;
    assert_eq!(world.status(&request.id).await, "cancelled");
}

#[tokio::test]
async fn a_cancellation_that_is_repeated_in_one_burst_counts_once() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let settings = seconds_with(&[("LETHE_ERASURE_WAITING_PERIOD", "1h")]);
    let _workers = Worker::several(&world, &ERASURE, &settings).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    publisher.request("acme", &request).await;
    let mut asked = Vec::new();
    for _ in 0..20 {
        let body = json!({ "subject_request_id": request.id }).to_string();
        asked.push(publisher.begin_asking(&publisher.sending("acme", "cancellation", body)).await);
    }
    let mut times = std::collections::BTreeSet::new();
    for answer in asked {
        let answer = tokio::time::timeout(patiently(seconds(20)), answer).await.unwrap().unwrap();
        assert_eq!(answer.status, 202);
        times.insert(answer.json()["received_time"].to_string());
    }
    assert_eq!(times.len(), 1);
    delivers(&receiver, "/x", &["pending", "cancelled"]).await;
    let later = world.now().await + SignedDuration::from_hours(2);
    world.set_clock(later).await;
    eventually("the batch is done", seconds(10), async || {
        world.one("SELECT bool_and(state = 'completed') FROM lethe.batches", &[]).await
    })
    .await;
    assert_eq!(world.in_status("cancelled").await, 1);
}

#[tokio::test]
async fn a_row_that_cannot_be_read_holds_up_nobody_else() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &ERASURE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let (damaged, sound) = (Request::erasure("ada@example.com"), Request::erasure("grace@example.com"));
    for request in [&damaged, &sound] {
        publisher.request("acme", request).await;
    }
    publisher.cancel("acme", &damaged.id).await;
    let damage = "UPDATE lethe.requests SET cancellation_received_at = $1 WHERE subject_request_id = $2::text::uuid";
    let session = world.db.session().await.unwrap();
    let at = None::<jiff::Timestamp>;
    assert_eq!(session.execute(damage, &[&at, &damaged.id]).await.unwrap(), 1);
    // Both in one group, and again and again.
    let sending = |id: &str| publisher.sending("acme", "cancellation", json!({ "subject_request_id": id }).to_string());
    let first = publisher.begin_asking(&sending(&damaged.id)).await;
    let second = publisher.begin_asking(&sending(&sound.id)).await;
    assert_eq!(tokio::time::timeout(patiently(seconds(20)), second).await.unwrap().unwrap().status, 202);
    let now = Some(world.now().await);
    session.execute(damage, &[&now, &damaged.id]).await.unwrap();
    assert_eq!(tokio::time::timeout(patiently(seconds(60)), first).await.unwrap().unwrap().status, 202);
}
