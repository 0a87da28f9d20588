//! The calls of contract 9, in every version and spelling of their paths: status, fields, signature, headers.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_intake::LIST_LIMIT;
use lethe_testing::details::MPIDS;
use lethe_testing::gateway::{Caller, HttpAnswer};
use lethe_testing::requests::{fixture, renamed};
use lethe_testing::{Gateway, Request, World};
use reqwest::Method;
use serde_json::{Value, json};
use x509_parser::pem::Pem;

/// Version, path of requests, its published example, the family of its signed headers.
const VERSIONS: [(&str, &str, &str, &str); 3] = [
    ("1.0", "/v1/opengdpr_requests", "opendsr/v1-request.json", "OpenGDPR"),
    ("2.0", "/v2/requests", "opendsr/v2-request.json", "OpenDSR"),
    ("3.0", "/v3/requests", "mparticle/v3-request.json", "OpenDSR"),
];
const RECEIVED: [&str; 5] =
    ["controller_id", "encoded_request", "expected_completion_time", "received_time", "subject_request_id"];
const STATUS: [&str; 9] = [
    "api_version",
    "controller_id",
    "expected_completion_time",
    "extensions",
    "group_id",
    "request_status",
    "results_count",
    "results_url",
    "subject_request_id",
];
const CANCELLED: [&str; 5] =
    ["api_version", "controller_id", "expected_completion_time", "received_time", "subject_request_id"];

fn check(answer: &HttpAnswer, status: u16, family: &str, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    assert!(answer.is_signed_as(family, SignatureAlgorithm::RsaPkcs1v15), "{what}: {:?}", answer.headers);
    assert_eq!(answer.header("content-type"), "application/json", "{what}");
    assert_eq!(answer.header("cache-control"), "no-store", "{what}");
}

/// The same call for the headers only: all of them, and no body.
async fn check_head(caller: &Caller<'_>, path: &str, of: &HttpAnswer) {
    let head = caller.head(path).await;
    assert_eq!((head.status, head.body.len()), (of.status, 0), "HEAD {path}");
    let length = of.body.len().to_string();
    assert_eq!(head.header("content-length"), length, "HEAD {path}");
    for name in ["content-type", "cache-control", "x-opendsr-signature", "x-opengdpr-signature"] {
        assert_eq!(head.header(name), of.header(name), "HEAD {path}: {name}");
    }
}

#[tokio::test]
async fn every_call_in_every_version_with_and_without_trailing_slash() {
    let world = World::new().await;
    world.controller("acme").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    for (version, requests, example, family) in VERSIONS {
        for slash in ["", "/"] {
            let what = format!("{requests}{slash}");
            let (id, body) = renamed(example);
            let received = acme.post(&what, body.clone()).await;
            check(&received, 201, family, &what);
            assert_eq!(received.fields(), RECEIVED, "{what}");
            let json = received.json();
            assert_eq!((&json["controller_id"], &json["subject_request_id"]), (&json!("acme"), &json!(id)), "{what}");
            assert_eq!(json["encoded_request"], json!(STANDARD.encode(&body)), "{what}");

            let other = requests.replace("opengdpr_requests", "status").replace("requests", "status");
            let mut answers = Vec::new();
            for path in [format!("{requests}/{id}{slash}"), format!("{other}/{id}{slash}")] {
                let status = acme.get(&path).await;
                check(&status, 200, family, &path);
                assert_eq!(status.fields(), STATUS, "{path}");
                check_head(&acme, &path, &status).await;
                answers.push(status.body);
            }
            assert_eq!(answers[0], answers[1]);
            let status: Value = serde_json::from_slice(&answers[0]).unwrap();
            assert_eq!((&status["api_version"], &status["request_status"]), (&json!(version), &json!("pending")));
            assert_eq!(status["expected_completion_time"], json["expected_completion_time"]);
            for field in ["extensions", "results_count", "results_url"] {
                assert_eq!(status[field], Value::Null, "{field}");
            }

            let path = format!("{requests}/{id}{slash}");
            let cancelled = acme.delete(&path).await;
            check(&cancelled, 202, family, &path);
            assert_eq!(cancelled.fields(), CANCELLED, "{path}");
            let json = cancelled.json();
            assert_eq!((&json["expected_completion_time"], &json["api_version"]), (&Value::Null, &json!(version)));
            let again = acme.delete(&path).await;
            assert_eq!((again.status, &again.body), (202, &cancelled.body), "the first time once more");
            assert_eq!(acme.get(&path).await.json()["request_status"], json!("cancelled"));
        }
    }
}

