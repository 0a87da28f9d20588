//! Intake over AMQP: what is accepted, what is refused, and that neither disturbs the other (contract 3 and 4).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe_testing::publisher::Sending;
use lethe_testing::requests::{fixture, renamed};
use lethe_testing::wait::{becomes, eventually, patiently, seconds};
use lethe_testing::{Answer, Publisher, Request, SECONDS, Worker, World};
use serde_json::{Value, json};

const INTAKE: [&str; 2] = ["scheduler", "identity-matcher"];

/// Every published example, and when it must be done at the latest if it is received on Sunday, 2054-11-22, at 09:00.
const EXAMPLES: [(&str, &str); 12] = [
    ("opendsr/v1-request.json", "2054-12-02T12:30:00Z"),
    ("opendsr/v1-mparticle-extension.json", "2054-11-25T00:05:00Z"),
    ("opendsr/v2-request.json", "2054-12-02T12:30:00Z"),
    ("opendsr/v2-mparticle-extension.json", "2054-12-02T12:30:00Z"),
    ("opendsr/v2-mparticle-extension-other1.json", "2054-12-02T12:30:00Z"),
    ("opendsr/v2-mpids-only-date.json", "2054-12-02T12:30:00Z"),
    ("mparticle/v3-request.json", "2054-12-02T12:30:00Z"),
    ("mparticle/v3-access-request.json", "2054-11-25T00:05:00Z"),
    ("mparticle/v3-erasure-minimal-request.json", "2054-12-02T12:30:00Z"),
    ("mparticle/v3-erasure-mpid-request.json", "2054-12-02T12:30:00Z"),
    ("mparticle/v3-erasure-skip-waiting-request.json", "2054-11-24T12:30:00Z"),
    ("mparticle/v3-portability-request.json", "2054-11-25T00:05:00Z"),
];

#[tokio::test]
async fn every_published_example_is_accepted_signed_and_scheduled_by_the_calendar() {
    let world = World::new().await;
    world.controller("acme").await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    for (path, expected) in EXAMPLES {
        let (id, body) = renamed(path);
        let answer = publisher.request("acme", body.clone()).await;
        let json = answer.json();
        let mut fields: Vec<&String> = json.as_object().unwrap().keys().collect();
        fields.sort();
        assert_eq!(
            fields,
            ["controller_id", "encoded_request", "expected_completion_time", "received_time", "subject_request_id"],
            "{path}"
        );
        assert_eq!((&json["controller_id"], &json["subject_request_id"]), (&json!("acme"), &json!(id)), "{path}");
        assert_eq!(json["expected_completion_time"], json!(expected), "{path}");
        assert!(json["received_time"].as_str().unwrap().starts_with("2054-11-22T09:00:"), "{path}: {json}");
        assert_eq!(json["encoded_request"], json!(STANDARD.encode(&body)), "{path}");
        let (ours, others) = if path.contains("/v1-") { ("OpenGDPR", "OpenDSR") } else { ("OpenDSR", "OpenGDPR") };
        assert_eq!(
            answer.headers.get(&format!("X-{ours}-Processor-Domain")).map(String::as_str),
            Some("localhost"),
            "{path}"
        );
        assert!(answer.is_signed(&format!("X-{ours}-Signature")), "{path}: {:?}", answer.headers);
        assert!(!answer.headers.contains_key(&format!("X-{others}-Signature")), "{path}");
    }
    // A boolean as a string is read for what it says.
    let (_, body) = renamed("mparticle/v3-erasure-skip-waiting-string-request.json");
    let answer = publisher.request("acme", body).await;
    assert_eq!(answer.json()["expected_completion_time"], json!("2054-12-02T12:30:00Z"));
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_answer_and_other_content_a_conflict() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("other").await;
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback("http://127.0.0.1:9/x");
    let first = publisher.request("acme", &request).await;
    // Same content: spelt otherwise, with unknown fields.
    let spelt = request.clone().identity("email", " ADA@example.com").with("unknown", json!([1]));
    for again in [&request, &spelt] {
        let second = publisher.request("acme", again).await;
        for field in ["received_time", "expected_completion_time", "subject_request_id"] {
            assert_eq!(second.json()[field], first.json()[field], "{field}");
        }
    }
    let other = request.clone().identity("email", "grace@example.com");
    let refused = publisher.ask(&publisher.sending("acme", "request", &other)).await;
    assert_eq!(refused.status, 409, "{}", refused.json());
    let copies = world.take_messages("dsr.rejected", 5).await;
    assert_eq!(copies.len(), 1, "{copies:?}");
    let headers = &copies[0]["properties"]["headers"];
    assert_eq!(headers["error-code"], json!("conflict"));
    assert!(headers["error-message"].as_str().unwrap().contains("subject_request_id"), "{headers}");
    assert_eq!(copies[0]["payload"], json!(String::from_utf8(other.bytes()).unwrap()));
    // An id is unique per controller, not over all.
    publisher.request("other", &other).await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await, 2);
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.callbacks", &[]).await, 2);
}

