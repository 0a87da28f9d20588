//! Endpoints: one that never answers comes to an end, one controller's hold up nobody else's, and those with nothing to
//! do cost nothing (ADR 0030, 0031).

use lethe_db::give_up::{self, GivenUpBy};
use lethe_domain::request::EndpointId;
use lethe_testing::cli::{json, lethe};
use lethe_testing::plans::{PLANNED, explained};
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::{Odd, OddReceiver, Publisher, Receiver, Request, SECONDS, Worker, World, seconds_with};

/// A port of this machine at which nobody listens.
const DEAD: &str = "http://127.0.0.1:1";

async fn count(world: &World, what: &str) -> i64 {
    world.one(&format!("SELECT count(*) FROM lethe.{what}"), &[]).await
}

async fn submit(world: &World, publisher: &Publisher, requests: usize, url: &str) {
    let before = world.in_status("completed").await;
    let requests: Vec<Request> =
        (0..requests).map(|number| Request::erasure("ada@example.com").callback(&format!("{url}/{number}"))).collect();
    publisher.send_all(&requests.iter().map(|one| publisher.sending("acme", "request", one)).collect::<Vec<_>>()).await;
    world.count_reaches("completed", before + i64::try_from(requests.len()).unwrap()).await;
}

const GIVES_UP: &[(&str, &str)] = &[("LETHE_CALLBACK_GIVE_UP", "2s"), ("LETHE_CALLBACK_MAX_PROBE", "500ms")];

#[tokio::test]
async fn behind_an_endpoint_that_never_answers_everything_comes_to_an_end() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let settings = [SECONDS, GIVES_UP].concat();
    let workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    submit(&world, &publisher, 100, DEAD).await;
    // What the breaker lets through in this time is a small part of them.
    becomes("exhausted callbacks", seconds(20), 300, async || {
        count(&world, "callbacks WHERE state = 'exhausted'").await
    })
    .await;
    let held_back = "callbacks WHERE exhausted_because = 'endpoint_given_up' AND attempts = 0";
    assert!(count(&world, held_back).await > 200, "only {}", count(&world, held_back).await);
    assert_eq!(count(&world, "audit_entries WHERE event = 'endpoint.given_up'").await, 1);
    let because = "audit_entries WHERE event = 'callback.exhausted' AND details->>'because' = 'endpoint_given_up'";
    assert!(count(&world, because).await > 200);

    let listed = json(&world, &["callback", "list", "--state", "exhausted", "--limit", "1000"]).await;
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 300);
    assert!(listed.iter().any(|one| one["exhausted_because"] == "endpoint_given_up"));
    let endpoints = json(&world, &["endpoint", "list", "--failing"]).await;
    assert_eq!((&endpoints[0]["state"], &endpoints[0]["endpoint"]), (&"given_up".into(), &DEAD.into()));
    assert!(endpoints[0]["last_answer_at"].is_null() && endpoints[0]["unanswered_since"].is_string());
    let courier = workers.last().unwrap();
    let metrics = courier.get("/metrics").await.unwrap().1;
    assert!(metrics.contains("lethe_endpoints_given_up_total 1"), "{metrics}");

    // Sent once more by an operator, they have their time again.
    json(&world, &["callback", "replay", "--controller", "acme", "--limit", "5"]).await;
    let replayed = "SELECT count(*) FROM lethe.callbacks WHERE replays > 0 AND state = 'exhausted'";
    let again = "SELECT bool_and(finished_at >= replayed_at + interval '1 s') FROM lethe.callbacks WHERE replays > 0";
    becomes("replayed callbacks that are exhausted again", seconds(20), 5, async || {
        world.one::<i64>(replayed, &[]).await
    })
    .await;
    assert!(world.one::<bool>(again, &[]).await);

    // Others of the same controller are delivered all the while, and their endpoint is well.
    submit(&world, &publisher, 1, &receiver.url("")).await;
    eventually("the other one is delivered", seconds(10), async || receiver.statuses("/0").len() == 3).await;
    let table = lethe(&world, &["endpoint", "list", "--controller", "acme"]).await;
    assert!(table.out.contains("well") && table.out.contains("given_up"), "{}", table.out);
}

