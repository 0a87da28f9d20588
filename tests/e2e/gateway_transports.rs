//! AMQP and HTTP share one intake: what they answer is the same, and so is what they leave in the database. And
//! each transport works while the other's server is away.

use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_testing::details::MPIDS;
use lethe_testing::proxy::{Proxy, Way};
use lethe_testing::requests::fixture;
use lethe_testing::wait::{becomes, eventually, patiently, seconds};
use lethe_testing::{Gateway, Publisher, Receiver, Request, SECONDS, Worker, World, seconds_with};
use reqwest::Method;
use serde_json::{Value, json};

/// Bodies that are refused, and bodies that are accepted.
fn bodies() -> Vec<(&'static str, Vec<u8>)> {
    let good = || Request::erasure("ada@example.com");
    let text = String::from_utf8(good().bytes()).unwrap();
    vec![
        ("erasure", good().group("g").callback("http://127.0.0.1:9/x").bytes()),
        ("expedited", good().expedited().bytes()),
        ("access", Request::access("ada@example.com").bytes()),
        ("mpid", Request::new("portability").mpid(9_007_199_254_740_993).bytes()),
        (
            "an upper-case id",
            good().with("subject_request_id", json!(uuid::Uuid::new_v4().to_string().to_uppercase())).bytes(),
        ),
        ("nobody", Request::new("erasure").bytes()),
        ("no regulation", good().with("regulation", Value::Null).bytes()),
        ("another type", good().with("subject_request_type", json!("rectification")).bytes()),
        ("version 4", good().with("api_version", json!("4.0")).bytes()),
        ("a private callback", good().callback("http://169.254.169.254/x").bytes()),
        ("no JSON", b"{\"subject_request_id\":".to_vec()),
        ("nothing", Vec::new()),
        ("a duplicate key", text.replacen('{', "{\"regulation\":\"ccpa\",", 1).into_bytes()),
        ("identities without end", {
            let mpids: Vec<i64> = (0..5_001).collect();
            good()
                .with("extensions", json!({"opendsr.mparticle.com": {"mpids": mpids}}))
                .with("api_version", json!("2.0"))
                .with("subject_identities", json!([]))
                .bytes()
        }),
        ("mpid and e-mail", fixture("mparticle/v3-erasure-mpid-and-email-invalid-request.json")),
    ]
}

#[tokio::test]
async fn the_same_body_gets_the_same_answer_byte_for_byte_over_either_transport() {
    let world = World::new().await;
    world.controller("acme").await;
    let matcher = Worker::spawn(&world, "identity-matcher", &[]);
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    matcher.ready().await;
    let acme = gateway.caller(&world, "acme");
    let publisher = Publisher::connect(&world).await;
    let mut accepted = 0;
    for (number, (what, body)) in bodies().into_iter().enumerate() {
        // Either transport first: the second is answered as a repetition, with the first one's times.
        let ask_amqp = async || publisher.ask(&publisher.sending("acme", "request", body.clone())).await;
        let path = if what == "identities without end" { "/v2/requests" } else { "/v3/requests" };
        let (by_http, by_amqp) = if number % 2 == 0 {
            let first = acme.post(path, body.clone()).await;
            (first, ask_amqp().await)
        } else {
            let first = ask_amqp().await;
            (acme.post(path, body.clone()).await, first)
        };
        assert_eq!((by_http.status, by_http.text()), (by_amqp.status, text(&by_amqp.body)), "{what}");
        let signed = by_amqp.headers.get("X-OpenDSR-Signature").map_or("", String::as_str);
        if by_http.status == 413 {
            assert!(by_http.is_unsigned(), "{what}: contract 9");
        } else {
            assert!(by_http.is_signed(), "{what}");
            assert_eq!(by_http.header("X-OpenDSR-Signature"), signed, "{what}: PKCS#1 v1.5 signs a text in one way");
        }
        accepted += i64::from(by_http.status == 201);
    }
    assert_eq!(accepted, 5);
    assert_eq!(
        world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await,
        accepted,
        "no transport doubled any"
    );
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.callbacks", &[]).await, 1);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn questions_cancellations_and_conflicts_are_the_same_over_either_transport() {
    let world = World::new().await;
    world.controller("acme").await;
    let matcher = Worker::spawn(&world, "identity-matcher", &[]);
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    matcher.ready().await;
    let acme = gateway.caller(&world, "acme");
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").group("g");
    acme.request(&request).await;
    let other = request.clone().identity("email", "grace@example.com");
    let refused = publisher.ask(&publisher.sending("acme", "request", &other)).await;
    let conflict = acme.post("/v3/requests", &other).await;
    assert_eq!((conflict.status, text(&conflict.body)), (409, text(&refused.body)));
    assert_eq!((conflict.reason(), conflict.is_signed()), ("conflict".to_owned(), true));

    let status = publisher.status("acme", &request.id).await;
    assert_eq!(text(&acme.status(&request.id).await.body), text(&status.body));
    let group = publisher.ask(&publisher.sending("acme", "group", json!({"group_id": "g"}).to_string())).await;
    assert_eq!(text(&acme.get("/v3/requests?group_id=g").await.body), text(&group.body));

    let cancelled = publisher.cancel("acme", &request.id).await;
    let again = acme.delete(&format!("/v3/requests/{}", request.id)).await;
    assert_eq!((again.status, text(&again.body)), (202, text(&cancelled.body)));
    let unknown = uuid::Uuid::new_v4().to_string();
    let by_amqp = publisher.status("acme", &unknown).await;
    let by_http = acme.status(&unknown).await;
    assert_eq!((by_http.status, text(&by_http.body)), (404, text(&by_amqp.body)));
}

