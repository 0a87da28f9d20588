//! Messages from an enemy: nothing that a publisher can write ends a process, holds up a queue, or speaks for another.

use lethe_broker::Broker;
use lethe_broker::dead_letters::Browser;
use lethe_testing::cli::{json, lethe};
use lethe_testing::raw::{self, RawPublisher};
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};
use reqwest::Method;
use serde_json::json as value;

const WEEKLY: &[(&str, &str)] = &[];

#[tokio::test]
async fn what_cannot_be_read_is_set_aside_unchanged_and_holds_up_nobody() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    // As large as RabbitMQ takes it: a little more than was agreed for a frame.
    let large = raw::headers(&raw::text_entry("a", &"x".repeat(131_045)));
    let hostile: [(&[u8], raw::Properties); 9] = [
        (b"acme.request", raw::correlation(b"\xFF\xFE")),
        (b"acme.request", raw::headers(b"\x01\xFFV")),
        (b"acme.request", raw::headers(&raw::nested_entry(14_000))),
        (b"acme.request", raw::headers(&raw::nested_entry(18_000))),
        (b"acme.cancellation", raw::headers(&raw::nested_entry(14_000))),
        (b"acme.status", raw::correlation(b"\xC3")),
        (b"\xFF.request", raw::correlation(b"")),
        (b"acme.request", large),
        (b"acme.request", raw::headers(&raw::text_entry("x-lethe-unreadable", "canary"))),
    ];
    let mut raw = RawPublisher::connect(&world).await;
    for (n, (key, properties)) in hostile.iter().enumerate() {
        raw.publish(key, properties, format!("body {n}").as_bytes()).await;
        let neighbour = Request::erasure("y@example.com");
        assert_eq!(publisher.ask(&publisher.sending("acme", "request", &neighbour)).await.status, 201, "{n}");
    }
    let dead = ["dsr.identity-matching.dead", "dsr.cancellation.dead", "dsr.query.dead"];
    for (queue, count) in dead.into_iter().zip([7, 1, 1]) {
        becomes(queue, seconds(20), count, async || world.messages(queue).await).await;
    }
    assert!(workers.iter_mut().all(Worker::is_running), "a worker has ended");
    // All of it can be handled, and an operator learns what it is, but not what it says.
    let groups = json(&world, &["dead-letter", "list"]).await;
    let unreadable = groups.as_array().unwrap().iter().filter(|one| one["cause"] == "unreadable");
    assert_eq!(unreadable.map(|one| one["letters"].as_u64().unwrap()).sum::<u64>(), 9, "{groups}");
    let letters = json(&world, &["dead-letter", "list", "--letters", "--queue", dead[1]]).await;
    let all = lethe(&world, &["dead-letter", "list", "--letters"]).await;
    assert!(!all.out.contains("canary"), "{}", all.out);
    let letter = letters[0]["letter"].as_str().unwrap();
    let shown = lethe(&world, &["dead-letter", "show", letter]).await;
    assert!(shown.out.contains("nested too deeply") && shown.code == Some(0), "{}{}", shown.out, shown.err);
    let again = lethe(&world, &["dead-letter", "replay", letter]).await;
    assert_eq!(again.code, Some(1), "{}", again.out);
    assert_eq!(json(&world, &["dead-letter", "discard", letter]).await["discarded"], 1);
    // Bytes and properties are those of the publisher.
    let kept = world.take_messages(dead[2], 1).await;
    assert_eq!(
        (&kept[0]["payload"], &kept[0]["properties"]["headers"]["x-first-death-reason"]),
        (&"body 5".into(), &"rejected".into())
    );
    let browser = Browser::open(&Broker::new(&world.amqp_url, "lethe-testing").unwrap()).await.unwrap();
    let mut bodies = Vec::new();
    while let Some(letter) = browser.next(dead[0], &world.keys()).await.unwrap() {
        bodies.push(String::from_utf8(letter.body).unwrap());
    }
    assert_eq!(bodies, ["body 0", "body 1", "body 2", "body 3", "body 6", "body 7", "body 8"]);
}

