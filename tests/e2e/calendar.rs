//! The calendar: what runs when, what was missed, and that no tick is doubled (contract 5).

use jiff::{SignedDuration, Timestamp};
use lethe_testing::wait::{becomes, eventually, eventually_some, seconds, stays};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};

const INTAKE: [&str; 2] = ["scheduler", "identity-matcher"];

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn before(instant: Timestamp, span: i64) -> Timestamp {
    instant - SignedDuration::from_secs(span)
}

async fn when(world: &World, column: &str, id: &str) -> Option<Timestamp> {
    let sql = format!(
        "SELECT {column} FROM lethe.requests LEFT JOIN lethe.batches USING (batch_id) WHERE subject_request_id::text = $1"
    );
    world.one(&sql, &[&id]).await
}

#[tokio::test]
async fn an_erasure_runs_seven_days_after_its_tick_and_not_a_second_before() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    world.set_clock(at("2054-11-22T09:00:00Z")).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    let (tick, runs) = world.slot_of(&request.id).await;
    assert_eq!((tick, runs), (at("2054-11-23T12:30:00Z"), at("2054-11-30T12:30:00Z")));

    world.set_clock(before(tick, 1)).await;
    let closed =
        eventually_some("the batch is closed", seconds(10), async || when(&world, "closed_at", &request.id).await)
            .await;
    assert!(closed >= tick, "closed at {closed}");
    let next = Request::erasure("ada@example.com");
    publisher.request("acme", &next).await;
    assert_eq!(world.slot_of(&next.id).await.0, at("2054-11-30T12:30:00Z"), "no request joins a closed batch");

    world.set_clock(before(runs, 3_600)).await;
    stays("the wait", seconds(1), async || world.rows_of(&acme, 1).await == (1, 1, 2)).await;
    world.set_clock(before(runs, 1)).await;
    world.reaches(&request.id, "completed").await;
    let started = when(&world, "in_progress_at", &request.id).await.unwrap();
    assert!(started >= runs && started < runs + SignedDuration::from_mins(1), "started at {started}");
    assert_eq!(world.status(&next.id).await, "pending");
    assert_eq!(world.rows_of(&acme, 1).await, (0, 0, 0));
}

#[tokio::test]
async fn expedited_erasures_and_access_run_at_their_next_tick() {
    let world = World::new().await;
    world.controller("acme").await;
    world.set_clock(at("2054-11-22T09:00:00Z")).await;
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let expedited = Request::erasure("ada@example.com").expedited();
    let access = Request::access("ada@example.com").expedited();
    for request in [&expedited, &access] {
        publisher.request("acme", request).await;
    }
    for (request, tick) in [(&expedited, "2054-11-22T12:30:00Z"), (&access, "2054-11-23T00:05:00Z")] {
        assert_eq!(world.slot_of(&request.id).await, (at(tick), at(tick)));
        world.set_clock(before(at(tick), 1)).await;
        world.reaches(&request.id, "in_progress").await;
        let started = when(&world, "in_progress_at", &request.id).await.unwrap();
        assert!(started >= at(tick) && started < at(tick) + SignedDuration::from_mins(1), "{started}");
    }
}

#[tokio::test]
async fn ticks_missed_in_weeks_of_outage_are_made_up_once_each_in_a_batch_of_its_own() {
    let world = World::new().await;
    world.controller("acme").await;
    world.set_clock(at("2054-11-22T09:00:00Z")).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    let _matcher = Worker::start(&world, "identity-matcher", &[]).await;
    scheduler.stop().await;
    let publisher = Publisher::connect(&world).await;
    let mut requests = Vec::new();
    for sunday in ["2054-11-22T09:00:00Z", "2054-11-29T09:00:00Z", "2054-12-06T09:00:00Z"] {
        world.set_clock(at(sunday)).await;
        for _ in 0..2 {
            let request = Request::erasure("ada@example.com");
            publisher.request("acme", &request).await;
            requests.push(request.id);
        }
    }
    // The first two are due, the third is closed but has days to go.
    world.set_clock(at("2054-12-07T13:00:00Z")).await;
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    for id in &requests[..4] {
        world.reaches(id, "in_progress").await;
    }
    eventually("the third tick is closed", seconds(10), async || {
        when(&world, "closed_at", &requests[4]).await.is_some()
    })
    .await;
    stays("the third batch", seconds(1), async || world.status(&requests[5]).await == "pending").await;
    let ticks: Vec<String> = world
        .all(
            "SELECT to_char(tick_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') FROM lethe.batches ORDER BY tick_at",
            &[],
        )
        .await;
    assert_eq!(ticks, ["2054-11-23 12:30", "2054-11-30 12:30", "2054-12-07 12:30"]);
    let sizes: Vec<i64> =
        world.all("SELECT count(*) FROM lethe.requests GROUP BY batch_id ORDER BY batch_id", &[]).await;
    assert_eq!(sizes, [2, 2, 2]);
    assert_eq!(world.one::<i64>("SELECT sum(request_count)::bigint FROM lethe.slices", &[]).await, 4);
}

