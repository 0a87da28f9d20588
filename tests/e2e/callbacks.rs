//! Callbacks: exact, signed, in order, and nobody's trouble but their own (contract 6).

use std::time::Duration;

use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_testing::wait::{becomes, eventually, eventually_some, seconds, stays};
use lethe_testing::{Publisher, Receiver, Reply, Request, SECONDS, Worker, World, seconds_with};

const LIFE: [&str; 3] = ["pending", "in_progress", "completed"];

async fn completes(receiver: &Receiver, path: &str) {
    becomes("the statuses that were delivered", seconds(20), LIFE.map(str::to_owned).to_vec(), async || {
        receiver.statuses(path)
    })
    .await;
}

async fn callbacks_in(world: &World, state: &str) -> i64 {
    world.one("SELECT count(*) FROM lethe.callbacks WHERE state = $1", &[&state]).await
}

#[tokio::test]
async fn each_change_of_status_is_reported_exactly_and_signed() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world
        .controller_with("pss", |new| {
            new.any_amqp_user = true;
            new.algorithm = SignatureAlgorithm::RsaPss;
        })
        .await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    let receiver = Receiver::start().await;
    let _workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let erasure = Request::erasure("ada@example.com")
        .group("g \"1\"")
        .callback(&receiver.url("/a?x=1&y=%20"))
        .callback(&receiver.url("/b"));
    let answer = publisher.request("acme", &erasure).await.json();
    let access = Request::access("ada@example.com").callback(&receiver.url("/pss"));
    publisher.request("pss", &access).await;
    let (first, mut body) = lethe_testing::requests::renamed("opendsr/v1-request.json");
    let text = String::from_utf8(body)
        .unwrap()
        .replace("https://controller.example.com/opengdpr_callbacks", &receiver.url("/v1"));
    body = text.into_bytes();
    publisher.request("acme", body).await;
    for path in ["/a", "/b", "/pss", "/v1"] {
        completes(&receiver, path).await;
    }
    for (received, status) in receiver.at("/a").iter().zip(LIFE) {
        let expected = format!(
            "{{\"controller_id\":\"acme\",\"expected_completion_time\":{},\"status_callback_url\":\"{}\",\
             \"subject_request_id\":\"{}\",\"group_id\":\"g \\\"1\\\"\",\"request_status\":\"{status}\",\
             \"api_version\":\"3.0\",\"results_url\":null,\"results_count\":null,\"extensions\":null}}",
            answer["expected_completion_time"],
            receiver.url("/a?x=1&y=%20"),
            erasure.id
        );
        assert_eq!(std::str::from_utf8(&received.body).unwrap(), expected);
        assert_eq!(received.method, "POST");
        assert_eq!(received.header("content-type"), "application/json");
        assert_eq!(received.header("x-opendsr-processor-domain"), "localhost");
        assert_eq!(received.header("x-lethe-attempt"), "1");
        assert!(received.is_signed());
        assert!(!received.headers.contains_key("x-opengdpr-signature"));
    }
    let ids: std::collections::BTreeSet<String> =
        receiver.all().iter().map(|one| one.header("x-lethe-callback-id").to_owned()).collect();
    assert_eq!(ids.len(), 12, "each callback has an id of its own");
    for received in receiver.at("/v1") {
        assert_eq!(received.header("x-opengdpr-processor-domain"), "localhost");
        assert!(received.is_signed_as("x-opengdpr-signature", SignatureAlgorithm::RsaPkcs1v15));
        assert!(!received.headers.contains_key("x-opendsr-signature"));
        assert_eq!(
            (&received.json()["api_version"], &received.json()["subject_request_id"]),
            (&"1.0".into(), &first.clone().into())
        );
    }
    for received in receiver.at("/pss") {
        assert!(received.is_signed_as("x-opendsr-signature", SignatureAlgorithm::RsaPss) && !received.is_signed());
    }
    let last = receiver.at("/pss")[2].json();
    assert!(last["results_url"].as_str().unwrap().starts_with("http://localhost:8080/v3/results/"), "{last}");
    assert_eq!(last["results_count"], 0);
}