#[tokio::test]
async fn a_courier_that_dies_while_it_gives_up_leaves_the_rest_to_the_next_attempt() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = [SECONDS, GIVES_UP].concat();
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    submit(&world, &publisher, 60, DEAD).await;
    let exhausted = async || count(&world, "callbacks WHERE state = 'exhausted'").await;
    let mut so_far = 0;
    for (fault, commits) in [("kill@give_up.before_commit", false), ("kill@give_up.after_commit", true)] {
        let dying = [&settings[..], &[("LETHE_FAULT", fault)]].concat();
        let mut courier = Worker::spawn(&world, "callback-courier", &dying);
        assert_eq!(courier.exit(seconds(20)).await.code(), None, "{fault}");
        let now = exhausted().await;
        assert!(now < 180, "{fault}: one step of three");
        assert!(if commits { now >= so_far + 30 } else { now < 30 }, "{fault}: {now} are exhausted, {so_far} before");
        so_far = now;
    }
    let _courier = Worker::start(&world, "callback-courier", &settings).await;
    becomes("exhausted callbacks", seconds(20), 180, exhausted).await;
}

#[tokio::test]
async fn an_operator_gives_up_what_waits_for_an_endpoint() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = seconds_with(&[
        ("LETHE_CALLBACK_MAX_PROBE", "20m"),
        ("LETHE_CALLBACK_FIRST_RETRY", "20m"),
        ("LETHE_CALLBACK_MAX_RETRY", "40m"),
    ]);
    let _workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    submit(&world, &publisher, 40, DEAD).await;
    eventually("the breaker is open", seconds(10), async || {
        count(&world, "endpoints WHERE open_until > lethe.now()").await == 1
            && count(&world, "callbacks WHERE lease_token IS NOT NULL").await == 0
    })
    .await;
    let listed = json(&world, &["endpoint", "list", "--controller", "acme"]).await;
    let id = listed[0]["endpoint_id"].to_string();
    assert_eq!((&listed[0]["state"], listed[0]["ready"].as_i64()), (&"held".into(), Some(40)), "{listed}");
    let young = json(&world, &["endpoint", "give-up", &id, "--older-than", "1h"]).await;
    assert_eq!(young["exhausted"], 0);
    let given_up = json(&world, &["endpoint", "give-up", &id]).await;
    assert_eq!((&given_up["exhausted"], &given_up["controller_id"]), (&120.into(), &"acme".into()));
    assert_eq!(count(&world, "callbacks WHERE exhausted_because = 'given_up_by_operator'").await, 120);
    let told: Vec<String> = world
        .all(
            "SELECT (details->>'endpoint') || ' ' || (details->>'older_than_seconds') || ' ' || (details ? 'database_user')::text
               FROM (SELECT entry_id, details::jsonb FROM lethe.audit_entries WHERE event = 'endpoint.given_up') told
              ORDER BY entry_id",
            &[],
        )
        .await;
    assert_eq!(told, [format!("{DEAD} 3600 true"), format!("{DEAD} 0 true")]);
    let unknown = lethe(&world, &["endpoint", "give-up", "4711"]).await;
    assert!(unknown.code != Some(0) && unknown.err.contains("lethe endpoint list"), "{}", unknown.err);
    assert!(lethe(&world, &["endpoint", "list"]).await.out.contains(DEAD));
}

#[tokio::test]
async fn what_comes_while_an_endpoint_is_given_up_is_left_alone() {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port) VALUES ('acme', 'https', 'example.com', 443);
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             VALUES ('acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', sha256('x'), now(), now(), now())",
        )
        .await;
    let come = async |sequence: usize| {
        world
            .run(&format!(
                "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                              expected_completion_time, state, next_attempt_at, created_at)
                 SELECT gen_random_uuid(), request_key, n, {sequence}, endpoint_id, 'pending', now(), 'ready', now(), now()
                   FROM lethe.requests, lethe.endpoints, generate_series(1, 600) AS n"
            ))
            .await;
    };
    come(0).await;
    let endpoint: EndpointId = world.one("SELECT endpoint_id FROM lethe.endpoints", &[]).await;
    let by = GivenUpBy::Operator { older_than: seconds(0) };
    let cutoff = give_up::cutoff(&world.db, by).await.unwrap();
    let mut exhausted = Vec::new();
    // As many again with each step: it ends all the same.
    for number in 1..=3 {
        exhausted.push(give_up::step(&world.db, endpoint, by, cutoff, number == 1).await.unwrap().unwrap().exhausted);
        come(number).await;
    }
    assert_eq!(exhausted, [500, 100, 0]);
    assert_eq!(count(&world, "callbacks WHERE state = 'ready'").await, 1_800);
}