#[tokio::test]
async fn a_forged_dead_letter_speaks_for_its_publisher_only() {
    let world = World::new().await;
    world.controller_with("victim", |new| new.amqp_user = Some("victim".to_owned())).await;
    world.controller_with("open", |new| new.any_amqp_user = true).await;
    let matcher = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await.remove(1);
    let forged = |controller: &str| {
        let texts = [
            ("controller-id", controller),
            ("routing-key", &format!("{controller}.request")),
            ("error-code", "sqlstate_40001"),
            ("error-message", "\u{1b}[2Jcanary"),
            ("set-aside-at", "2026-11-26T00:00:00Z"),
        ];
        texts.map(|(name, text)| raw::text_entry(name, text)).concat()
    };
    let mut raw = RawPublisher::connect(&world).await;
    let body = Request::erasure("x@example.com").bytes();
    // By the alternate exchange.
    raw.publish(b"acme.nothing", &raw::headers(&forged("victim")), &body).await;
    // Out of a queue: dead-lettered by the broker as unreadable, and as expired.
    let unreadable = [forged("victim"), raw::nested_entry(100)].concat();
    raw.publish(b"acme.request", &raw::headers(&unreadable), &body).await;
    becomes("unreadable", seconds(20), 1, async || world.messages("dsr.identity-matching.dead").await).await;
    matcher.stop().await;
    for controller in ["victim", "open"] {
        // What RabbitMQ writes there itself, in the forger's words.
        let death = [
            raw::text_entry("queue", "dsr.identity-matching"),
            raw::text_entry("reason", "expired"),
            raw::array_entry("routing-keys", &format!("{controller}.request")),
        ]
        .concat();
        let death = raw::tables_entry("x-death", &death);
        let (flags, mut properties) = raw::headers(&[forged(controller), death].concat());
        properties.extend([1, b'1']);
        raw.publish(b"acme.request", &(flags | 1 << 8, properties), &body).await;
    }
    becomes("expired", seconds(20), 3, async || world.messages("dsr.identity-matching.dead").await).await;
    let listed = lethe(&world, &["dead-letter", "list", "--letters"]).await;
    assert!(!listed.out.contains("sqlstate_40001") && !listed.out.contains("canary"), "{}", listed.out);
    for controller in ["victim", "open"] {
        lethe(&world, &["dead-letter", "replay", "--controller", controller]).await;
    }
    for queue in ["dsr.rejected", "dsr.identity-matching.dead"] {
        lethe(&world, &["dead-letter", "replay", "--queue", queue]).await;
    }
    let recorded: i64 = world.one("SELECT count(*) FROM lethe.requests", &[]).await;
    assert_eq!(recorded, 0);
}