#[tokio::test]
async fn failures_of_every_kind_are_tried_again_in_order_under_the_same_id() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let trouble = [
        Reply::Status(500),
        Reply::Status(404),
        Reply::Redirect(receiver.url("/elsewhere")),
        // The first one breaks a connection that was kept, which is replaced within the attempt; the second one does not.
        Reply::Reset,
        Reply::Reset,
        Reply::Status(429),
        Reply::Accept,
    ];
    receiver.script("/x", trouble);
    let _workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    publisher.request("acme", &request).await;
    world.reaches(&request.id, "completed").await;
    completes(&receiver, "/x").await;
    let posts = receiver.at("/x");
    assert_eq!(posts.len(), 9, "five failures, one of them with two tries, three deliveries");
    for (attempt, number) in posts[..7].iter().zip([1, 2, 3, 4, 4, 5, 6]) {
        assert_eq!(attempt.status(), "pending", "none overtakes");
        assert_eq!(attempt.header("x-lethe-callback-id"), posts[0].header("x-lethe-callback-id"));
        assert_eq!(attempt.header("x-lethe-attempt"), number.to_string());
        assert_eq!(attempt.body, posts[0].body);
        assert!(attempt.is_signed());
    }
    assert!(receiver.at("/elsewhere").is_empty(), "redirects are not followed");
    becomes("delivered callbacks", seconds(10), 3, async || callbacks_in(&world, "delivered").await).await;
    let log: Vec<String> = world
        .all(
            "SELECT coalesce(status_code::text, '-') || ' ' || coalesce(error_class, 'delivered')
                FROM lethe.callback_attempts JOIN lethe.callbacks USING (callback_id) ORDER BY sequence, attempt",
            &[],
        )
        .await;
    let expected = ["500 status_5xx", "404 status_4xx", "302 redirect", "- connection_lost", "429 status_429"];
    assert_eq!(log[..5], expected);
    assert_eq!(log[5..], ["202 delivered"; 3]);
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    receiver.script("/x", [Reply::RetryAfter(3), Reply::Accept]);
    receiver.script("/y", [Reply::RetryAfter(3_000), Reply::Accept]);
    let _workers = Worker::fleet(&world, &seconds_with(&[("LETHE_CALLBACK_MAX_RETRY", "4s")])).await;
    let publisher = Publisher::connect(&world).await;
    for path in ["/x", "/y"] {
        publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url(path))).await;
        completes(&receiver, path).await;
        let at: Vec<_> = receiver.at(path).iter().map(|one| one.at).collect();
        let waited = at[1] - at[0];
        assert!(waited >= Duration::from_millis(2_900) && waited < seconds(10), "{path}: waited {waited:?}");
    }
}

#[tokio::test]
async fn a_callback_that_is_given_up_is_exhausted_and_lets_the_next_one_go() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    receiver.script("/x", [Reply::Status(500)]);
    let settings = seconds_with(&[("LETHE_CALLBACK_GIVE_UP", "1s"), ("LETHE_CALLBACK_BREAKER", "1000")]);
    let _workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url("/x"))).await;
    becomes("exhausted callbacks", seconds(30), 3, async || callbacks_in(&world, "exhausted").await).await;
    let mut statuses: Vec<String> = receiver.at("/x").iter().map(lethe_testing::callbacks::Received::status).collect();
    let attempts = statuses.len();
    statuses.dedup();
    assert_eq!(statuses, LIFE, "each only after the one before was given up");
    assert!(attempts > 6, "only {attempts} attempts");
    assert_eq!(
        world.one::<i64>("SELECT count(*) FROM lethe.callback_attempts", &[]).await,
        i64::try_from(attempts).unwrap()
    );
}

