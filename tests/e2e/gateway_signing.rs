//! Which key signs: rotation at a set instant, and the other algorithms.

use jiff::{SignedDuration, Timestamp};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_testing::gateway::HttpAnswer;
use lethe_testing::signing::{self, SigningPair};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Gateway, Receiver, Reply, Request, Worker, World};
use reqwest::Method;
use x509_parser::pem::Pem;

const RSA: SignatureAlgorithm = SignatureAlgorithm::RsaPkcs1v15;

/// The certificate that the gateway hands out.
async fn certificate(gateway: &Gateway, path: &str) -> Vec<u8> {
    let answer = gateway.get(path).await;
    assert_eq!(answer.status, 200);
    Pem::iter_from_buffer(&answer.body).next().unwrap().unwrap().contents
}

fn from_now(by: SignedDuration) -> String {
    (Timestamp::now() + by).to_string()
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

/// The settings of a rotation from `previous` to the world's usual key.
fn rotation(previous: &SigningPair, switch_at: String) -> Vec<(&'static str, String)> {
    vec![
        ("LETHE_SIGNING_PREVIOUS_KEY_FILE", text(&previous.key)),
        ("LETHE_SIGNING_PREVIOUS_CERT_FILE", text(&previous.certificate)),
        ("LETHE_SIGNING_SWITCH_AT", switch_at),
    ]
}

fn borrowed<'a>(settings: &'a [(&'static str, String)]) -> Vec<(&'static str, &'a str)> {
    settings.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

fn signature(answer: &HttpAnswer) -> &str {
    answer.header("x-opendsr-signature")
}

#[tokio::test]
async fn until_the_set_instant_the_previous_key_signs_and_from_then_on_the_new_one() {
    let world = World::new().await;
    world.controller("acme").await;
    let previous = SigningPair::write(&world.folder, "previous", RSA, 2090);
    let new =
        Pem::iter_from_buffer(&std::fs::read(&world.files.certificate).unwrap()).next().unwrap().unwrap().contents;
    let path = "/v3/requests?group_id=g";
    for (switch_at, is_new) in [(SignedDuration::from_hours(1), false), (SignedDuration::from_hours(-1), true)] {
        let settings = rotation(&previous, from_now(switch_at));
        let gateway = Gateway::start(&world, &borrowed(&settings)).await;
        let answer = gateway.caller(&world, "acme").get(path).await;
        assert_eq!(signing::verifies(RSA, signature(&answer), &answer.body), is_new);
        assert_eq!(previous.verifies(RSA, signature(&answer), &answer.body), !is_new);
        let expected = if is_new { &new } else { &previous.der };
        assert_eq!(certificate(&gateway, "/opendsr_cert.pem").await, *expected);
    }
    // Without a restart, and whatever the previous key has signed already.
    let settings = rotation(&previous, from_now(SignedDuration::from_secs(4)));
    let gateway = Gateway::start(&world, &borrowed(&settings)).await;
    let before = gateway.caller(&world, "acme").get(path).await;
    assert!(previous.verifies(RSA, signature(&before), &before.body));
    eventually("the new chain is handed out", seconds(20), async || {
        certificate(&gateway, "/opendsr_cert.pem").await == new
    })
    .await;
    let answer = gateway.caller(&world, "acme").get(path).await;
    assert_eq!(answer.body, before.body);
    assert!(signing::verifies(RSA, signature(&answer), &answer.body));
}

/// Whoever polls is told the same, to the byte, until something changes.
#[tokio::test]
async fn an_answer_that_is_given_again_is_signed_once() {
    let world = World::new().await;
    let ec = SigningPair::write(&world.folder, "ec", SignatureAlgorithm::EcdsaP256, 2090);
    let owned = [("LETHE_SIGNING_EC_KEY_FILE", text(&ec.key)), ("LETHE_SIGNING_EC_CERT_FILE", text(&ec.certificate))];
    world.controller_with("acme", |new| new.algorithm = SignatureAlgorithm::EcdsaP256).await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &borrowed(&owned)).await;
    let acme = gateway.caller(&world, "acme");
    let request = Request::erasure("ada@example.com");
    acme.request(&request).await;
    // An ECDSA signature differs each time that one is made.
    let (first, second) = (acme.status(&request.id).await, acme.status(&request.id).await);
    assert_eq!((signature(&first), &first.body), (signature(&second), &second.body));
    acme.delete(&format!("/v3/requests/{}", request.id)).await;
    let third = acme.status(&request.id).await;
    assert_eq!(third.json()["request_status"], "cancelled");
    for answer in [&second, &third] {
        assert!(ec.verifies(SignatureAlgorithm::EcdsaP256, signature(answer), &answer.body));
    }
    let metrics = gateway.worker.get("/metrics").await.unwrap().1;
    for line in
        [r#"lethe_http_signatures_total{remembered="true"} 1"#, r#"lethe_http_signatures_total{remembered="false"} 2"#]
    {
        assert!(metrics.lines().any(|one| one == line), "{metrics}");
    }
}

#[tokio::test]
async fn a_receiver_that_keeps_the_old_certificate_gets_its_callback_all_the_same() {
    let world = World::new().await;
    world.controller("acme").await;
    let previous = SigningPair::write(&world.folder, "previous", RSA, 2090);
    let receiver = Receiver::start().await;
    let settings = rotation(&previous, from_now(SignedDuration::from_hours(-1)));
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let _courier = Worker::start(&world, "callback-courier", &borrowed(&settings)).await;
    let acme = gateway.caller(&world, "acme");
    receiver.script("/keeps-the-old", [Reply::Status(401), Reply::Accept]);
    acme.request(&Request::erasure("ada@example.com").callback(&receiver.url("/keeps-the-old"))).await;
    eventually("it is delivered", seconds(15), async || {
        world.one::<i64>("SELECT count(*) FROM lethe.callbacks WHERE state = 'delivered'", &[]).await == 1
    })
    .await;
    let posts = receiver.at("/keeps-the-old");
    assert_eq!(posts.len(), 2);
    assert_eq!(posts[0].body, posts[1].body);
    for header in ["x-lethe-callback-id", "x-lethe-attempt"] {
        assert_eq!(posts[0].header(header), posts[1].header(header), "one attempt: {header}");
    }
    assert!(posts[0].is_signed(), "first with the new key");
    assert!(previous.verifies(RSA, posts[1].header("x-opendsr-signature"), &posts[1].body), "then with the old one");
    let attempts: Vec<Option<i16>> = world.all("SELECT status_code FROM lethe.callback_attempts", &[]).await;
    assert_eq!(attempts, [Some(202)]);
    // What fails for another reason is not tried with another key.
    receiver.script("/is-down", [Reply::Status(500), Reply::Accept]);
    acme.request(&Request::erasure("ada@example.com").callback(&receiver.url("/is-down"))).await;
    eventually("it is delivered", seconds(15), async || receiver.at("/is-down").len() == 2).await;
    assert!(receiver.at("/is-down").iter().all(lethe_testing::callbacks::Received::is_signed));
}

#[tokio::test]
async fn a_key_whose_certificate_has_expired_signs_nothing_more() {
    let world = World::new().await;
    world.controller("acme").await;
    let previous = SigningPair::write(&world.folder, "previous", RSA, 2020);
    let receiver = Receiver::start().await;
    let settings = rotation(&previous, from_now(SignedDuration::from_hours(-1)));
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let _courier = Worker::start(&world, "callback-courier", &borrowed(&settings)).await;
    receiver.script("/x", [Reply::Status(401), Reply::Status(401), Reply::Status(401), Reply::Accept]);
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    gateway.caller(&world, "acme").request(&request).await;
    eventually("it is delivered at last", seconds(15), async || receiver.at("/x").len() == 4).await;
    let posts = receiver.at("/x");
    assert!(posts.iter().all(lethe_testing::callbacks::Received::is_signed), "each with the new key");
    let attempts: Vec<&str> = posts.iter().map(|one| one.header("x-lethe-attempt")).collect();
    assert_eq!(attempts, ["1", "2", "3", "4"]);
}

#[tokio::test]
async fn a_controller_that_is_set_so_gets_other_signatures_over_every_transport() {
    let world = World::new().await;
    for (id, algorithm) in [("ecdsa", SignatureAlgorithm::EcdsaP256), ("pss", SignatureAlgorithm::RsaPss)] {
        world
            .controller_with(id, |new| {
                new.algorithm = algorithm;
                new.amqp_user = Some(world.management.user());
            })
            .await;
    }
    let ec = SigningPair::write(&world.folder, "ec", SignatureAlgorithm::EcdsaP256, 2090);
    let owned = [("LETHE_SIGNING_EC_KEY_FILE", text(&ec.key)), ("LETHE_SIGNING_EC_CERT_FILE", text(&ec.certificate))];
    let settings = borrowed(&owned);
    let receiver = Receiver::start().await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &settings).await;
    let _workers = Worker::several(&world, &["callback-courier", "identity-matcher"], &settings).await;
    let publisher = lethe_testing::Publisher::connect(&world).await;
    assert_eq!(certificate(&gateway, "/opendsr_cert_ec.pem").await, ec.der);
    for (id, algorithm) in [("ecdsa", SignatureAlgorithm::EcdsaP256), ("pss", SignatureAlgorithm::RsaPss)] {
        let verifies = |signature: &str, body: &[u8]| match algorithm {
            SignatureAlgorithm::EcdsaP256 => ec.verifies(algorithm, signature, body),
            _ => signing::verifies(algorithm, signature, body),
        };
        let caller = gateway.caller(&world, id);
        let path = format!("/{id}");
        let request = Request::erasure("ada@example.com").callback(&receiver.url(&path));
        let answer = caller.request(&request).await;
        assert!(verifies(signature(&answer), &answer.body), "{id} over HTTP");
        let answer = publisher.status(id, &request.id).await;
        assert!(verifies(&answer.headers["X-OpenDSR-Signature"], &answer.body), "{id} over AMQP");
        eventually("the callback comes", seconds(15), async || !receiver.at(&path).is_empty()).await;
        let posts = receiver.at(&path).remove(0);
        assert!(verifies(posts.header("x-opendsr-signature"), &posts.body), "{id}: the callback");
        let missing = gateway.send(caller.call(Method::GET, "/v3/requests/7")).await;
        assert_eq!(missing.status, 400);
        assert!(verifies(signature(&missing), &missing.body), "{id}: an error");
    }
}