#[tokio::test]
async fn a_marker_that_a_controller_sends_marks_nothing() {
    let world = World::new().await;
    world.controller_with("dsr", |new| new.any_amqp_user = true).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("x@example.com");
    assert_eq!(publisher.ask(&publisher.sending("dsr", "request", &request)).await.status, 201);
    let batch: i64 = world.one("SELECT batch_id FROM lethe.batches", &[]).await;
    // Its routing key is the queue's own name.
    let marker = publisher.sending("dsr", "cancellation", format!(r#"{{"batch_id":{batch}}}"#));
    assert_eq!(publisher.ask(&marker).await.status, 400);
    let handled: bool = world.one("SELECT cancellations_handled_at IS NOT NULL FROM lethe.batches", &[]).await;
    assert!(!handled);
}

#[tokio::test]
async fn answers_do_not_go_to_another_controllers_queue() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller_with("victim", |new| new.amqp_user = Some("victim".to_owned())).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    world.controller_with("open", |new| new.any_amqp_user = true).await;
    for queue in ["victim.answers", "open.answers"] {
        let path = format!("/queues/{}/{queue}", world.name);
        world.management.call(Method::PUT, &path, Some(value!({"durable": true}))).await;
    }
    let publisher = Publisher::connect(&world).await;
    let sending = |reply_to: &str| {
        let mut sending = publisher.sending("acme", "request", &Request::erasure("x@example.com"));
        sending.reply_to = Some(reply_to.to_owned());
        sending
    };
    publisher.send(&sending("victim.answers")).await;
    publisher.send(&sending("open.answers")).await;
    // In the victim's name it is refused, and the refusal is an answer as well.
    let mut forged = sending("victim.answers");
    forged.controller_id = Some("victim".to_owned());
    publisher.send(&forged).await;
    // A reserved queue is not what a message is refused for before its sender was checked.
    let mut reserved = sending("dsr.query");
    reserved.routing_key = "victim.request".to_owned();
    reserved.controller_id = Some("victim".to_owned());
    publisher.send(&reserved).await;
    becomes("refused", seconds(20), 4, async || world.messages("dsr.rejected").await).await;
    let why = json(&world, &["dead-letter", "list"]).await;
    assert!(why.as_array().unwrap().iter().all(|one| one["cause"] == "forbidden"), "{why}");
    for queue in ["acme.answers", "answers"] {
        publisher.send(&sending(queue)).await;
    }
    world.count_reaches("pending", 2).await;
    lethe(&world, &["dead-letter", "replay", "--queue", "dsr.rejected"]).await;
    assert_eq!(world.in_status("pending").await, 2);
    assert_eq!(world.messages("victim.answers").await + world.messages("open.answers").await, 0);
    // In its own name it is answered there.
    let mut own = sending("open.answers");
    own.routing_key = "open.request".to_owned();
    own.controller_id = Some("open".to_owned());
    publisher.send(&own).await;
    becomes("answered", seconds(20), 1, async || world.messages("open.answers").await).await;
}

#[tokio::test]
async fn the_header_with_the_controller_may_be_an_integer() {
    let world = World::new().await;
    world.controller("4711").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let user = world.management.user();
    let mut raw = RawPublisher::connect(&world).await;
    for (kind, number) in
        [(b'I', &[0, 0, 0x12, 0x67][..]), (b'l', &[0, 0, 0, 0, 0, 0, 0x12, 0x67]), (b's', &[0x12, 0x67])]
    {
        let entry = [&[13][..], b"controller-id", &[kind], number].concat();
        let (flags, mut properties) = raw::headers(&entry);
        properties.push(u8::try_from(user.len()).unwrap());
        properties.extend(user.as_bytes());
        raw.publish(b"4711.request", &(flags | 1 << 4, properties), &Request::erasure("x@example.com").bytes()).await;
    }
    world.count_reaches("pending", 3).await;
}

#[tokio::test]
async fn a_deleted_queue_is_declared_again() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    // Not by looking: a connection of ours would declare it. What is sent while a queue is gone has no queue, so it is sent
    // until it has come to something.
    for (queue, kind) in [("dsr.identity-matching", "request"), ("dsr.cancellation", "cancellation")] {
        let request = Request::erasure("x@example.com");
        let body = if kind == "request" {
            request.bytes()
        } else {
            format!(r#"{{"subject_request_id":"{}"}}"#, request.id).into_bytes()
        };
        world.management.call(Method::DELETE, &format!("/queues/{}/{queue}", world.name), None).await;
        let recorded = "SELECT count(*) FROM (SELECT subject_request_id FROM lethe.requests
                          UNION ALL SELECT subject_request_id FROM lethe.early_cancellations) AS known
                         WHERE subject_request_id::text = $1";
        eventually(&format!("{queue} is consumed again"), seconds(30), async || {
            publisher.send(&publisher.sending("acme", kind, body.clone())).await;
            world.one::<i64>(recorded, &[&request.id]).await == 1
        })
        .await;
    }
    world.management.call(Method::DELETE, &format!("/queues/{}/dsr.erasure-execution", world.name), None).await;
    let request = Request::erasure("x@example.com");
    assert_eq!(publisher.ask(&publisher.sending("acme", "request", &request)).await.status, 201);
    becomes("erased", seconds(40), "completed".to_owned(), async || world.status(&request.id).await).await;
}

#[tokio::test]
async fn a_queue_that_somebody_declares_again_at_once_is_consumed_again() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut matcher = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await.remove(1);
    let publisher = Publisher::connect(&world).await;
    // Connecting declares all of them: RabbitMQ may then tell the consumers nothing of the deletion.
    let broker = Broker::new(&world.amqp_url, "lethe-testing").unwrap();
    for _ in 0..5 {
        let path = format!("/queues/{}/dsr.identity-matching", world.name);
        let deleted = world.management.call(Method::DELETE, &path, None);
        let (_, declared) = tokio::join!(deleted, broker.connect());
        drop(declared);
    }
    let request = Request::erasure("x@example.com");
    publisher.send(&publisher.sending("acme", "request", &request)).await;
    eventually("it is recorded", seconds(60), async || {
        // One that no queue took, since it was gone just then, is published once more.
        publisher.send(&publisher.sending("acme", "request", &request)).await;
        world.status(&request.id).await == "pending"
    })
    .await;
    assert!(matcher.is_running());
}
