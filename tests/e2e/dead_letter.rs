//! Poison: a message that fails again and again is dead-lettered with its reason, its neighbours pass, and an operator looks
//! at it, has it handled once more, or throws it away.

use lethe_testing::cli::{json, lethe};
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::{Publisher, Receiver, Reply, Request, SECONDS, Worker, World, seconds_with};
use serde_json::{Value, json as value};

const WEEKLY: &[(&str, &str)] = &[];

/// From now on the database refuses the request with this id, and no other; `how` it does so.
async fn refuse(world: &World, id: &str, how: &str) {
    world
        .run(&format!(
            "CREATE SEQUENCE public.refused;
             CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                IF NEW.subject_request_id::text = '{id}' THEN PERFORM nextval('public.refused'); {how} END IF;
                RETURN NEW;
             END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON lethe.requests FOR EACH ROW EXECUTE FUNCTION public.refuse()"
        ))
        .await;
}

async fn failures(world: &World) -> i64 {
    world.one("SELECT count(*) FROM lethe.message_failures", &[]).await
}

/// Sends a message that `how` makes poison among thirty that are not; returns its id.
async fn poisoned(world: &World, publisher: &Publisher, how: &str) -> String {
    let poison = Request::erasure("canary-mail@example.com").group("canary-group");
    refuse(world, &poison.id, how).await;
    let mut all: Vec<_> = (0..30).map(|n| Request::erasure(&format!("p{n}@example.com"))).collect();
    all.insert(15, poison.clone());
    let all: Vec<_> = all.iter().map(|one| publisher.sending("acme", "request", one)).collect();
    publisher.send_all(&all).await;
    world.count_reaches("pending", 30).await;
    becomes("a dead letter", seconds(30), 1, async || world.messages("dsr.identity-matching.dead").await).await;
    assert_eq!(world.messages("dsr.identity-matching").await, 0);
    poison.id
}

#[tokio::test]
async fn a_message_that_the_database_refuses_is_set_aside_after_five_attempts() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    let id = poisoned(&world, &publisher, "RAISE EXCEPTION 'canary-mail' USING ERRCODE = '22000';").await;
    assert_eq!(failures(&world).await, 0, "a dead letter is no longer counted");
    // Alone it was tried five times; before that, its groups were halved each time.
    let tried: i64 = world.one("SELECT last_value FROM public.refused", &[]).await;
    assert!(tried >= 5, "{tried}");
    let listed = lethe(&world, &["dead-letter", "list", "--output", "json"]).await;
    assert!(!listed.out.contains("canary"), "{}", listed.out);
    let groups: Value = serde_json::from_str(&listed.out).unwrap();
    assert_eq!(
        (&groups[0]["queue"], &groups[0]["cause"], &groups[0]["controller_id"], &groups[0]["letters"]),
        (&"dsr.identity-matching.dead".into(), &"sqlstate_22000".into(), &"acme".into(), &1.into())
    );
    let letters = json(&world, &["dead-letter", "list", "--letters"]).await;
    assert_eq!((&letters[0]["subject_request_id"], &letters[0]["kind"]), (&id.clone().into(), &"request".into()));
    let letter = letters[0]["letter"].as_str().unwrap();
    let shown = lethe(&world, &["dead-letter", "show", letter]).await;
    assert!(
        shown.code == Some(0) && shown.out.contains("5 attempts") && !shown.out.contains("canary"),
        "{}",
        shown.out
    );
    // Looking takes nothing, and once the cause is gone it is handled.
    let again = lethe(&world, &["dead-letter", "replay", letter]).await;
    assert!(again.code == Some(1) && again.out.contains("fails again"), "{}{}", again.out, again.err);
    world.run("DROP FUNCTION public.refuse() CASCADE").await;
    let replayed = json(&world, &["dead-letter", "replay", letter, "--rate", "1000"]).await;
    assert_eq!(replayed["replayed"], 1);
    assert_eq!(world.status(&id).await, "pending");
    assert_eq!(world.messages("dsr.identity-matching.dead").await, 0);
    let audited: Vec<String> = world
        .all("SELECT details->>'letter' FROM lethe.audit_entries WHERE event = 'dead_letter.replayed' AND controller_id = 'acme'", &[])
        .await;
    assert_eq!(audited, [letter]);
}

