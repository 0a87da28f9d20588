//! Self-healing: what is due and untouched is woken again, and a queue that is merely slow is left alone.

use lethe_broker::{Broker, Outgoing};
use lethe_testing::wait::{becomes, eventually, seconds, stays};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Publisher, Receiver, Request, Worker, World, seconds_with};

/// The sum of a counter over its labels.
async fn counted(worker: &Worker, name: &str) -> f64 {
    let metrics = worker.get("/metrics").await.map(|(_, text)| text).unwrap_or_default();
    let values = metrics.lines().filter(|line| line.starts_with(name));
    values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Sends this many accesses, each of which becomes a slice of its own.
async fn accesses(publisher: &Publisher, count: usize) {
    let all: Vec<_> = (0..count)
        .map(|n| publisher.sending("acme", "request", &Request::access(&format!("p{n}@example.com"))))
        .collect();
    publisher.send_all(&all).await;
}

#[tokio::test]
async fn behind_a_deep_queue_nothing_is_multiplied_and_a_lost_queue_is_filled_once() {
    /// More than the hundred at which a queue counts as deep.
    const MANY: u64 = 150;
    let world = World::new().await;
    world.controller("acme").await;
    // Everything is due for driving again at once, and again and again.
    let settings = seconds_with(&[("LETHE_REDRIVE_AFTER", "10ms")]);
    let workers = Worker::several(&world, &["scheduler", "identity-matcher"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    accesses(&publisher, 150).await;
    world.count_reaches("in_progress", 150).await;
    let waiting = async || world.messages("dsr.access-compilation").await;
    eventually("each has its wake-up", seconds(20), async || waiting().await >= MANY).await;
    let before = waiting().await;
    let driven = counted(&workers[0], "lethe_redriven_total").await;
    // Some may have been driven while the queue filled; from now on it is slow, and that is all.
    stays("nothing is multiplied", seconds(5), async || waiting().await == before).await;
    assert_eq!(counted(&workers[0], "lethe_redriven_total").await.to_bits(), driven.to_bits());
    // Lost as a whole: each is woken once, and then the queue is deep again.
    world.purge("dsr.access-compilation").await;
    becomes("each is woken once", seconds(20), MANY, waiting).await;
    stays("and no more", seconds(5), async || waiting().await == MANY).await;
    assert_eq!(counted(&workers[0], "lethe_redriven_total").await.to_bits(), (driven + 150.0).to_bits());
}

#[tokio::test]
#[ignore = "takes RabbitMQ minutes on a busy machine: `make chaos` runs it; the one above does the same with 150"]
async fn behind_a_queue_of_200_000_nothing_is_multiplied() {
    const DEPTH: u64 = 200_000;
    const DUE: i64 = 50;
    let world = World::new().await;
    world.controller("acme").await;
    let settings = seconds_with(&[("LETHE_REDRIVE_AFTER", "10ms")]);
    let mut workers = Worker::several(&world, &["scheduler", "identity-matcher"], &settings).await;
    let broker = Broker::new(&world.amqp_url, "lethe-testing").unwrap();
    let backlog = lethe_broker::Publisher::new(broker);
    // Wake-ups of slices that others have done meanwhile.
    let done: Vec<_> = (0..1_000)
        .map(|n| {
            Outgoing::to_queue("dsr.access-compilation", format!(r#"{{"slice_id":{}}}"#, 1_000_000 + n).into_bytes())
        })
        .collect();
    let waiting = async || world.messages("dsr.access-compilation").await;
    while waiting().await < DEPTH {
        // A broker that is slow to confirm has them all the same, or the next round makes up for it.
        let _ = backlog.publish(&done).await;
    }
    let publisher = Publisher::connect(&world).await;
    accesses(&publisher, usize::try_from(DUE).unwrap()).await;
    world.count_reaches("in_progress", DUE).await;
    // A slow consumer: it takes some, and more than are due are left.
    let all = waiting().await;
    workers.push(Worker::start(&world, "access-compiler", &settings).await);
    eventually("some are consumed", seconds(20), async || waiting().await < all - 300).await;
    let mut before = all;
    stays("nothing is multiplied", seconds(5), async || {
        let now = waiting().await;
        let shrinks = now <= before;
        before = now;
        shrinks && now > 100
    })
    .await;
    assert!(counted(&workers[0], "lethe_redriven_total").await < 0.5, "nothing was woken again");
}

#[tokio::test]
async fn a_shallow_queue_that_nobody_empties_grows_slower_and_slower() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = seconds_with(&[("LETHE_REDRIVE_AFTER", "1s")]);
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &settings).await;
    let publisher = Publisher::connect(&world).await;
    accesses(&publisher, 5).await;
    world.count_reaches("in_progress", 5).await;
    // The pause doubles with each time: after 1, 2 and 4 seconds. Eight seconds make three times and not eight.
    eventually("it is woken again three times", seconds(30), async || {
        world.one::<i64>("SELECT min(nudges)::bigint FROM lethe.slices", &[]).await >= 3
    })
    .await;
    let spread: f64 =
        world.one("SELECT extract(epoch FROM max(last_nudged_at - created_at))::float8 FROM lethe.slices", &[]).await;
    assert!(spread >= 7.0, "three times within {spread} s");
    assert!(world.messages("dsr.access-compilation").await <= 5 * 5);
}

#[tokio::test]
async fn a_start_with_empty_queues_brings_everything_to_its_end() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let receiver = Receiver::start().await;
    let settings = seconds_with(&[("LETHE_ERASURE_WAITING_PERIOD", "2s")]);
    let first = Worker::several(&world, &queue_workers()[..2], &settings).await;
    let publisher = Publisher::connect(&world).await;
    for n in 0..10 {
        publisher.request("acme", &Request::erasure("ada@example.com").callback(&receiver.url("/x"))).await;
        publisher.request("acme", &Request::access(&format!("p{n}@example.com")).callback(&receiver.url("/x"))).await;
    }
    world.count_reaches("in_progress", 20).await;
    for worker in first {
        worker.stop().await;
    }
    // RabbitMQ comes back with nothing at all: no message, no queue, no exchange.
    world.management.delete_vhost(&world.name).await;
    world.management.create_vhost(&world.name).await;
    let workers = Worker::fleet(&world, &settings).await;
    world.count_reaches("completed", 20).await;
    becomes("callbacks that are not delivered", seconds(60), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.callbacks WHERE state <> 'delivered'", &[]).await
    })
    .await;
    let scheduler = &workers[queue_workers().iter().position(|name| *name == "scheduler").unwrap()];
    assert!(counted(scheduler, "lethe_redriven_total").await >= 11.0, "what is woken again is counted");
}