/// What must hold of every request, whatever happened.
async fn every_request_ran_in_the_batch_it_was_scheduled_for(world: &World) {
    let violations = "
        SELECT count(*) FROM lethe.requests r LEFT JOIN lethe.batches b USING (batch_id)
         WHERE b.batch_id IS NULL OR r.received_at >= b.tick_at OR r.received_at < b.tick_at - interval '1 second'
            OR r.expected_completion_time <> b.runs_at + interval '60 seconds'
            OR r.in_progress_at < b.runs_at OR b.closed_at < b.tick_at";
    assert_eq!(world.one::<i64>(violations, &[]).await, 0);
    let doubled = "SELECT count(*) - count(DISTINCT (lane, tick_at)) FROM lethe.batches";
    assert_eq!(world.one::<i64>(doubled, &[]).await, 0, "a tick has one batch");
    let sliced = "SELECT sum(request_count)::bigint - (SELECT count(*) FROM lethe.requests) FROM lethe.slices";
    assert_eq!(world.one::<i64>(sliced, &[]).await, 0, "each request is in one slice");
    let strays = "
        SELECT count(*) FROM lethe.slices s
         WHERE s.request_count <> (SELECT count(*) FROM lethe.requests r WHERE r.slice_id = s.slice_id)";
    assert_eq!(world.one::<i64>(strays, &[]).await, 0);
}

#[tokio::test]
async fn under_continuous_load_every_request_runs_in_the_batch_it_was_scheduled_for() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], SECONDS).await;
    workers.push(Worker::start(&world, "identity-matcher", &[("LETHE_INTAKE_GROUP", "7")]).await);
    let mut connections = Vec::new();
    for _ in 0..2 {
        let publisher = Publisher::connect(&world).await;
        connections.push(tokio::spawn(async move {
            let started = std::time::Instant::now();
            let mut sent = 0;
            while sent < 300 || started.elapsed() < seconds(6) {
                let requests = (0..20).map(|n| match n % 3 {
                    0 => Request::erasure("ada@example.com"),
                    1 => Request::erasure("ada@example.com").expedited(),
                    _ => Request::erasure("grace@example.com"),
                });
                let all: Vec<_> = requests.map(|one| publisher.sending("acme", "request", &one)).collect();
                publisher.send_all(&all).await;
                sent += 20;
            }
            sent
        }));
    }
    let mut sent: i64 = 0;
    for connection in connections {
        sent += connection.await.unwrap();
    }
    world.count_reaches("completed", sent).await;
    every_request_ran_in_the_batch_it_was_scheduled_for(&world).await;
    let ticks: i64 = world.one("SELECT count(DISTINCT tick_at) FROM lethe.batches", &[]).await;
    assert!(ticks >= 5, "only {ticks} ticks");
}

/// A step remembers where it ended, and the next one goes on from there. Whatever is left behind is found before the batch
/// counts as released.
#[tokio::test]
async fn a_release_that_was_led_past_a_request_comes_back_for_it() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("zeta").await;
    world.set_clock(at("2054-11-22T09:00:00Z")).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    let _others = Worker::several(&world, &["identity-matcher", "erasure-executor"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    for controller in ["zeta", "acme"] {
        for _ in 0..3 {
            publisher.request(controller, &Request::erasure("ada@example.com").expedited()).await;
        }
    }
    scheduler.stop().await;
    let led_past = "UPDATE lethe.batches SET released_controller = 'acme', released_request = 9223372036854775807";
    world.run(led_past).await;
    world.set_clock(at("2054-11-22T12:31:00Z")).await;
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    world.count_reaches("completed", 6).await;
    becomes("the batch", seconds(10), "completed".to_owned(), async || {
        world.one::<String>("SELECT min(state) FROM lethe.batches", &[]).await
    })
    .await;
    assert_eq!(world.one::<i64>("SELECT sum(request_count)::bigint FROM lethe.slices", &[]).await, 6);
}

#[tokio::test]
async fn three_schedulers_double_nothing_even_if_the_leader_dies() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut schedulers = Vec::new();
    for _ in 0..3 {
        schedulers.push(Worker::start(&world, "scheduler", SECONDS).await);
    }
    let _workers = Worker::several(&world, &["identity-matcher", "erasure-executor"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let send = async |count: i64| {
        let requests = (0..count).map(|n| Request::erasure(&format!("p{n}@example.com")));
        let all: Vec<_> = requests.map(|one| publisher.sending("acme", "request", &one)).collect();
        publisher.send_all(&all).await;
    };
    send(300).await;
    eventually("a part is under way", seconds(10), async || world.in_status("completed").await > 0).await;
    send(300).await;
    let leading = schedulers.iter().position(|one| one.log().contains("leading")).expect("one leads");
    schedulers.remove(leading).kill().await;
    send(300).await;
    // The dead leader's lease lasts; the clock does not wait for it.
    let later = world.now().await + SignedDuration::from_secs(16);
    world.set_clock(later).await;
    world.count_reaches("completed", 900).await;
    becomes("open batches", seconds(10), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.batches WHERE state <> 'completed'", &[]).await
    })
    .await;
    every_request_ran_in_the_batch_it_was_scheduled_for(&world).await;
    assert!(world.one::<i64>("SELECT epoch FROM lethe.leaders", &[]).await >= 2);
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.calendars", &[]).await, 1);
}