#[tokio::test]
async fn a_message_that_fails_for_an_unknown_reason_is_set_aside_where_its_neighbours_pass() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    let poison = Request::erasure("x@example.com");
    refuse(&world, &poison.id, "RAISE EXCEPTION 'a bug';").await;
    publisher.send(&publisher.sending("acme", "request", &poison)).await;
    // A group without it passes: evidence that it is this one.
    eventually("it is dead-lettered", seconds(40), async || {
        let neighbours: Vec<_> =
            (0..20).map(|_| publisher.sending("acme", "request", &Request::erasure("y@example.com"))).collect();
        publisher.send_all(&neighbours).await;
        world.messages("dsr.identity-matching.dead").await == 1
    })
    .await;
}

#[tokio::test]
async fn a_message_that_ends_the_process_again_and_again_is_set_aside() {
    let world = World::new().await;
    world.controller("acme").await;
    let _scheduler = Worker::start(&world, "scheduler", WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    let poison = Request::erasure("x@example.com");
    // It hangs in this one message, and is killed there, as an orchestrator does.
    refuse(&world, &poison.id, "PERFORM pg_sleep(600);").await;
    let mut all: Vec<_> = (0..20).map(|n| Request::erasure(&format!("p{n}@example.com"))).collect();
    all.insert(10, poison.clone());
    let all: Vec<_> = all.iter().map(|one| publisher.sending("acme", "request", one)).collect();
    publisher.send_all(&all).await;
    let begun = async || -> i64 {
        world.one("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM public.refused", &[]).await
    };
    let mut deaths = 0;
    while world.messages("dsr.identity-matching.dead").await == 0 {
        let before = begun().await;
        let matcher = Worker::start(&world, "identity-matcher", WEEKLY).await;
        eventually("it hangs in it, or has set it aside", seconds(30), async || {
            begun().await > before || world.messages("dsr.identity-matching.dead").await > 0
        })
        .await;
        matcher.kill().await;
        world.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'identity-matcher'").await;
        deaths += 1;
        assert!(deaths < 15, "it is never dead-lettered");
    }
    assert!(deaths > 4, "{deaths}");
    let _matcher = Worker::start(&world, "identity-matcher", WEEKLY).await;
    world.count_reaches("pending", 20).await;
    let cause = json(&world, &["dead-letter", "list"]).await;
    assert_eq!((&cause[0]["cause"], &cause[0]["letters"]), (&"never_ended".into(), &1.into()), "{cause}");
    assert_eq!(world.status(&poison.id).await, "");
}

#[tokio::test]
async fn an_outage_is_nobodys_fault() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    world
        .run(
            "CREATE SEQUENCE public.refused;
             CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN PERFORM nextval('public.refused'); RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON lethe.requests FOR EACH ROW EXECUTE FUNCTION public.refuse()",
        )
        .await;
    let all: Vec<_> =
        (0..20).map(|_| publisher.sending("acme", "request", &Request::erasure("x@example.com"))).collect();
    publisher.send_all(&all).await;
    eventually("it was tried again and again", seconds(60), async || {
        world.one::<i64>("SELECT last_value FROM public.refused", &[]).await > 30
    })
    .await;
    assert_eq!(world.messages("dsr.identity-matching.dead").await, 0);
    world.run("DROP FUNCTION public.refuse() CASCADE").await;
    world.count_reaches("pending", 20).await;
}