fn reason(answer: &Answer) -> String {
    answer.json()["error"]["errors"][0]["reason"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn what_is_refused_says_why_and_is_kept() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller_with("somebody", |new| new.amqp_user = Some("somebody-else".to_owned())).await;
    world.controller_with("http-only", |_| ()).await;
    world.controller_with("anybody", |new| new.any_amqp_user = true).await;
    let _workers = Worker::several(&world, &INTAKE, &[("LETHE_CALLBACK_ALLOW", "")]).await;
    let publisher = Publisher::connect(&world).await;
    let good = || Request::erasure("ada@example.com");
    let sending = |controller: &str, body: &Request| publisher.sending(controller, "request", body);
    let fields: [(&str, Request, &str); 10] = [
        ("no regulation", good().with("regulation", Value::Null), "required"),
        ("another law", good().with("regulation", json!("lgpd")), "invalid"),
        ("no UUID", good().with("subject_request_id", json!("7")), "invalid"),
        ("version 1 UUID", good().with("subject_request_id", json!("a7551968-d5d6-11b2-9831-815ac9017798")), "invalid"),
        ("another type", good().with("subject_request_type", json!("rectification")), "invalid"),
        ("no time", good().with("submitted_time", json!("yesterday")), "invalid"),
        ("nobody", good().with("subject_identities", json!({})), "required"),
        ("long group", good().with("group_id", json!("g".repeat(257))), "invalid"),
        ("mpid and e-mail", good().mpid(5), "mpid_not_alone"),
        ("private callback", good().callback("https://10.0.0.1/x"), "callback_url"),
    ];
    for (what, request, expected) in &fields {
        let answer = publisher.ask(&sending("acme", request)).await;
        assert_eq!((answer.status, reason(&answer).as_str()), (400, *expected), "{what}: {}", answer.json());
        assert!(answer.is_signed("X-OpenDSR-Signature"), "{what}");
    }
    let both =
        publisher.sending("acme", "request", fixture("mparticle/v3-erasure-mpid-and-email-invalid-request.json"));
    assert_eq!(publisher.ask(&both).await.status, 400);
    let flawed = publisher.sending("acme", "request", fixture("opendsr/v2-request-flawed.txt"));
    assert_eq!(publisher.ask(&flawed).await.status, 400);

    // A NUL, which PostgreSQL refuses, and more than a small frame holds: neither may stop the queue.
    let (nul, long) = (Some("ac\0me".to_owned()), Some("x".repeat(60_000)));
    let senders: [(&str, Sending, u16); 8] = [
        ("a NUL in the header", Sending { controller_id: nul, ..sending("acme", &good()) }, 403),
        ("a long header", Sending { controller_id: long, ..sending("acme", &good()) }, 403),
        ("unknown controller", sending("nobody", &good()), 403),
        ("another user", sending("somebody", &good()), 403),
        ("no AMQP at all", sending("http-only", &good()), 403),
        ("no user", Sending { user_id: None, ..sending("acme", &good()) }, 403),
        ("no header", Sending { controller_id: None, ..sending("acme", &good()) }, 400),
        ("header and key", Sending { routing_key: "anybody.request".to_owned(), ..sending("acme", &good()) }, 403),
    ];
    for (what, sending, expected) in &senders {
        let answer = publisher.ask(sending).await;
        assert_eq!(answer.status, *expected, "{what}: {}", answer.json());
    }
    let anonymous = Sending { user_id: None, ..sending("anybody", &good()) };
    assert_eq!(publisher.ask(&anonymous).await.status, 201);

    // Nobody's answers go into our own queues, and what nobody consumes is kept.
    let reserved = Sending { reply_to: Some("dsr.callback-delivery".to_owned()), ..sending("acme", &good()) };
    publisher.send(&reserved).await;
    let mistyped = Sending { routing_key: "acme.requst".to_owned(), ..sending("acme", &good()) };
    publisher.send(&mistyped).await;
    let kept = u64::try_from(fields.len() + 2 + senders.len() + 2).unwrap();
    becomes("copies of what was refused", seconds(10), kept, async || world.messages("dsr.rejected").await).await;
    assert_eq!(world.messages("dsr.callback-delivery").await, 0);
    let copies = world.take_messages("dsr.rejected", 100).await;
    let unrouted = copies.iter().find(|copy| copy["routing_key"] == json!("acme.requst"));
    assert!(unrouted.is_some(), "the mistyped one is kept");
    for copy in copies.iter().filter(|copy| copy["routing_key"] != json!("acme.requst")) {
        let headers = &copy["properties"]["headers"];
        assert!(headers["error-code"].is_string() && headers["error-message"].is_string(), "{copy}");
    }
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await, 1);
}