#[tokio::test]
async fn discovery_and_certificates_need_no_credentials() {
    let world = World::new().await;
    let gateway = Gateway::start(&world, &[]).await;
    for (version, requests, ..) in VERSIONS {
        for slash in ["", "/"] {
            let path = format!("/{}/discovery{slash}", &requests[1..3]);
            let answer = gateway.get(&path).await;
            assert_eq!((answer.status, answer.header("cache-control")), (200, "no-store"), "{path}");
            let fields =
                ["api_version", "processor_certificate", "supported_identities", "supported_subject_request_types"];
            assert_eq!(answer.fields(), fields, "{path}");
            let json = answer.json();
            assert_eq!(json["api_version"], json!(version));
            assert_eq!(json["processor_certificate"], json!("http://localhost:8080/opendsr_cert.pem"));
            assert_eq!(json["supported_subject_request_types"], json!(["erasure", "access", "portability"]));
            let identities = json["supported_identities"].as_array().unwrap();
            assert_eq!(identities.len(), 11 * 4, "eleven types in four formats");
            assert!(identities.contains(&json!({"identity_type": "email", "identity_format": "sha256"})));
        }
    }
    let chain = gateway.get("/opendsr_cert.pem").await;
    assert_eq!((chain.status, chain.header("content-type")), (200, "application/x-pem-file"));
    let pem = |text: &[u8]| Pem::iter_from_buffer(text).next().unwrap().unwrap().contents;
    assert_eq!(pem(&chain.body), pem(&std::fs::read(&world.files.certificate).unwrap()));
    assert!(!chain.text().contains("PRIVATE"));
    let none = gateway.get("/opendsr_cert_ec.pem").await;
    assert_eq!((none.status, none.reason()), (404, "not_found".to_owned()));
    let document = gateway.get("/openapi.json").await;
    assert!(document.json()["paths"]["/v1/opengdpr_requests"].is_object());
    assert_eq!(gateway.get("/docs/").await.status, 200);
}

/// Every published example under the path of its version; scheduled as over AMQP (see `intake`).
const EXAMPLES: [(&str, &str, &str); 13] = [
    ("/v1/opengdpr_requests", "opendsr/v1-request.json", "2054-12-02T12:30:00Z"),
    ("/v1/opengdpr_requests", "opendsr/v1-mparticle-extension.json", "2054-11-25T00:05:00Z"),
    ("/v2/requests", "opendsr/v2-request.json", "2054-12-02T12:30:00Z"),
    ("/v2/requests", "opendsr/v2-mparticle-extension.json", "2054-12-02T12:30:00Z"),
    ("/v2/requests", "opendsr/v2-mparticle-extension-other1.json", "2054-12-02T12:30:00Z"),
    ("/v2/requests", "opendsr/v2-mpids-only-date.json", "2054-12-02T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-request.json", "2054-12-02T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-access-request.json", "2054-11-25T00:05:00Z"),
    ("/v3/requests", "mparticle/v3-erasure-minimal-request.json", "2054-12-02T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-erasure-mpid-request.json", "2054-12-02T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-erasure-skip-waiting-request.json", "2054-11-24T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-erasure-skip-waiting-string-request.json", "2054-12-02T12:30:00Z"),
    ("/v3/requests", "mparticle/v3-portability-request.json", "2054-11-25T00:05:00Z"),
];