#[tokio::test]
async fn what_was_refused_is_listed_by_cause_and_discarded() {
    let world = World::new().await;
    world.controller("acme").await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], WEEKLY).await;
    let publisher = Publisher::connect(&world).await;
    for _ in 0..3 {
        let bad = Request::erasure("canary-mail@example.com").with("regulation", value!("canary-law"));
        assert_eq!(publisher.ask(&publisher.sending("acme", "request", &bad)).await.status, 400);
    }
    let mut stranger = publisher.sending("acme", "request", &Request::erasure("canary-mail@example.com"));
    stranger.user_id = None;
    assert_eq!(publisher.ask(&stranger).await.status, 403);
    let mut lost = publisher.sending("acme", "requst", &Request::erasure("canary-mail@example.com"));
    lost.controller_id = None;
    publisher.send(&lost).await;
    becomes("kept copies", seconds(10), 5, async || world.messages("dsr.rejected").await).await;
    let listed = lethe(&world, &["dead-letter", "list", "--output", "json"]).await;
    assert!(!listed.out.contains("canary"), "{}", listed.out);
    let groups: Vec<Value> = serde_json::from_str(&listed.out).unwrap();
    let mut causes: Vec<(String, i64)> = groups
        .iter()
        .map(|one| (one["cause"].as_str().unwrap().to_owned(), one["letters"].as_i64().unwrap()))
        .collect();
    causes.sort();
    assert_eq!(causes.len(), 3, "{causes:?}");
    assert!(
        causes.contains(&("forbidden".to_owned(), 1)) && causes.contains(&("unrouted".to_owned(), 1)),
        "{causes:?}"
    );
    // Whose sender was refused is not replayed either.
    let forbidden = lethe(&world, &["dead-letter", "replay", "--cause", "forbidden"]).await;
    assert!(forbidden.code == Some(1) && forbidden.out.contains("sender"), "{}", forbidden.out);
    assert_eq!(lethe(&world, &["dead-letter", "discard"]).await.code, Some(64), "not everything at once");
    let discarded = json(&world, &["dead-letter", "discard", "--queue", "dsr.rejected"]).await;
    assert_eq!(discarded["discarded"], 5);
    assert_eq!(world.messages("dsr.rejected").await, 0);
    let audited: i64 =
        world.one("SELECT count(*) FROM lethe.audit_entries WHERE event = 'dead_letter.discarded'", &[]).await;
    assert_eq!(audited, 5);
}

#[tokio::test]
async fn an_exhausted_callback_is_sent_once_more_outside_the_order() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    receiver.script("/x", [Reply::Status(500)]);
    let settings = seconds_with(&[("LETHE_CALLBACK_GIVE_UP", "300ms")]);
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "callback-courier"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
    publisher.request("acme", &request).await;
    let in_state = async |state: &str| -> i64 {
        world.one("SELECT count(*) FROM lethe.callbacks WHERE state = $1", &[&state]).await
    };
    becomes("exhausted", seconds(30), 2, async || in_state("exhausted").await).await;
    let before = receiver.at("/x");
    assert!(before.iter().all(|one| one.header("X-Lethe-Replay").is_empty()));
    receiver.script("/x", [Reply::Accept]);
    let replayed = json(&world, &["callback", "replay", "--controller", "acme"]).await;
    assert_eq!(replayed["replayed"].as_array().unwrap().len(), 2);
    becomes("delivered", seconds(30), 2, async || in_state("delivered").await).await;
    let replays = receiver.at("/x").split_off(before.len());
    assert_eq!(replays.len(), 2);
    for one in &replays {
        assert!(one.is_signed() && one.header("X-Lethe-Replay") == "true");
        let id = one.header("X-Lethe-Callback-Id");
        let last = before.iter().rfind(|earlier| earlier.header("X-Lethe-Callback-Id") == id).expect("the same id");
        let number = |one: &lethe_testing::callbacks::Received| one.header("X-Lethe-Attempt").parse::<i32>().unwrap();
        assert_eq!((one.body.clone(), number(one)), (last.body.clone(), number(last) + 1));
        let logged: i64 =
            world.one("SELECT count(*) FROM lethe.callback_attempts WHERE callback_id::text = $1", &[&id]).await;
        assert_eq!(logged, i64::from(number(one)));
    }
    // The next change of status does not wait for a replay that hangs.
    receiver.script("/x", [Reply::Hang]);
    json(&world, &["callback", "replay", "--controller", "acme", "--state", "delivered"]).await;
    eventually("the replays are under way", seconds(10), async || receiver.at("/x").len() == before.len() + 4).await;
    receiver.script("/x", [Reply::Accept]);
    let _executor = Worker::start(&world, "erasure-executor", SECONDS).await;
    eventually("completed is reported meanwhile", seconds(20), async || {
        receiver.statuses("/x").last().is_some_and(|status| status == "completed")
    })
    .await;
    let audited: i64 =
        world.one("SELECT count(*) FROM lethe.audit_entries WHERE event = 'callback.replayed'", &[]).await;
    assert_eq!(audited, 4);
}