/// Of a controller's tarpits each is an endpoint with a limit and a breaker of its own.
#[tokio::test]
async fn a_controller_with_any_number_of_tarpits_delays_nobody_else() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("other").await;
    let (tarpit, receiver) = (OddReceiver::start(Odd::Tarpit).await, Receiver::start().await);
    let settings =
        seconds_with(&[("LETHE_CALLBACK_DELIVERIES", "16"), ("LETHE_CALLBACK_DELIVERIES_PER_ENDPOINT", "1")]);
    let workers = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    // 48 endpoints, three times as many as there are permits.
    for requests in 0..3_usize {
        let request = (0..16).fold(Request::erasure("ada@example.com"), |request, host| {
            request.callback(&tarpit.url_at(&format!("127.0.{requests}.{}", host + 1), "/x"))
        });
        publisher.request("acme", &request).await;
    }
    eventually("the tarpits have what they get", seconds(10), async || tarpit.seen().len() >= 2).await;
    let request = Request::erasure("bob@example.com").callback(&receiver.url("/x"));
    publisher.request("other", &request).await;
    eventually("the other controller's callbacks are delivered", seconds(10), async || {
        receiver.statuses("/x").len() == 3
    })
    .await;
    // Not one of the deliveries that hang has ended: it is not luck that there was a permit.
    let ended = "callback_attempts JOIN lethe.callbacks USING (callback_id) JOIN lethe.endpoints USING (endpoint_id)
                  WHERE controller_id = 'acme'";
    assert_eq!(count(&world, ended).await, 0);
    assert_eq!(tarpit.seen().len(), 2, "an eighth of sixteen");
    let in_flight = count(&world, "callbacks WHERE lease_token IS NOT NULL AND state = 'ready'").await;
    assert!(in_flight >= 2, "{in_flight} in flight");
    drop(workers);
}

#[tokio::test]
async fn endpoints_with_nothing_ready_cost_nothing() {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port)
             SELECT 'acme', 'https', n || '.example.com', 443 FROM generate_series(1, 20000) AS n;
             INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             VALUES ('acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', sha256('x'), now(), now(), now());
             -- Delivered ones everywhere, and something ready at every thousandth.
             INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, endpoint_id % 16, endpoint_id / 16, endpoint_id, 'pending', now(),
                    CASE WHEN endpoint_id % 1000 = 0 THEN 'ready' ELSE 'delivered' END, now(), now()
               FROM lethe.requests, lethe.endpoints;
             -- Some of them are held by their breakers, one is leased, one is due later.
             UPDATE lethe.endpoints SET open_until = now() + interval '1 minute' WHERE endpoint_id % 10000 = 0;
             UPDATE lethe.callbacks SET lease_token = gen_random_uuid(), lease_expires_at = now() + interval '1 minute'
              WHERE endpoint_id = 1000;
             UPDATE lethe.callbacks SET next_attempt_at = now() + interval '1 minute' WHERE endpoint_id = 2000;
             ANALYZE lethe.endpoints; ANALYZE lethe.callbacks",
        )
        .await;
    let session = world.db.session().await.unwrap();
    let mut woken = lethe_db::endpoints::to_wake(&session, 2.0, 500).await.unwrap();
    woken.sort_unstable();
    let expected: Vec<EndpointId> =
        (3..=20).filter(|thousand| thousand % 10 != 0).map(|thousand| EndpointId(1_000 * thousand)).collect();
    assert_eq!(woken, expected);
    assert!(lethe_db::endpoints::to_wake(&session, 2.0, 500).await.unwrap().is_empty(), "none twice within the pause");

    let statements = lethe_db::endpoints::STATEMENTS;
    let reading = explained(&world, statements, "WITH_READY", "bigint, bigint", "0, 2000", PLANNED).await;
    assert!(reading.whole.is_empty() && reading.blocks < 20 * 12, "for 20 endpoints of 20,000: {reading:?}");
    let ready: Vec<String> = (1..=20).map(|thousand| (1_000 * thousand).to_string()).collect();
    let values = format!("0, 500, '{{{}}}'", ready.join(","));
    let reading = explained(&world, statements, "TO_WAKE", "float8, bigint, bigint[]", &values, PLANNED).await;
    assert!(reading.whole.is_empty() && reading.blocks < 20 * 40, "for 20 endpoints of 20,000: {reading:?}");

    // More than one call looks at: each has its turn, wherever the last call has ended.
    world
        .run(
            "UPDATE lethe.callbacks SET state = 'ready', next_attempt_at = now() WHERE state = 'delivered' AND endpoint_id <= 5000",
        )
        .await;
    let mut woken = std::collections::BTreeSet::new();
    for _ in 0..4 {
        woken.extend(lethe_db::endpoints::to_wake(&session, 60.0, 10_000).await.unwrap());
    }
    assert!((1..=4_999).filter(|id| id % 1000 != 0).all(|id| woken.contains(&EndpointId(id))), "{}", woken.len());
}
