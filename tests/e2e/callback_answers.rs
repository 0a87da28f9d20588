//! What counts as an answer to a callback is its status line (contract 6): receivers as they are found.

use std::sync::Arc;

use lethe_delivery::{CallbackClient, Delivery, system_lookup};
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::opendsr::callback_url::AddressPolicy;
use lethe_testing::cli::json;
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::{Certified, Odd, OddReceiver, Publisher, Request, SECONDS, Worker, World, seconds_with};

fn client() -> CallbackClient {
    CallbackClient::new("127.0.0.0/8,http".parse().unwrap(), system_lookup(), None).unwrap()
}

async fn deliver(client: &CallbackClient, url: &str) -> DeliveryAttempt {
    client.deliver(&Delivery { url: url.to_owned(), body: b"{}".to_vec(), headers: Vec::new() }).await
}

fn outcome(attempt: &DeliveryAttempt) -> (Option<u16>, Option<&'static str>) {
    (attempt.status_code, attempt.error_class)
}

/// Two header lines a hundred and twenty times, and one of a hundred kilobytes.
fn long(line: &str, times: usize) -> &'static [u8] {
    let lines: String = (0..times).map(|number| line.replace('#', &number.to_string())).collect();
    format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: 2\r\n\r\nok").leak().as_bytes()
}

#[tokio::test]
async fn a_status_line_counts_whatever_comes_after_it() {
    let many = long("X-H-#: v\r\n", 120);
    let big = long(&format!("X-Big: {}\r\n", "x".repeat(100_000)), 1);
    let client = client();
    for (answer, status) in [
        (&b"HTTP/1.1 200 OK\r\nX-Long: one\r\n two\r\nContent-Length: 2\r\n\r\nok"[..], 200),
        (b"HTTP/1.1 200 OK\r\nX-Odd : 1\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nPHP Warning: nothing to worry about in Unknown on line 0\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nSet-Cookie: waf=a\x01b\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 200 OK\r\nX-Gru\xdf: Gr\xfc\xdfe\r\nContent-Length: 2\r\n\r\nok", 200),
        (many, 200),
        (big, 200),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\nHTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", 202),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", 204),
        (b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", 205),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", 200),
        // Ten bytes of a thousand.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789", 200),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", 401),
        (b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 408),
        (b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n", 410),
        (b"HTTP/1.1 308 Permanent Redirect\r\nLocation: /x/\r\nContent-Length: 0\r\n\r\n", 308),
    ] {
        let shown = String::from_utf8_lossy(&answer[..answer.len().min(80)]).into_owned();
        let class = match status {
            200..300 => None,
            300..400 => Some("redirect"),
            _ => Some("status_4xx"),
        };
        for odd in [Odd::Says(answer), Odd::SaysAndCloses(answer)] {
            let receiver = OddReceiver::start(odd).await;
            // The second one over whatever the first one has left of the connection.
            for _ in 0..2 {
                let attempt = deliver(&client, &receiver.url("/x")).await;
                assert_eq!(outcome(&attempt), (Some(status), class), "{shown}");
                assert!(attempt.duration < seconds(15), "{shown}: {:?}", attempt.duration);
            }
            assert_eq!(receiver.seen().len(), 2, "{shown}");
        }
    }
    let http10 = OddReceiver::start(Odd::SaysAndCloses(b"HTTP/1.0 200 OK\r\n\r\nok")).await;
    assert_eq!(outcome(&deliver(&client, &http10.url("/x")).await), (Some(200), None));
}

#[tokio::test]
async fn what_a_receiver_asks_to_wait_is_read_in_every_form() {
    let client = client();
    for (value, longer_than, shorter_than) in
        [("Thursday, 09-Dec-60 12:30:00 GMT", 3_600, u64::MAX), ("99999999999999999999", 3_600, u64::MAX), ("7", 6, 8)]
    {
        let answer = format!("HTTP/1.1 503 Service Unavailable\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n");
        let receiver = OddReceiver::start(Odd::Says(answer.leak().as_bytes())).await;
        let attempt = deliver(&client, &receiver.url("/x")).await;
        let wish = attempt.retry_after.unwrap_or_default();
        assert!(wish > seconds(longer_than) && wish <= seconds(shorter_than), "{value}: {wish:?}");
    }
}