#[tokio::test]
async fn what_either_transport_records_is_the_same() {
    let world = World::new().await;
    for id in ["by-http", "by-amqp"] {
        let controller = world.controller(id).await;
        world.person(&controller, 7, "ada@example.com", 1).await;
    }
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let matcher = Worker::spawn(&world, "identity-matcher", &[]);
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    matcher.ready().await;
    let caller = gateway.caller(&world, "by-http");
    let publisher = Publisher::connect(&world).await;
    for (what, body) in bodies().into_iter().take(5) {
        assert_eq!(caller.post("/v3/requests", body.clone()).await.status, 201, "{what}");
        publisher.request("by-amqp", body).await;
    }
    let of = async |controller: &str| -> Vec<String> {
        let sql = format!(
            "SELECT concat_ws(' ', subject_request_id, api_version, regulation, request_type, status, lane, batch_id,
                          submitted_time, expected_completion_time, approval, group_digest IS NOT NULL,
                          (SELECT array_agg((mpid, source) ORDER BY mpid) FROM {MPIDS} m
                            WHERE m.request_key = r.request_key),
                          (SELECT array_agg((url_no, sequence, request_status, state)) FROM lethe.callbacks c
                            WHERE c.request_key = r.request_key))
                     FROM lethe.requests r WHERE controller_id = $1 ORDER BY subject_request_id"
        );
        world.all(&sql, &[&controller]).await
    };
    let rows = of("by-http").await;
    assert_eq!(rows.len(), 5);
    assert!(rows.iter().any(|row| row.contains("(7,receipt)")), "{rows:?}");
    assert_eq!(rows, of("by-amqp").await);
}

#[tokio::test]
async fn requests_are_taken_while_rabbitmq_is_away_and_called_back_once_it_is_there() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    let receiver = Receiver::start().await;
    let rabbitmq = Proxy::start(&world.amqp_url, Way::Refusing).await;
    let away = rabbitmq.through(&world.amqp_url);
    let settings = seconds_with(&[("AMQP_URL", away.as_str())]);
    let gateway = Gateway::start(&world, &settings).await;
    // The scheduler stores its calendar without a broker as well.
    let _scheduler = Worker::spawn(&world, "scheduler", &settings);
    eventually("the calendar is stored", seconds(15), async || {
        world.optional::<i64>("SELECT version FROM lethe.calendars", &[]).await.is_some()
    })
    .await;
    let acme = gateway.caller(&world, "acme");
    let mut ids = Vec::new();
    for way in [Way::Refusing, Way::Silent] {
        rabbitmq.set(way);
        for _ in 0..3 {
            let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
            let call = acme.call(Method::POST, "/v3/requests").timeout(patiently(seconds(3))).body(request.bytes());
            let answer = call.send().await.expect("answered at once, whatever the broker does");
            assert_eq!(answer.status(), 201, "{way:?}");
            ids.push(request.id);
        }
    }
    assert!(receiver.all().is_empty());
    rabbitmq.set(Way::Open);
    let _workers = Worker::several(&world, &["erasure-executor", "callback-courier"], &settings).await;
    for id in &ids {
        world.reaches(id, "completed").await;
    }
    becomes("callbacks of each", seconds(20), 3 * ids.len(), async || receiver.statuses("/x").len()).await;
}

#[tokio::test]
async fn while_the_database_is_away_every_call_is_answered_503_and_to_be_tried_again() {
    let world = World::new().await;
    world.controller("acme").await;
    let postgresql = Proxy::start(&world.database_url, Way::Open).await;
    let through = postgresql.through(&world.database_url);
    let _scheduler = Worker::start(&world, "scheduler", SECONDS).await;
    let gateway = Gateway::start(&world, &[("DATABASE_URL", through.as_str())]).await;
    let acme = gateway.caller(&world, "acme");
    let request = Request::erasure("ada@example.com");
    eventually("a request is taken", seconds(10), async || acme.post("/v3/requests", &request).await.status == 201)
        .await;
    postgresql.set(Way::Refusing);
    let answers = [
        ("submit", acme.post("/v3/requests", &Request::erasure("grace@example.com")).await, true),
        ("status", acme.status(&request.id).await, true),
        ("group", acme.get("/v3/requests?group_id=g").await, true),
        ("cancel", acme.delete(&format!("/v3/requests/{}", request.id)).await, true),
        ("download", gateway.get("/v3/results/token").await, false),
        (
            "a stranger",
            gateway.send(gateway.call(Method::GET, "/v3/requests?group_id=g").basic_auth("a", Some("b"))).await,
            false,
        ),
    ];
    for (what, answer, signed) in answers {
        assert_eq!((answer.status, answer.reason()), (503, "unavailable".to_owned()), "{what}");
        assert!(answer.header("retry-after").parse::<u32>().unwrap() > 0, "{what}");
        assert_eq!(answer.is_signed_as("OpenDSR", SignatureAlgorithm::RsaPkcs1v15), signed, "{what}");
        assert_eq!(answer.is_unsigned(), !signed, "{what}");
    }
    assert_eq!(gateway.get("/v3/discovery").await.status, 200, "what needs no database goes on");
    eventually("it says that it is not ready", seconds(10), async || {
        gateway.worker.get("/readyz").await.is_some_and(|(status, _)| status == 503)
    })
    .await;
    postgresql.set(Way::Open);
    eventually("it is back", seconds(10), async || acme.status(&request.id).await.status == 200).await;
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.requests", &[]).await, 1, "503: nothing was done");
}