#[tokio::test]
async fn an_endpoint_that_hangs_slows_none_of_the_other_fifty() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut receivers = Vec::new();
    for _ in 0..50 {
        receivers.push(Receiver::start().await);
    }
    receivers[0].script("/x", [Reply::Hang]);
    // Fewer deliveries at once than wait for the one that hangs: without its limit it would hold them all for 200 s.
    let settings =
        seconds_with(&[("LETHE_CALLBACK_DELIVERIES", "32"), ("LETHE_CALLBACK_DELIVERIES_PER_ENDPOINT", "8")]);
    let _workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    let dead: Vec<Request> =
        (0..300).map(|_| Request::erasure("ada@example.com").callback(&receivers[0].url("/x"))).collect();
    let hanging = std::time::Instant::now();
    publisher.send_all(&dead.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    eventually("the one hangs", seconds(10), async || receivers[0].all().len() == 8).await;
    let alive: Vec<Request> =
        receivers[1..].iter().map(|one| Request::erasure("ada@example.com").callback(&one.url("/x"))).collect();
    publisher.send_all(&alive.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    for receiver in &receivers[1..] {
        completes(receiver, "/x").await;
    }
    // An attempt that hangs is given up after 20 s: until then none of the eight makes room for another.
    let rounds = 1 + usize::try_from(hanging.elapsed().as_secs() / 20).unwrap();
    let attempts = receivers[0].all().len();
    assert!((8..=8 * rounds).contains(&attempts), "{attempts} attempts in {rounds} times 20 s");
}

/// 16,000 callbacks for a host where nobody listens. (200,000 behave the same; they only take longer to publish.)
#[tokio::test]
async fn a_flood_for_a_dead_host_starves_nobody_and_gives_up_nothing_untried() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    // More of it than this test takes; `endpoints.rs` shows what happens afterwards.
    let settings = seconds_with(&[("LETHE_CALLBACK_GIVE_UP", "30m"), ("LETHE_CALLBACK_MAX_PROBE", "500ms")]);
    let _workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    let flood: Vec<Request> = (0..1_000)
        .map(|_| {
            let request = Request::erasure("ada@example.com");
            (0..16).fold(request, |request, url| request.callback(&format!("http://127.0.0.1:1/{url}")))
        })
        .collect();
    publisher.send_all(&flood.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    let tried = "SELECT count(*) FROM lethe.callbacks WHERE attempts > 0";
    eventually("the flood is being tried", seconds(30), async || world.one::<i64>(tried, &[]).await > 10).await;
    let request = Request::erasure("bob@example.com").callback(&receiver.url("/alive"));
    publisher.request("acme", &request).await;
    completes(&receiver, "/alive").await;
    assert_eq!(callbacks_in(&world, "exhausted").await, 0);
    let used = "SELECT count(*) FROM lethe.callbacks WHERE attempts = 0 AND retrying_for > '0'";
    assert_eq!(world.one::<i64>(used, &[]).await, 0, "what is held back uses up no time");
    let waiting = "SELECT count(*) FROM lethe.callbacks WHERE state = 'ready' AND attempts = 0";
    assert!(world.one::<i64>(waiting, &[]).await > 10_000, "the breaker holds back what it does not try");
}

#[tokio::test]
async fn the_limit_of_an_endpoint_holds_over_two_couriers() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    receiver.script("/x", [Reply::Slow(Duration::from_millis(60))]);
    let settings = seconds_with(&[("LETHE_CALLBACK_DELIVERIES_PER_ENDPOINT", "3")]);
    let mut workers = Worker::fleet(&world, &settings).await;
    workers.push(Worker::start(&world, "callback-courier", &settings).await);
    let publisher = Publisher::connect(&world).await;
    let all: Vec<_> = (0..40)
        .map(|_| {
            publisher.sending("acme", "request", &Request::erasure("ada@example.com").callback(&receiver.url("/x")))
        })
        .collect();
    publisher.send_all(&all).await;
    becomes("delivered callbacks", seconds(30), 120, async || callbacks_in(&world, "delivered").await).await;
    assert_eq!(receiver.most_in_flight(), 3);
    assert_eq!(receiver.all().len(), 120, "each once");
}

#[tokio::test]
async fn the_breaker_probes_a_failing_endpoint_and_lets_it_recover() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    receiver.script("/x", [Reply::Status(503)]);
    let settings = seconds_with(&[
        ("LETHE_CALLBACK_BREAKER", "4"),
        ("LETHE_CALLBACK_FIRST_RETRY", "500ms"),
        ("LETHE_CALLBACK_MAX_PROBE", "1s"),
        ("LETHE_CALLBACK_DELIVERIES_PER_ENDPOINT", "4"),
        ("LETHE_CALLBACK_GIVE_UP", "1m"),
    ]);
    let _workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    let all: Vec<_> = (0..30)
        .map(|_| {
            publisher.sending("acme", "request", &Request::erasure("ada@example.com").callback(&receiver.url("/x")))
        })
        .collect();
    publisher.send_all(&all).await;
    eventually("the breaker is open", seconds(10), async || {
        world.one("SELECT EXISTS (SELECT FROM lethe.endpoints WHERE open_until IS NOT NULL)", &[]).await
    })
    .await;
    let before = receiver.all().len();
    stays("the breaker", seconds(3), async || receiver.all().len() < before + 4 + 10).await;
    let used: i64 = world.one("SELECT count(*) FROM lethe.callbacks WHERE attempts = 0", &[]).await;
    assert!(used > 10, "what the breaker holds back uses no attempts");
    receiver.script("/x", [Reply::Accept]);
    becomes("delivered callbacks", seconds(30), 90, async || callbacks_in(&world, "delivered").await).await;
    let closed = "SELECT open_until IS NULL AND consecutive_failures = 0 FROM lethe.endpoints";
    assert!(world.one::<bool>(closed, &[]).await);
}

