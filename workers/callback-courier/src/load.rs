//! How much is in flight, and what follows from it: with little to do we act at once, with much we work in groups.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// From so many deliveries in flight on, the cores have enough to do while others wait for their group. Half of what one
/// controller may have, so that it counts as much where only one has something to deliver.
const MUCH: usize = 64;
/// How long a group is waited for then.
const LINGER: Duration = Duration::from_millis(10);
/// How long, at most, an endpoint waits for more of its places to come free.
const PLACES: Duration = Duration::from_millis(100);

/// The deliveries in flight in this process.
#[derive(Clone)]
pub(crate) struct Load {
    permits: Arc<Semaphore>,
    most: usize,
}

impl Load {
    /// Of deliveries that hold one of these permits each, none of which has been given yet.
    pub(crate) fn new(permits: Arc<Semaphore>) -> Self {
        let most = permits.available_permits();
        Self { permits, most }
    }

    /// Receives what is there, at least one, and under load what comes within a moment as well; at most `limit`. `false`
    /// once nothing can come any more.
    pub(crate) async fn gather<T>(&self, receiver: &mut mpsc::Receiver<T>, group: &mut Vec<T>, limit: usize) -> bool {
        if receiver.recv_many(group, limit).await == 0 {
            return false;
        }
        if self.is_much() {
            tokio::time::sleep(LINGER).await;
            while group.len() < limit
                && let Ok(next) = receiver.try_recv()
            {
                group.push(next);
            }
        }
        true
    }

    /// Under load, waits until half of `limit` places are free: a claim costs an endpoint as much for one callback as for
    /// four. Not for long, so that deliveries that hang hold their own places only.
    pub(crate) async fn places(&self, limit: usize, in_flight: &mut JoinSet<()>) {
        let half = async {
            while self.is_much() && in_flight.len() > limit / 2 {
                in_flight.join_next().await;
            }
        };
        let _ = tokio::time::timeout(PLACES, half).await;
    }

    fn is_much(&self) -> bool {
        self.most - self.permits.available_permits() >= MUCH
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::sync::OwnedSemaphorePermit;

    use super::*;

    /// A load of so many deliveries in flight, and their permits.
    fn load(in_flight: usize) -> (Load, Vec<OwnedSemaphorePermit>) {
        let permits = Arc::new(Semaphore::new(2 * MUCH));
        let load = Load::new(permits.clone());
        (load, (0..in_flight).map(|_| permits.clone().try_acquire_owned().unwrap()).collect())
    }

    #[tokio::test]
    async fn only_who_has_much_in_flight_waits_for_a_group() {
        for (in_flight, at_once) in [(0, Some(true)), (MUCH - 1, Some(true)), (MUCH, None), (2 * MUCH, None)] {
            let (load, _permits) = load(in_flight);
            let (sender, mut receiver) = mpsc::channel(8);
            sender.send(()).await.unwrap();
            let mut group = Vec::new();
            assert_eq!(load.gather(&mut receiver, &mut group, 8).now_or_never(), at_once, "{in_flight} in flight");
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_group_takes_what_comes_meanwhile() {
        let (load, _permits) = load(MUCH);
        let (sender, mut receiver) = mpsc::channel(8);
        sender.send(1).await.unwrap();
        let mut group = Vec::new();
        let (more, sent) = tokio::join!(load.gather(&mut receiver, &mut group, 8), sender.send(2));
        sent.unwrap();
        assert!(more);
        assert_eq!(group, [1, 2]);
    }

    #[tokio::test]
    async fn deliveries_that_hang_hold_up_the_other_places_for_a_moment_only() {
        for (in_flight, hanging, at_once) in [(0, 8, Some(())), (MUCH, 4, Some(())), (MUCH, 5, None)] {
            let (load, _permits) = load(in_flight);
            let mut set = JoinSet::new();
            (0..hanging).for_each(|_| drop(set.spawn(std::future::pending())));
            let label = format!("{hanging} of 8 hang, {in_flight} in flight");
            assert_eq!(load.places(8, &mut set).now_or_never(), at_once, "{label}");
            load.places(8, &mut set).await;
            assert_eq!(set.len(), hanging, "{label}");
        }
    }
}
