//! Every code that the gateway refuses with: the error object, what else it says, and whether it is signed (contract 9).

use lethe_testing::gateway::HttpAnswer;
use lethe_testing::wait::{eventually_some, seconds};
use lethe_testing::{Gateway, Request, SECONDS, Worker, World, seconds_with};
use reqwest::Method;
use serde_json::{Value, json};

fn check(answer: &HttpAnswer, status: u16, reason: &str, signed: bool, what: &str) {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    assert_eq!(answer.reason(), reason, "{what}");
    assert_eq!((answer.is_signed(), answer.is_unsigned()), (signed, !signed), "{what}: {:?}", answer.headers);
}

#[tokio::test]
async fn what_is_wrong_is_said_by_field_and_rule_and_never_by_value() {
    let world = World::new().await;
    world.controller("acme").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    let good = || Request::erasure("secret.person@example.com");
    let v1 = |request: Request| ("/v1/opengdpr_requests", request);
    let v3 = |request: Request| ("/v3/requests", request);
    let cases = [
        ("no regulation", v3(good().with("regulation", Value::Null)), "required"),
        ("another type", v3(good().with("subject_request_type", json!("secret.type"))), "invalid"),
        ("nobody", v3(Request::new("erasure")), "required"),
        ("a version that the path contradicts", v1(good()), "contradiction"),
        ("a callback to nowhere", v3(good().callback("https://10.0.0.1/secret")), "callback_url"),
        ("a long group", v3(good().group(&"secret".repeat(50))), "invalid"),
    ];
    for (what, (path, request), reason) in cases {
        let answer = acme.post(path, &request).await;
        assert_eq!((answer.status, answer.reason()), (400, reason.to_owned()), "{what}: {}", answer.text());
        assert!(!answer.is_unsigned() && !answer.text().contains("secret"), "{what}: {}", answer.text());
        assert_eq!(answer.json()["error"]["errors"][0]["domain"], json!("Validation"), "{what}");
    }
    let group = format!("/v3/requests?group_id={}", "g".repeat(257));
    let paths = [
        "/v3/requests/7",
        "/v3/requests/a7551968-d5d6-11b2-9831-815ac9017798",
        "/v3/requests",
        "/v3/requests?group_id=",
        "/v3/requests?group_id=g&cursor=secret",
        &group,
    ];
    for path in paths {
        check(&acme.get(path).await, 400, "bad_request", true, path);
    }
    check(&acme.delete("/v3/requests/secret").await, 400, "bad_request", true, "cancelling no UUID");
    for path in ["/v3/requests/%ff%fe", "/v3/status/%ff", "/v3/requests/%00"] {
        check(&acme.get(path).await, 400, "bad_request", true, path);
    }
    check(&gateway.get("/v3/results/%ff").await, 404, "not_found", false, "a token that is no text");
    for path in ["/v3/requests?group_id=%00", "/v3/requests?group_id=%ff"] {
        let answer = acme.get(path).await;
        assert_eq!((answer.status, answer.json()), (200, json!([])), "no group is called so");
    }
    assert!(!gateway.worker.log().contains("secret"), "nor is it logged");
}

#[tokio::test]
async fn credentials_that_are_missing_malformed_or_wrong() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("other").await;
    let gateway = Gateway::start(&world, &[]).await;
    let (key, secret) = world.credentials("acme");
    let (other_key, _) = world.credentials("other");
    let basic = |text: String| {
        use base64::Engine;
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text))
    };
    let headers = [
        None,
        Some("Bearer x".to_owned()),
        Some("Basic".to_owned()),
        Some("Basic !!!".to_owned()),
        Some(basic("no colon".to_owned())),
        Some(basic(format!("{key}:"))),
        Some(basic(format!("{key}:{secret}x"))),
        Some(basic(format!("{other_key}:{secret}"))),
        Some(basic(format!("nobody:{secret}"))),
        Some(basic(format!("{key}\0:{secret}"))),
        Some(basic(":".to_owned())),
    ];
    let id = uuid::Uuid::new_v4();
    for header in &headers {
        for (method, path) in [
            (Method::POST, "/v3/requests".to_owned()),
            (Method::GET, format!("/v2/requests/{id}")),
            (Method::GET, "/v1/opengdpr_requests?group_id=g".to_owned()),
            (Method::DELETE, format!("/v3/requests/{id}")),
        ] {
            let mut call = gateway.call(method, &path);
            if let Some(header) = header {
                call = call.header("authorization", header);
            }
            let answer = gateway.send(call).await;
            // After some wrong ones the address has to wait: which is said likewise.
            if answer.status == 429 {
                assert!(header.is_some(), "without credentials there is nothing to be verified");
                assert!(answer.header("retry-after").parse::<u32>().unwrap() > 0);
                check(&answer, 429, "too_many_calls", false, "too many logins");
                continue;
            }
            check(&answer, 401, "unauthorized", false, &format!("{header:?} {path}"));
            assert_eq!(answer.header("www-authenticate"), "Basic realm=\"localhost\", charset=\"UTF-8\"");
        }
    }
    assert!(!gateway.worker.log().contains(&secret));
}