#[tokio::test]
async fn a_bad_message_takes_no_neighbour_with_it() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let good = || Request::erasure("ada@example.com").bytes();
    let text = String::from_utf8(good()).unwrap();
    let nobody = |value: &str| Request::erasure(value).bytes();
    let bad: Vec<(&str, Vec<u8>, u16)> = vec![
        ("malformed", b"{\"subject_request_id\":".to_vec(), 400),
        ("empty", Vec::new(), 400),
        ("a list", b"[]".to_vec(), 400),
        ("duplicate key", text.replacen('{', "{\"regulation\":\"ccpa\",", 1).into_bytes(), 400),
        (
            "wrong types",
            Request::erasure("a@b.c").with("subject_identities", json!(7)).with("group_id", json!([])).bytes(),
            400,
        ),
        ("bad UTF-8", [good(), vec![0xff]].concat(), 400),
        ("deep", [vec![b'['; 100_000], vec![b']'; 100_000]].concat(), 400),
        ("half a million elements", format!("{{\"x\":[{}1],{}", "1,".repeat(500_000), &text[1..]).into_bytes(), 201),
        ("a million elements", format!("{{\"x\":[{}1]}}", "1,".repeat(1_000_000)).into_bytes(), 413),
        ("one byte over 1 MiB", [good(), vec![b' '; (1 << 20) + 1 - good().len()]].concat(), 413),
        ("exactly 1 MiB", [good(), vec![b' '; (1 << 20) - good().len()]].concat(), 201),
        ("empty e-mail", nobody("  "), 400),
        ("null", nobody("null"), 400),
        (
            "zeros",
            Request::new("erasure").identity("ios_advertising_id", "00000000-0000-0000-0000-000000000000").bytes(),
            400,
        ),
        ("NUL", nobody("a\0@example.com"), 400),
    ];
    let mut asked = Vec::new();
    for (what, body, expected) in bad {
        asked.push((
            "a good neighbour",
            201,
            publisher.begin_asking(&publisher.sending("acme", "request", good())).await,
        ));
        asked.push((what, expected, publisher.begin_asking(&publisher.sending("acme", "request", body)).await));
    }
    let accepted = asked.iter().filter(|(_, expected, _)| *expected == 201).count();
    for (what, expected, answer) in asked {
        let answer = tokio::time::timeout(patiently(seconds(20)), answer)
            .await
            .unwrap_or_else(|_| panic!("no answer: {what}"))
            .unwrap();
        assert_eq!(answer.status, expected, "{what}: {}", answer.json()["error"]);
    }
    assert_eq!(world.in_status("pending").await, i64::try_from(accepted).unwrap());
    eventually("all refused messages are kept", seconds(10), async || world.messages("dsr.rejected").await == 13).await;
    assert_eq!(world.messages("dsr.identity-matching").await, 0);
}

#[tokio::test]
async fn a_burst_over_several_connections_is_recorded_exactly_once_each() {
    let world = World::new().await;
    world.controller("acme").await;
    let _first = Worker::several(&world, &INTAKE, SECONDS).await;
    let _second = Worker::start(&world, "identity-matcher", &[]).await;
    let requests: Vec<Request> = (0..1_600).map(|n| Request::erasure(&format!("p{n}@example.com"))).collect();
    let mut connections = Vec::new();
    for part in 0..4 {
        // 400 of its own and 100 of its neighbour's.
        let own = requests[part * 400..(part + 1) * 400].iter();
        let doubled = requests.iter().cycle().skip((part + 1) * 400).take(100);
        let publisher = Publisher::connect(&world).await;
        let all: Vec<Sending> = own.chain(doubled).map(|one| publisher.sending("acme", "request", one)).collect();
        connections.push(tokio::spawn(async move { publisher.send_all(&all).await }));
    }
    for connection in connections {
        connection.await.unwrap();
    }
    let count = async || world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await;
    becomes("requests on record", seconds(30), 1_600, count).await;
    becomes("messages left", seconds(10), 0, async || world.messages("dsr.identity-matching").await).await;
    assert_eq!(count().await, 1_600);
    assert_eq!(world.messages("dsr.rejected").await, 0);
    assert_eq!(world.messages("dsr.identity-matching.dead").await, 0);
}