#[tokio::test]
async fn every_published_example_is_accepted_and_so_is_what_clients_really_send() {
    let world = World::new().await;
    world.controller("acme").await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    for (path, example, expected) in EXAMPLES {
        for versioned in [true, false] {
            let (_, body) = renamed(example);
            let mut body: Value = serde_json::from_slice(&body).unwrap();
            if !versioned {
                body.as_object_mut().unwrap().remove("api_version");
            }
            let answer = acme.post(path, body.to_string()).await;
            assert_eq!(answer.status, 201, "{example}: {}", answer.text());
            assert_eq!(answer.json()["expected_completion_time"], json!(expected), "{example}");
            let id = answer.json()["subject_request_id"].as_str().unwrap().to_owned();
            let sql = "SELECT api_version FROM lethe.requests WHERE subject_request_id::text = $1";
            assert_eq!(world.one::<String>(sql, &[&id]).await, format!("{}.0", &path[2..3]), "{example}");
        }
    }
    for (path, flawed) in [
        ("/v2/requests", "opendsr/v2-request-flawed.txt"),
        ("/v3/requests", "mparticle/v3-erasure-mpid-and-email-invalid-request.json"),
    ] {
        let answer = acme.post(path, fixture(flawed)).await;
        assert_eq!((answer.status, answer.is_signed()), (400, true), "{flawed}");
        answer.reason();
    }
    liberal_input(&world, &acme).await;
}

async fn liberal_input(world: &World, acme: &Caller<'_>) {
    // Upper-case ids are answered lower-case, and found in either spelling.
    let id = uuid::Uuid::new_v4().to_string();
    let upper = Request::erasure("ada@example.com").with("subject_request_id", json!(id.to_uppercase()));
    let answer = acme.request(&upper).await;
    assert_eq!(answer.json()["subject_request_id"], json!(id));
    for spelling in [id.clone(), id.to_uppercase()] {
        let status = acme.status(&spelling).await;
        assert_eq!((status.status, &status.json()["subject_request_id"]), (200, &json!(id)));
    }
    // 64-bit numbers keep all their bits, as numbers and as strings.
    let id = uuid::Uuid::new_v4().to_string();
    let body = format!(
        r#"{{"regulation":"gdpr","subject_request_id":"{id}","subject_request_type":"erasure","submitted_time":"2026-03-02",
            "extensions":{{"opendsr.mparticle.com":{{"mpids":[9007199254740993,-3718039598335680577,"8070450532247928833"]}}}}}}"#
    );
    let answer = acme.post("/v2/requests", body).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let sql =
        format!("SELECT mpid FROM {MPIDS} m WHERE subject_request_id::text = $1 AND source = 'named' ORDER BY mpid");
    let named: Vec<i64> = world.all(&sql, &[&id]).await;
    assert_eq!(named, [-3_718_039_598_335_680_577, 9_007_199_254_740_993, 8_070_450_532_247_928_833]);
    let sql = "SELECT submitted_time = '2026-03-02T00:00:00Z' FROM lethe.requests WHERE subject_request_id::text = $1";
    assert!(world.one::<bool>(sql, &[&id]).await, "a date is midnight, UTC");
    // A mpid as a number in the form of version 3.
    let number =
        json!({"opendsr.mparticle.com": {"subject_identities": {"mpid": {"value": 9_007_199_254_740_995_i64}}}});
    let request = Request::new("erasure").with("extensions", number);
    acme.request(&request).await;
    let mpid = format!("SELECT mpid FROM {MPIDS} m WHERE subject_request_id::text = $1");
    assert_eq!(world.one::<i64>(&mpid, &[&request.id]).await, 9_007_199_254_740_995);
    // JSON by another name, with a character set, or without any type at all.
    for media_type in ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"] {
        let body = Request::erasure("ada@example.com").bytes();
        let call = acme.call(Method::POST, "/v3/requests").header("content-type", media_type).body(body);
        assert_eq!(call.send().await.unwrap().status(), 201, "{media_type}");
    }
    let untyped = acme.call(Method::POST, "/v3/requests").body(Request::erasure("ada@example.com").bytes());
    assert_eq!(untyped.send().await.unwrap().status(), 201);
}

