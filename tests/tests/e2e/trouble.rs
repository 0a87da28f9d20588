//! Servers that are away, queues that are lost, connections that are cut: everything goes on by itself (contract 12).

use lethe_tests::proxy::{Proxy, Way};
use lethe_tests::wait::{becomes, eventually, seconds};
use lethe_tests::worker::ALL;
use lethe_tests::{Publisher, Receiver, Request, SECONDS, Worker, World, seconds_with};

const LIFE: [&str; 3] = ["pending", "in_progress", "completed"];

/// Sends `count` erasures with callbacks.
async fn send(publisher: &Publisher, receiver: &Receiver, count: usize) {
    let all: Vec<_> = (0..count)
        .map(|_| publisher.sending("acme", "request", &Request::erasure("ada@example.com").callback(&receiver.url("/x"))))
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
    let mut workers: Vec<Worker> = ALL.iter().map(|name| Worker::spawn(&world, name, &settings)).collect();
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
    eventually("it is noticed", seconds(20), async || workers[1].log().matches("consuming has stopped").count() >= 2).await;
    rabbitmq.set(Way::Open);
    send(&publisher, &receiver, 50).await;
    postgresql.set(Way::Refusing);
    send(&publisher, &receiver, 50).await;
    eventually("it is noticed", seconds(20), async || workers[0].log().contains("a round of the schedule has failed")).await;
    postgresql.set(Way::Open);
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
    let _first = Worker::several(&world, &ALL[..2], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    send(&publisher, &receiver, 20).await;
    publisher.request("acme", &Request::access("ada@example.com").callback(&receiver.url("/x"))).await;
    world.count_reaches("in_progress", 21).await;
    for queue in ["dsr.erasure-execution", "dsr.access-compilation", "dsr.callback-delivery"] {
        eventually(queue, seconds(10), async || world.messages(queue).await > 0).await;
        world.purge(queue).await;
    }
    let _rest = Worker::several(&world, &ALL[2..], SECONDS).await;
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
