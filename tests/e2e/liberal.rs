//! What real clients send is read, over HTTP, over AMQP and from a file alike (contract 4).

use base64::Engine;
use lethe_testing::cli::{lethe, write};
use lethe_testing::{Gateway, Publisher, Request, Worker, World};
use serde_json::{Value, json};

fn someone() -> Request {
    Request::erasure("ada@example.com")
}

/// Bodies that mean what they say, in odd forms.
fn odd_forms() -> Vec<(&'static str, Request)> {
    let mpid = json!({"opendsr.mparticle.com": {"subject_identities": {"mpid": {"value": "123", "encoding": "raw"}}}});
    let ours = |members: Value| json!({"opendsr.mparticle.com": members, "else.example": [1, null]});
    vec![
        ("extensions is an empty list", someone().with("extensions", json!([]))),
        ("our extension is null", someone().with("extensions", ours(Value::Null))),
        ("our extension is an empty list", someone().with("extensions", ours(json!([])))),
        ("its identities are an empty list", someone().with("extensions", ours(json!({"subject_identities": []})))),
        ("an mpid alone", someone().with("subject_identities", json!([])).with("extensions", mpid)),
        ("no version", someone().with("api_version", Value::Null)),
        ("a blank version", someone().with("api_version", json!(""))),
        ("a time without a zone", someone().with("submitted_time", json!("2026-11-22T09:00:00"))),
        ("the first year", someone().with("submitted_time", json!("0001-01-01T00:00:00Z"))),
        ("the last year", someone().with("submitted_time", json!("9999-12-30T00:00:00Z"))),
    ]
}

/// A body with a number that no program can hold, where nobody reads it.
fn with_foreign_number(request: &Request) -> Vec<u8> {
    let body = request.clone().with("extensions", json!({"else.example": {"score": "HERE"}}));
    String::from_utf8(body.bytes()).unwrap().replace("\"HERE\"", "1e400").into_bytes()
}

fn marked(body: &[u8]) -> Vec<u8> {
    [b"\xef\xbb\xbf", body].concat()
}

#[tokio::test]
async fn over_http() {
    let world = World::new().await;
    world.controller("acme").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    for (what, request) in odd_forms() {
        let answer = acme.post("/v3/requests", &request).await;
        assert_eq!(answer.status, 201, "{what}: {}", answer.text());
    }
    // The body comes back as it was sent; what it means has one digest.
    let request = someone();
    let body = marked(&with_foreign_number(&request));
    let first = acme.post("/v3/requests", body.clone()).await;
    assert_eq!(first.status, 201, "{}", first.text());
    let encoded = first.json()["encoded_request"].as_str().unwrap().to_owned();
    assert_eq!(base64::engine::general_purpose::STANDARD.decode(encoded).unwrap(), body, "verbatim");
    let again = acme.post("/v3/requests", &request).await;
    assert_eq!(
        (again.status, &again.json()["received_time"]),
        (201, &first.json()["received_time"]),
        "the same request"
    );

    let early = someone().with("skip_waiting_period", json!(true));
    assert_eq!(acme.post("/v3/requests", &early).await.status, 201);
    let lane: String =
        world.one("SELECT lane FROM lethe.requests WHERE subject_request_id::text = $1", &[&early.id]).await;
    assert_eq!(lane, "expedited");

    let v1 = |version: &str| {
        let identities = json!([{"identity_type": "email", "identity_value": "ada@example.com"}]);
        someone().with("subject_identities", identities).with("api_version", json!(version))
    };
    for version in ["", "0.1", "1.0"] {
        let answer = acme.post("/v1/opengdpr_requests", &v1(version)).await;
        assert_eq!(answer.status, 201, "{version}: {}", answer.text());
    }
    let wrong = acme.post("/v1/opengdpr_requests", &v1("4.0")).await;
    assert_eq!((wrong.status, wrong.reason()), (400, "invalid".to_owned()));
    assert!(wrong.text().contains("must be 1.0\"") && !wrong.text().contains("3.0"), "{}", wrong.text());
    for time in ["-005000-06-01T00:00:00Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59.9999999Z", "11/22/2026"] {
        let answer = acme.post("/v3/requests", &someone().with("submitted_time", json!(time))).await;
        assert_eq!((answer.status, answer.reason()), (400, "invalid".to_owned()), "{time}: {}", answer.text());
    }
    let utf16: Vec<u8> =
        String::from_utf8(someone().bytes()).unwrap().encode_utf16().flat_map(u16::to_le_bytes).collect();
    let answer = acme.post("/v3/requests", utf16).await;
    assert!(answer.status == 400 && answer.text().contains("UTF-16"), "{}", answer.text());
    let unknown = acme.post("/v3/requests", &Request::new("erasure").identity("shoe_size", "44")).await;
    assert!(unknown.status == 400 && unknown.text().contains("controller_customer_id"), "{}", unknown.text());
}

#[tokio::test]
async fn over_amqp_and_from_a_file() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    for (what, request) in odd_forms() {
        let answer = publisher.ask(&publisher.sending("acme", "request", marked(&request.bytes()))).await;
        // Where no path tells the version, the shape does: a list is that of version 2.
        assert_eq!(answer.status, 201, "{what}: {}", answer.json());
    }
    for time in ["-005000-06-01T00:00:00Z", "0000-01-01T00:00:00Z"] {
        let body = someone().with("submitted_time", json!(time)).bytes();
        let answer = publisher.ask(&publisher.sending("acme", "request", body)).await;
        assert_eq!((answer.status, &answer.json()["error"]["errors"][0]["reason"]), (400, &json!("invalid")), "{time}");
    }
    let file = write(&world, "request.json", marked(&with_foreign_number(&someone())));
    let answer = lethe(&world, &["request", "submit", &file, "--controller", "acme"]).await.json();
    assert!(answer["received_time"].is_string(), "{answer}");
}