#[tokio::test]
async fn a_group_is_listed_to_its_end() {
    const REQUESTS: usize = LIST_LIMIT * 2 + 5;
    let world = World::new().await;
    world.controller("acme").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    // With what has a meaning in URLs.
    let group = "spring & autumn/100 % ü";
    let first = Request::erasure("ada@example.com").group(group);
    acme.request(&first).await;
    // The rest are copies of the first row: what is listed needs no more than that.
    let sql = format!(
        "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status, lane,
                batch_id, content_digest, group_digest, submitted_time, received_at, expected_completion_time)
         SELECT controller_id, gen_random_uuid(), api_version, regulation, request_type, status, lane, batch_id,
                content_digest, group_digest, submitted_time, received_at, expected_completion_time
           FROM lethe.requests, generate_series(2, {REQUESTS})"
    );
    world.run(&sql).await;
    let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("group_id", group).finish();
    for (_, requests, _, family) in VERSIONS {
        let mut path = format!("{requests}?{query}");
        let (mut sizes, mut ids) = (Vec::new(), Vec::new());
        loop {
            let answer = acme.get(&path).await;
            check(&answer, 200, family, &path);
            let list = answer.json().as_array().unwrap().clone();
            sizes.push(list.len());
            ids.extend(list.iter().map(|one| one["subject_request_id"].as_str().unwrap().to_owned()));
            let link = answer.header("link");
            if link.is_empty() {
                break;
            }
            let next = link.strip_prefix('<').and_then(|rest| rest.strip_suffix(">; rel=\"next\"")).expect("RFC 8288");
            path = next.strip_prefix("http://localhost:8080").expect("below the public URL").to_owned();
            assert!(path.starts_with(requests), "{path}");
        }
        assert_eq!(sizes, [LIST_LIMIT, LIST_LIMIT, 5]);
        assert_eq!(ids[0], first.id, "in the order of receipt");
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), REQUESTS);
    }
    let first_page = acme.get(&format!("/v3/requests?{query}")).await.json();
    assert_eq!(first_page[0]["group_id"], json!(group));
    let mut fields: Vec<String> = first_page[0].as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(fields, STATUS);
    let empty = acme.get("/v3/requests/?group_id=nobody").await;
    check(&empty, 200, "OpenDSR", "an empty group");
    assert_eq!(empty.json(), json!([]));
}

/// Calls that come together share one look at the database: whatever is wrong with one of them, and whoever asks.
#[tokio::test]
async fn calls_that_come_together_get_each_its_own_answer() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("other").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(
        &world,
        &[("LETHE_RATE_PER_CONTROLLER", "100000"), ("LETHE_RATE_PER_ADDRESS", "100000")],
    )
    .await;
    let (acme, other) = (gateway.caller(&world, "acme"), gateway.caller(&world, "other"));
    let mut asked = Vec::new();
    for number in 0..60 {
        let group = format!("group {number}");
        let request = Request::erasure("ada@example.com").group(&group);
        acme.request(&request).await;
        asked.push((request.id.clone(), Some(group)));
        asked.push((uuid::Uuid::new_v4().to_string(), None));
    }
    // One of them cannot be read: that is nobody else's trouble.
    let broken = asked[0].0.clone();
    world
        .run(&format!(
            "UPDATE lethe.request_details d SET sealed_reporting = 'broken' FROM lethe.requests r
              WHERE r.request_key = d.request_key AND r.subject_request_id = '{broken}'"
        ))
        .await;
    let (acme, other) = (&acme, &other);
    let calls = asked.iter().map(|(id, group)| async move {
        let (own, strangers) = futures_util::join!(acme.status(id), other.status(id));
        (id, group, own, strangers)
    });
    for (id, group, own, strangers) in futures_util::future::join_all(calls).await {
        assert!(own.is_signed() && strangers.is_signed());
        assert_eq!(strangers.status, 404, "another controller's: {id}");
        match group {
            _ if *id == broken => assert!(own.status >= 500, "{}", own.text()),
            None => assert_eq!(own.status, 404, "{id}"),
            Some(group) => {
                let answer = own.json();
                assert_eq!((&answer["subject_request_id"], &answer["group_id"]), (&json!(id), &json!(group)));
            }
        }
    }
}