#[tokio::test]
async fn proxies_of_the_environment_are_not_used_and_private_addresses_refused() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let proxy = Receiver::start().await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url("/x"))).await;
    let guarded = Worker::start(&world, "callback-courier", &[("LETHE_CALLBACK_ALLOW", "http")]).await;
    let refused = eventually_some("the address is refused", seconds(10), async || {
        world.optional::<Option<String>>("SELECT error_class FROM lethe.callback_attempts LIMIT 1", &[]).await
    })
    .await;
    assert_eq!(refused.as_deref(), Some("address_refused"));
    assert!(receiver.all().is_empty());
    guarded.stop().await;
    let url = proxy.url("");
    let settings = [
        ("HTTP_PROXY", url.as_str()),
        ("http_proxy", url.as_str()),
        ("ALL_PROXY", url.as_str()),
        ("HTTPS_PROXY", url.as_str()),
    ];
    let _courier = Worker::start(&world, "callback-courier", &settings).await;
    eventually("it is delivered", seconds(20), async || !receiver.statuses("/x").is_empty()).await;
    assert!(proxy.all().is_empty());
}

mod resolver {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt;
    use lethe_delivery::{CallbackClient, Delivery, Lookup};
    use lethe_testing::Receiver;

    fn lookup(answers: &[&[&str]]) -> Lookup {
        let answers: Vec<Vec<_>> = answers
            .iter()
            .map(|list| list.iter().map(|ip| std::net::SocketAddr::new(ip.parse().unwrap(), 0)).collect())
            .collect();
        let next = Arc::new(AtomicUsize::new(0));
        Arc::new(move |_| {
            let index = next.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1);
            let answer = answers[index].clone();
            async move { Ok(answer) }.boxed()
        })
    }

    async fn deliver(policy: &str, answers: &[&[&str]], url: &str) -> Option<&'static str> {
        let client = CallbackClient::new(policy.parse().unwrap(), lookup(answers), None).unwrap();
        let client = client.with_timeout(std::time::Duration::from_secs(2));
        let delivery = Delivery { url: url.to_owned(), body: b"{}".to_vec(), headers: Vec::new() };
        client.deliver(&delivery).await.error_class
    }

    #[tokio::test]
    async fn a_name_with_any_forbidden_address_is_refused_whichever_comes_first() {
        let receiver = Receiver::start().await;
        let port = receiver.url("").rsplit(':').next().unwrap().to_owned();
        let url = format!("http://rebind.example.com:{port}/x");
        for answers in [
            &["192.0.2.1", "127.0.0.1"][..],
            &["127.0.0.1"],
            &["93.184.216.34", "10.0.0.7"],
            &["93.184.216.34", "::ffff:127.0.0.1"],
            &["64:ff9b::7f00:1"],
            &["2002:7f00:1::"],
            &["169.254.169.254"],
            &["100.64.0.1"],
            &["fd00::1"],
        ] {
            assert_eq!(deliver("http", &[answers], &url).await, Some("address_refused"), "{answers:?}");
        }
        for literal in [
            "http://[::ffff:127.0.0.1]:1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://localhost/",
            "http://a@93.184.216.34/",
        ] {
            assert_eq!(deliver("http", &[&["93.184.216.34"]], literal).await, Some("address_refused"), "{literal}");
        }
        assert!(receiver.all().is_empty());
        // What was checked is what is connected to: a second answer is asked for only by a second delivery.
        assert_eq!(deliver("http,127.0.0.0/8", &[&["127.0.0.1"], &["10.0.0.7"]], &url).await, None);
        assert_eq!(receiver.all().len(), 1);
    }
}