#[tokio::test]
async fn what_is_not_there_is_not_json_or_is_too_large() {
    let world = World::new().await;
    world.controller("acme").await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    for path in [
        "/",
        "/v4/requests",
        "/v3/opengdpr_requests",
        "/v1/requests",
        "/v3",
        "/v3/requests/a/b",
        "/metrics",
        "/v3/results",
    ] {
        check(&acme.get(path).await, 404, "not_found", false, path);
    }
    check(&gateway.get("/v3/results/unknown").await, 404, "not_found", false, "an unknown token");
    let unknown = acme.status(&uuid::Uuid::new_v4().to_string()).await;
    check(&unknown, 404, "not_found", true, "an unknown request");
    for (method, path, allowed) in [
        (Method::PUT, "/v3/requests", "GET,HEAD,POST"),
        (Method::POST, "/v3/discovery", "GET,HEAD"),
        (Method::DELETE, "/v3/results/x", "GET,HEAD"),
        (Method::PATCH, "/v3/requests/x/", "DELETE,GET,HEAD"),
    ] {
        let answer = gateway.send(acme.call(method.clone(), path)).await;
        check(&answer, 405, "method_not_allowed", false, path);
        let mut allow: Vec<&str> = answer.header("allow").split(',').map(str::trim).collect();
        allow.sort_unstable();
        assert_eq!(allow.join(","), allowed, "RFC 9110, 15.5.6: {method} {path}");
    }
    let good = Request::erasure("ada@example.com").bytes();
    for (name, value) in [
        ("content-type", "text/plain"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("content-encoding", "gzip"),
    ] {
        let call = acme.call(Method::POST, "/v3/requests").header(name, value).body(good.clone());
        check(&gateway.send(call).await, 415, "unsupported_media_type", false, value);
    }
    let exact = [good.clone(), vec![b' '; (1 << 20) - good.len()]].concat();
    assert_eq!(acme.post("/v3/requests", exact.clone()).await.status, 201, "1 MiB");
    let head = format!("POST /v3/requests HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n", acme.authorization());
    let mut announced = gateway.connect().await;
    announced.say(format!("{head}Content-Length: {}\r\n\r\n", (1 << 20) + 1)).await;
    let answer = announced.answer().await.expect("refused before the body is sent");
    check(&answer, 413, "too_large", false, "announced");
    let mut chunked = gateway.connect().await;
    chunked.say(format!("{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")).await;
    for part in [exact.as_slice(), b" "] {
        chunked.say(format!("{:x}\r\n", part.len())).await;
        chunked.say(part).await;
        chunked.say("\r\n").await;
    }
    chunked.say("0\r\n\r\n").await;
    check(&chunked.answer().await.expect("an answer"), 413, "too_large", false, "one byte over 1 MiB in chunks");
    let mut lying = gateway.connect().await;
    lying.say(format!("{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n")).await;
    let answer = lying.answer().await.expect("an answer");
    check(&answer, 400, "bad_request", false, "a body that is none");
}

#[tokio::test]
async fn clients_that_are_slow_are_told_so_or_cut_off() {
    let world = World::new().await;
    world.controller("acme").await;
    let gateway = Gateway::start(&world, &[("LETHE_HTTP_TIMEOUT", "700ms")]).await;
    let acme = gateway.caller(&world, "acme");
    let mut body = gateway.connect().await;
    let authorization = acme.authorization();
    body.say(format!(
        "POST /v3/requests HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\nContent-Length: 100\r\n\r\n{{"
    ))
    .await;
    check(&body.answer().await.expect("an answer"), 408, "too_slow", false, "half a body");
    for start in ["", "GET /v3/discovery HTTP/1.1\r\nHost: x\r\n"] {
        let mut half = gateway.connect().await;
        half.say(start).await;
        let rest = half.rest().await;
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{:?}", String::from_utf8_lossy(&rest));
    }
    let mut idle = gateway.connect().await;
    idle.say("GET /v3/discovery HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let answer = idle.answer().await.expect("an answer, and then the connection is closed");
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn what_comes_too_late_is_a_conflict() {
    let world = World::new().await;
    world.controller("acme").await;
    let workers = ["erasure-executor", "identity-matcher"];
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let _workers = Worker::several(&world, &workers, SECONDS).await;
    let acme = gateway.caller(&world, "acme");
    let request = Request::erasure("ada@example.com");
    acme.request(&request).await;
    world.reaches(&request.id, "completed").await;
    let late = acme.delete(&format!("/v3/requests/{}", request.id)).await;
    check(&late, 409, "conflict", true, "a cancellation after completion");
    assert!(late.json()["error"]["message"].as_str().unwrap().contains("completed"));
    let other = request.clone().identity("email", "grace@example.com");
    check(&acme.post("/v3/requests", &other).await, 409, "conflict", true, "an id that is taken");
    assert_eq!(acme.post("/v3/requests", &request).await.status, 201, "a repetition");
}

#[tokio::test]
async fn whoever_calls_too_often_is_told_to_wait() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("other").await;
    let limits =
        [("LETHE_RATE_PER_CONTROLLER", "2"), ("LETHE_LOGINS_PER_ADDRESS", "4"), ("LETHE_RATE_PER_ADDRESS", "1000")];
    let gateway = Gateway::start(&world, &limits).await;
    let (acme, other) = (gateway.caller(&world, "acme"), gateway.caller(&world, "other"));
    let path = "/v3/requests?group_id=g";
    let limited = async || Some(acme.get(path).await).filter(|answer| answer.status == 429);
    let refused = eventually_some("a controller is limited", seconds(10), limited).await;
    check(&refused, 429, "too_many_calls", false, "a controller");
    assert!(refused.header("retry-after").parse::<u32>().unwrap() > 0);
    assert_eq!(other.get(path).await.status, 200, "the limit of one is not that of another");
    let recovered = async || Some(acme.get(path).await).filter(|answer| answer.status == 200);
    eventually_some("it may call again", seconds(10), recovered).await;

    // Two logins are used up. What was verified goes on while guesses do not.
    let guess =
        async |secret: &str| gateway.send(gateway.call(Method::GET, path).basic_auth(&acme.key, Some(secret))).await;
    let guesses = [guess("a").await.status, guess("b").await.status, guess("c").await.status];
    assert_eq!(guesses, [401, 401, 429]);
    let refused = guess("d").await;
    check(&refused, 429, "too_many_calls", false, "logins");
    assert!(refused.header("retry-after").parse::<u32>().unwrap() > 0);
    assert_eq!(other.get(path).await.status, 200, "its credentials are known");
    assert_eq!(gateway.get("/v3/discovery").await.status, 200);

    let settings = seconds_with(&[("LETHE_RATE_PER_ADDRESS", "3"), ("LETHE_TRUSTED_PROXIES", "127.0.0.0/8")]);
    let gateway = Gateway::start(&world, &settings).await;
    let from = async |address: &str| {
        gateway.send(gateway.call(Method::GET, "/v3/discovery").header("x-forwarded-for", address)).await
    };
    let limited = async || Some(from("203.0.113.7").await).filter(|answer| answer.status == 429);
    let refused = eventually_some("an address is limited", seconds(10), limited).await;
    check(&refused, 429, "too_many_calls", false, "an address");
    assert!(refused.header("retry-after").parse::<u32>().unwrap() > 0);
    assert_eq!(from("203.0.113.8").await.status, 200, "another address behind the same proxy");
}

#[tokio::test]
async fn a_secret_that_is_rotated_counts_at_once() {
    let world = World::new().await;
    let id = world.controller("acme").await;
    let gateway = Gateway::start(&world, &[]).await;
    let path = "/v3/requests?group_id=g";
    let acme = gateway.caller(&world, "acme");
    assert_eq!(acme.get(path).await.status, 200);
    let credentials = {
        let session = world.db.session().await.unwrap();
        lethe_db::controllers::rotate_secret(&session, &id).await.unwrap().unwrap()
    };
    let mut rotated = acme.clone();
    (rotated.key, rotated.secret) = (credentials.api_key, credentials.api_secret);
    assert_eq!(rotated.get(path).await.status, 200);
    // The old one is remembered for half a minute by whoever verified it; nobody else takes it.
    let fresh = Gateway::start(&world, &[]).await;
    let old = fresh.caller(&world, "acme").get(path).await;
    check(&old, 401, "unauthorized", false, "the old secret");
}

#[tokio::test]
async fn what_strangers_call_methods_is_kept_nowhere() {
    let world = World::new().await;
    let gateway = Gateway::start(&world, &[("LETHE_RATE_PER_ADDRESS", "10")]).await;
    // Some are refused for their number, and counted all the same.
    for n in 0..30 {
        let mut raw = gateway.connect().await;
        raw.say(format!("INVENTED{n}{} / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "A".repeat(8_000))).await;
        let answer = String::from_utf8_lossy(&raw.rest().await).into_owned();
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let (_, metrics) = gateway.worker.get("/metrics").await.unwrap();
    assert!(metrics.contains(r#"method="other""#) && !metrics.contains("INVENTED"), "{metrics}");
}

#[tokio::test]
async fn guesses_from_the_networks_of_one_site_are_counted_together() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = [("LETHE_LOGINS_PER_ADDRESS", "2"), ("LETHE_TRUSTED_PROXIES", "127.0.0.0/8")];
    let gateway = Gateway::start(&world, &settings).await;
    let path = "/v3/requests?group_id=g";
    let guess = async |from: &str, n: usize| {
        let call = gateway.call(Method::GET, path).basic_auth(format!("invented-{n}"), Some("x"));
        gateway.send(call.header("x-forwarded-for", from)).await.status
    };
    let mut statuses = Vec::new();
    for n in 0..12 {
        statuses.push(guess(&format!("2001:db8:7:{n}::1"), n).await);
    }
    assert_eq!(statuses, [[401; 8].as_slice(), &[429; 4]].concat());
    // Neither its neighbours nor whoever has credentials pays for it.
    assert_eq!(guess("2001:db8:8:0::1", 100).await, 401);
    let acme = gateway.caller(&world, "acme");
    assert_eq!(acme.get(path).await.status, 200);
}