#[tokio::test]
async fn what_is_not_an_answer_has_a_class_and_a_reason() {
    let client = client();
    for (odd, class, has_reason) in [
        (Odd::SaysAndCloses(b"SSH-2.0-OpenSSH_9.2\x1b[31m\r\n"), "bad_answer", true),
        (Odd::SaysAndCloses(b"HTTP/1.1 two hundred OK\r\n\r\n"), "bad_answer", true),
        (Odd::SaysAndCloses(b"HTTP/1.1 102 Processing\r\n\r\n"), "connection_lost", false),
        (Odd::SaysAndCloses(b""), "connection_lost", false),
    ] {
        let receiver = OddReceiver::start(odd).await;
        let attempt = deliver(&client, &receiver.url("/x")).await;
        assert_eq!(outcome(&attempt), (None, Some(class)), "{odd:?}");
        assert!(attempt.endpoint_trouble, "{odd:?}");
        assert_eq!(attempt.reason.is_some(), has_reason, "{odd:?}: {:?}", attempt.reason);
        assert!(attempt.reason.unwrap_or_default().bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()));
        assert_eq!(receiver.seen().len(), 1, "{odd:?}: a new connection is not replaced");
    }
}

#[tokio::test]
async fn a_kept_connection_that_breaks_is_replaced_within_the_attempt() {
    let receiver = OddReceiver::start(Odd::ClosesReused).await;
    let client = client();
    for _ in 0..3 {
        assert_eq!(outcome(&deliver(&client, &receiver.url("/x")).await), (Some(202), None));
    }
    let connections: Vec<usize> = receiver.seen().iter().map(|post| post.connection).collect();
    // The second delivery: over the first connection, which breaks, then over a second one, which is not kept. The third
    // one needs one more.
    assert_eq!(connections, [1, 1, 2, 3]);
    let folder = std::env::temp_dir().join(lethe_testing::servers::unique_name());
    std::fs::create_dir_all(&folder).unwrap();
    let certificate = Certified::write(&folder, false);
    let receiver = OddReceiver::start_tls(Odd::ClosesReused, &certificate).await;
    let client =
        CallbackClient::new("127.0.0.0/8,::1/128".parse().unwrap(), system_lookup(), Some(&certificate.file)).unwrap();
    for _ in 0..3 {
        let attempt = deliver(&client, &receiver.url_at("localhost", "/x")).await;
        assert_eq!(outcome(&attempt), (Some(202), None), "with TLS");
    }
    assert_eq!(receiver.seen().len(), 4);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_broken_connection_uses_no_attempt_and_a_body_without_an_end_no_time() {
    let world = World::new().await;
    world.controller("acme").await;
    let (breaks, endless) = (OddReceiver::start(Odd::ClosesReused).await, OddReceiver::start(Odd::Endless).await);
    let _workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let started = std::time::Instant::now();
    let requests: Vec<Request> = (0..20)
        .map(|_| Request::erasure("ada@example.com").callback(&breaks.url("/x")).callback(&endless.url("/x")))
        .collect();
    publisher.send_all(&requests.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    let delivered = "SELECT count(*) FROM lethe.callbacks WHERE state = 'delivered'";
    becomes("delivered callbacks", seconds(20), 120, async || world.one::<i64>(delivered, &[]).await).await;
    // Eight at a time for thirty seconds each would be four minutes.
    assert!(started.elapsed() < seconds(120));
    assert_eq!(world.one::<i32>("SELECT max(attempts) FROM lethe.callbacks", &[]).await, 1);
    let replaced = breaks.seen();
    assert!(replaced.len() > 60 && replaced.iter().all(|post| post.attempt == "1"), "{} posts", replaced.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_kept_connection_that_breaks_is_replaced_however_busy_the_client_is() {
    let receiver = OddReceiver::start(Odd::ClosesReused).await;
    let client = Arc::new(client());
    let deliveries = (0..32).map(|_| {
        let (client, url) = (client.clone(), receiver.url("/x"));
        tokio::spawn(async move {
            for _ in 0..60 {
                assert_eq!(outcome(&deliver(&client, &url).await), (Some(202), None));
            }
        })
    });
    for delivery in deliveries.collect::<Vec<_>>() {
        delivery.await.unwrap();
    }
}

/// RFC 6052: behind DNS64 the only address of an IPv4-only host is one of `64:ff9b::/96`. The resolver refuses a name as soon
/// as one of its addresses is refused (`callbacks.rs` shows that).
#[test]
fn a_translated_address_is_judged_by_the_address_inside() {
    let cases: Vec<serde_json::Value> =
        serde_json::from_slice(&lethe_testing::requests::fixture("callbacks/nat64-answers.json")).unwrap();
    assert_eq!(cases.len(), 7);
    let policy = AddressPolicy::default();
    for case in cases {
        let answers = case["answer"].as_array().unwrap().iter().map(|ip| ip.as_str().unwrap().parse().unwrap());
        let refused = answers.into_iter().any(|address| !policy.allows(address));
        assert_eq!(refused, case["refused"].as_bool().unwrap(), "{case}");
    }
}

#[tokio::test]
async fn a_failed_handshake_says_why() {
    let world = World::new().await;
    world.controller("acme").await;
    let certificate = Certified::write(&world.folder, true);
    let receiver = OddReceiver::start_tls(Odd::Says(b"HTTP/1.1 204 No Content\r\n\r\n"), &certificate).await;
    let file = certificate.file.display().to_string();
    let workers = Worker::fleet(&world, &seconds_with(&[("LETHE_CALLBACK_CA_FILE", &file)])).await;
    let publisher = Publisher::connect(&world).await;
    publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url_at("localhost", "/x"))).await;
    eventually("the handshake fails", seconds(10), async || {
        world.one("SELECT EXISTS (SELECT FROM lethe.callback_attempts WHERE error_class = 'tls')", &[]).await
    })
    .await;
    let listed = json(&world, &["callback", "list"]).await;
    let reasons: Vec<&str> = listed.as_array().unwrap().iter().filter_map(|one| one["last_reason"].as_str()).collect();
    let reason = reasons.concat();
    assert!(reason.contains("CaUsedAsEndEntity"), "{reason}");
    let table = lethe_testing::cli::lethe(&world, &["callback", "list"]).await;
    assert!(table.out.contains("tls"), "{}", table.out);
    let courier = workers.last().unwrap();
    eventually("the log says why", seconds(5), async || courier.log().contains("CaUsedAsEndEntity")).await;

    // One that is not marked as an authority is trusted by the same setting.
    let certificate = Certified::write(&world.folder, false);
    let receiver = OddReceiver::start_tls(Odd::Says(b"HTTP/1.1 204 No Content\r\n\r\n"), &certificate).await;
    let client =
        CallbackClient::new("127.0.0.0/8,::1/128".parse().unwrap(), system_lookup(), Some(&certificate.file)).unwrap();
    assert_eq!(outcome(&deliver(&client, &receiver.url_at("localhost", "/x")).await), (Some(204), None));
}

/// Case 45: a receiver that refuses every signature gets both of them with each attempt, and attempts come to an end.
#[tokio::test]
async fn two_posts_of_one_attempt_carry_its_number() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = OddReceiver::start(Odd::Says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")).await;
    let previous = lethe_testing::signing::SigningPair::write(
        &world.folder,
        "previous",
        lethe_domain::signature_algorithm::SignatureAlgorithm::RsaPkcs1v15,
        2090,
    );
    let (key, certificate) = (previous.key.display().to_string(), previous.certificate.display().to_string());
    let settings = seconds_with(&[
        ("LETHE_SIGNING_PREVIOUS_KEY_FILE", &key),
        ("LETHE_SIGNING_PREVIOUS_CERT_FILE", &certificate),
        ("LETHE_SIGNING_SWITCH_AT", "2026-01-01T00:00:00Z"),
        ("LETHE_CALLBACK_GIVE_UP", "400ms"),
        // The first callback only.
        ("LETHE_ERASURE_WAITING_PERIOD", "1h"),
    ]);
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "callback-courier"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url("/x"))).await;
    let exhausted = "SELECT count(*) FROM lethe.callbacks WHERE state = 'exhausted'";
    becomes("exhausted callbacks", seconds(15), 1, async || world.one::<i64>(exhausted, &[]).await).await;
    let attempts: Vec<String> = receiver.seen().into_iter().map(|post| post.attempt).collect();
    let counted: i32 = world.one("SELECT max(attempts) FROM lethe.callbacks", &[]).await;
    let expected: Vec<String> = (1..=counted).flat_map(|number| [number.to_string(), number.to_string()]).collect();
    assert!(counted > 1);
    assert_eq!(attempts, expected);
    let because: Option<String> = world.one("SELECT exhausted_because FROM lethe.callbacks", &[]).await;
    assert_eq!(because.as_deref(), Some("time_used_up"));
}
