//! Servers that are away, queues that are lost, connections that are cut: everything goes on by itself (contract 12).

use jiff::SignedDuration;
use lethe_testing::erasure::deleted_in_all;
use lethe_testing::proxy::{Proxy, Way};
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Publisher, Receiver, Request, SECONDS, Worker, World, seconds_with};
use serde_json::json;

const LIFE: [&str; 3] = ["pending", "in_progress", "completed"];

/// Sends `count` erasures with callbacks.
async fn send(publisher: &Publisher, receiver: &Receiver, count: usize) {
    let all: Vec<_> = (0..count)
        .map(|_| {
            publisher.sending("acme", "request", &Request::erasure("ada@example.com").callback(&receiver.url("/x")))
        })
        .collect();
    publisher.send_all(&all).await;
}

/// Waits until all is completed and delivered, each callback in its order.
async fn all_is_done(world: &World, receiver: &Receiver, count: i64) {
    world.count_reaches("completed", count).await;
    becomes("callbacks that are not delivered", seconds(60), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.callbacks WHERE state <> 'delivered'", &[]).await
    })
    .await;
    let mut seen: std::collections::BTreeMap<String, Vec<String>> = std::collections::BTreeMap::new();
    for received in receiver.all() {
        let id = received.json()["subject_request_id"].as_str().unwrap().to_owned();
        seen.entry(id).or_default().push(received.status());
    }
    assert_eq!(seen.len(), usize::try_from(count).unwrap());
    for statuses in seen.values_mut() {
        // At least once: the same one may come again.
        statuses.dedup();
        assert_eq!(*statuses, LIFE);
    }
}

#[tokio::test]
async fn workers_wait_for_servers_that_are_away_and_go_on_by_themselves() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let postgresql = Proxy::start(&world.database_url, Way::Refusing).await;
    let rabbitmq = Proxy::start(&world.amqp_url, Way::Refusing).await;
    let (database_url, amqp_url) = (postgresql.through(&world.database_url), rabbitmq.through(&world.amqp_url));
    let settings = seconds_with(&[("DATABASE_URL", &database_url), ("AMQP_URL", &amqp_url)]);
    let publisher = Publisher::connect(&world).await;
    send(&publisher, &receiver, 20).await;
    let mut workers: Vec<Worker> = queue_workers().iter().map(|name| Worker::spawn(&world, name, &settings)).collect();
    for worker in &workers {
        eventually("it waits", seconds(10), async || worker.log().contains("waiting for PostgreSQL")).await;
        assert_eq!(worker.get("/readyz").await.map(|(status, _)| status), Some(503), "not ready: {}", worker.log());
        assert_eq!(worker.get("/livez").await.map(|(status, _)| status), Some(200));
    }
    postgresql.set(Way::Open);
    for worker in &workers[1..] {
        eventually("it waits", seconds(20), async || worker.log().contains("consuming has stopped")).await;
        assert_eq!(worker.get("/readyz").await.map(|(status, _)| status), Some(503));
    }
    rabbitmq.set(Way::Open);
    for worker in &workers {
        worker.ready().await;
    }
    all_is_done(&world, &receiver, 20).await;
    // Both are cut in the middle of the work, one after the other.
    send(&publisher, &receiver, 50).await;
    rabbitmq.set(Way::Refusing);
    eventually("it is noticed", seconds(20), async || workers[1].log().matches("consuming has stopped").count() >= 2)
        .await;
    rabbitmq.set(Way::Open);
    send(&publisher, &receiver, 50).await;
    postgresql.set(Way::Refusing);
    send(&publisher, &receiver, 50).await;
    eventually("it is noticed", seconds(20), async || workers[0].log().contains("a round of the schedule has failed"))
        .await;
    postgresql.set(Way::Open);
    // What could not be handed back lies under its lease; the clock does not wait for it.
    let later = world.now().await + SignedDuration::from_secs(61);
    world.set_clock(later).await;
    all_is_done(&world, &receiver, 170).await;
    for worker in &mut workers {
        assert!(worker.is_running());
    }
}

#[tokio::test]
async fn work_whose_messages_are_lost_is_driven_again() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let receiver = Receiver::start().await;
    // Nobody consumes the work yet: the wake-ups lie in the queues.
    let _first = Worker::several(&world, &queue_workers()[..2], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    send(&publisher, &receiver, 20).await;
    publisher.request("acme", &Request::access("ada@example.com").callback(&receiver.url("/x"))).await;
    world.count_reaches("in_progress", 21).await;
    for queue in ["dsr.erasure-execution", "dsr.access-compilation", "dsr.callback-delivery"] {
        eventually(queue, seconds(10), async || world.messages(queue).await > 0).await;
        world.purge(queue).await;
    }
    let _rest = Worker::several(&world, &queue_workers()[2..], SECONDS).await;
    all_is_done(&world, &receiver, 21).await;
}

#[tokio::test]
async fn connections_that_the_broker_closes_are_made_again() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let _workers = Worker::fleet(&world, SECONDS).await;
    for round in 1..=2 {
        let publisher = Publisher::connect(&world).await;
        send(&publisher, &receiver, 100).await;
        drop(publisher);
        // The management API knows of a connection only after some seconds.
        let mut closed = 0;
        eventually("connections are closed", seconds(15), async || {
            closed += world.close_connections().await;
            closed >= 4 * round
        })
        .await;
        all_is_done(&world, &receiver, i64::try_from(100 * round).unwrap()).await;
    }
}

#[tokio::test]
async fn processes_that_are_killed_at_any_point_lose_and_double_nothing() {
    const PEOPLE: i64 = 300;
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let profiles: Vec<String> = (0..PEOPLE)
        .map(|n| json!({"mpid": n, "identities": {"email": format!("p{n}@example.com")}}).to_string())
        .collect();
    world.profiles(&acme, &profiles).await;
    let batches: Vec<String> = (0..PEOPLE * 4).map(|n| json!({"mpid": n % PEOPLE}).to_string()).collect();
    world.event_batches(&acme, &batches).await;
    let receiver = Receiver::start().await;
    let mut workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    // Each round sends a share, lets it get under way, and kills one process after the other.
    for round in 0..6 {
        let share = (round * PEOPLE / 6)..((round + 1) * PEOPLE / 6);
        let requests = share.map(|n| Request::erasure(&format!("p{n}@example.com")).callback(&receiver.url("/x")));
        let all: Vec<_> = requests.map(|one| publisher.sending("acme", "request", &one)).collect();
        publisher.send_all(&all).await;
        let seen = receiver.all().len();
        eventually("something moves", seconds(20), async || receiver.all().len() > seen).await;
        let victim = usize::try_from(round).unwrap() % queue_workers().len();
        let fresh = Worker::spawn(&world, queue_workers()[victim], SECONDS);
        std::mem::replace(&mut workers[victim], fresh).kill().await;
        // The leases of the dead one last; the clock does not wait for them.
        let later = world.now().await + SignedDuration::from_secs(61);
        world.set_clock(later).await;
    }
    all_is_done(&world, &receiver, PEOPLE).await;
    let left: i64 = world.one("SELECT count(*) FROM subject_data.event_batches", &[]).await;
    assert_eq!((left, deleted_in_all(&world).await), (0, PEOPLE * 6), "every row is counted once");
    let uneven = "SELECT count(*) FROM lethe.erasure_receipts WHERE rows_deleted <> 6 OR verified_at IS NULL";
    assert_eq!(world.one::<i64>(uneven, &[]).await, 0);
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.callbacks", &[]).await, PEOPLE * 3);
}
