//! Ten thousand messages that were changed at random, over AMQP and over HTTP: no process ends, no connection of ours
//! breaks, and everybody in between is answered. The seed is printed; `LETHE_FUZZ_SEED` repeats a run.

use lethe_testing::raw::{self, Properties, RawPublisher};
use lethe_testing::wait::{becomes, seconds};
use lethe_testing::{Gateway, Publisher, Request, Worker, World};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reqwest::Method;

const MESSAGES: usize = 8_000;
const CALLS: usize = 2_000;
/// After so many comes one that is well.
const EVERY: usize = 100;

fn seed() -> u64 {
    let seed = std::env::var("LETHE_FUZZ_SEED").ok().and_then(|text| text.parse().ok());
    seed.unwrap_or_else(|| rand::rng().random())
}

/// Bytes with a few changes: flipped, cut, doubled, or with something inserted that parsers stumble over.
fn mutated(random: &mut StdRng, bytes: &[u8]) -> Vec<u8> {
    const STUMBLING: [&[u8]; 12] = [
        b"\0",
        b"\xFF",
        b"\xC3\x28",
        b"\xEF\xBB\xBF",
        b"{",
        b"[",
        b"\"",
        b"\\ud800",
        b"1e999",
        b"-0",
        b"null",
        b"\r\n\r\n",
    ];
    let mut bytes = bytes.to_vec();
    for _ in 0..random.random_range(1..=4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes.truncate(at),
            2 => drop(bytes.splice(at..at, STUMBLING[random.random_range(0..STUMBLING.len())].iter().copied())),
            3 => {
                let part = bytes[at..bytes.len().min(at + random.random_range(0..64))].to_vec();
                drop(bytes.splice(at..at, part));
            }
            _ => drop(bytes.splice(at..at, (0..random.random_range(0..8)).map(|_| b'[').collect::<Vec<_>>())),
        }
    }
    bytes
}

/// Property lists as a publisher may make them: some are well, in most a byte or a text is not, some are nested.
fn properties(random: &mut StdRng, user: &str) -> Properties {
    let entries = [
        raw::text_entry("controller-id", "acme"),
        raw::text_entry("routing-key", "victim.request"),
        raw::nested_entry(random.random_range(0..40)),
        raw::array_entry("error-code", "unrouted"),
    ]
    .concat();
    let (flags, mut bytes) = raw::headers(&entries);
    bytes.push(u8::try_from(user.len()).unwrap());
    bytes.extend(user.as_bytes());
    if random.random_bool(0.3) {
        let mut text = mutated(random, b"correlation");
        text.truncate(255);
        return raw::correlation(&text);
    }
    (flags | 1 << 4, bytes)
}

fn message(random: &mut StdRng, user: &str) -> (Vec<u8>, Properties, Vec<u8>) {
    const KEYS: [&[u8]; 4] = [b"acme.request", b"acme.cancellation", b"acme.status", b"acme.group"];
    let key = KEYS[random.random_range(0..KEYS.len())];
    let mut key = if random.random_bool(0.1) { mutated(random, key) } else { key.to_vec() };
    key.truncate(255);
    (key, properties(random, user), mutated(random, &Request::erasure("ada@example.com").bytes()))
}

#[tokio::test]
async fn ten_thousand_mutated_messages_end_nothing() {
    let world = World::new().await;
    world.controller("acme").await;
    let (mut scheduler, mut gateway) = Gateway::with_scheduler(&world, &[("LETHE_RATE_PER_ADDRESS", "1000000")]).await;
    let mut matcher = Worker::start(&world, "identity-matcher", &[]).await;
    let seed = seed();
    println!("LETHE_FUZZ_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (publisher, user) = (Publisher::connect(&world).await, world.management.user());
    let mut raw = RawPublisher::connect(&world).await;
    for round in 0..MESSAGES / EVERY {
        let messages: Vec<_> = (0..EVERY).map(|_| message(&mut random, &user)).collect();
        assert!(raw.are_read(&messages).await, "RabbitMQ has read them all");
        // One that RabbitMQ itself may refuse, with the connection: a table in which a byte is another one.
        let (key, (flags, bytes), body) = message(&mut random, &user);
        if !raw.are_read(&[(key, (flags, mutated(&mut random, &bytes)), body)]).await {
            raw = RawPublisher::connect(&world).await;
        }
        let well = publisher.sending("acme", "request", &Request::erasure("bob@example.com"));
        assert_eq!(publisher.ask(&well).await.status, 201, "in round {round}");
    }
    for queue in ["dsr.identity-matching", "dsr.cancellation", "dsr.query"] {
        becomes(&format!("{queue} is empty"), seconds(30), 0, async || world.messages(queue).await).await;
    }
    let acme = gateway.caller(&world, "acme");
    let call = format!(
        "POST /v3/requests HTTP/1.1\r\nhost: localhost\r\nauthorization: {}\r\ncontent-type: application/json\r\ncontent-length: ",
        acme.authorization()
    );
    for round in 0..CALLS / EVERY {
        let body = Request::erasure("ada@example.com").bytes();
        let whole = [format!("{call}{}\r\nconnection: close\r\n\r\n", body.len()).as_bytes(), &body].concat();
        let calls: Vec<Vec<u8>> = (0..EVERY).map(|_| mutated(&mut random, &whole)).collect();
        let told = calls.iter().map(async |bytes| {
            let mut connection = gateway.connect().await;
            connection.say(bytes).await;
            connection.finish().await
        });
        futures_util::future::join_all(told).await;
        let answer = acme.request(Request::erasure("bob@example.com").bytes()).await;
        assert_eq!(answer.status, 201, "in round {round}");
    }
    assert!(matcher.is_running() && gateway.worker.is_running() && scheduler.is_running(), "a process has ended");
    for log in [matcher.log(), gateway.worker.log()] {
        assert!(!log.contains("consuming has stopped") && !log.contains("panicked"), "{log}");
        assert!(!log.contains("ada@example.com"), "personal data in a log");
    }
    let dead = world.messages("dsr.identity-matching.dead").await;
    let recorded = world.in_status("pending").await;
    println!(
        "{MESSAGES} messages, {CALLS} calls: {recorded} requests recorded, {dead} messages that could not be read"
    );
    assert!(
        dead > 0 && recorded >= i64::try_from((MESSAGES + CALLS) / EVERY).unwrap(),
        "{recorded} recorded, {dead} dead"
    );
    assert_eq!(gateway.send(gateway.call(Method::GET, "/v3/discovery")).await.status, 200);
}
