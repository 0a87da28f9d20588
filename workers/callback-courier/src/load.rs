//! How much is in flight, and what follows from it: who has little to do answers at once, who has much works in groups.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

/// From so many deliveries in flight on, the cores have enough to do while others wait for their group.
const MUCH: usize = 128;
/// So long a group is waited for then.
const LINGER: Duration = Duration::from_millis(10);

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
        if self.most - self.permits.available_permits() >= MUCH {
            tokio::time::sleep(LINGER).await;
            while group.len() < limit
                && let Ok(next) = receiver.try_recv()
            {
                group.push(next);
            }
        }
        true
    }
}
