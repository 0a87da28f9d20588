//! What has to come before a release: cancellations that were sent in time may still be queued, or in a matcher's hands. They
//! come first, however late they or the batch are. The queue is handled in order, so a marker at its end tells when (ADR
//! 0010). The broker is asked here and not in the loop: one that does not answer holds up only batches that wait for it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lethe::broker::topology::{CANCELLATION, QueueState};
use lethe::broker::wake::CancellationMarker;
use lethe::db::DbError;
use lethe::db::batches::{self, ToRelease};
use lethe::request::BatchId;

use crate::parts::{Part, Turn};
use crate::schedule::Scheduler;

/// A marker may be lost with its queue; then another one is sent.
const MARKER_EVERY: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
enum Marker {
    /// It was put at the end of the queue.
    Sent(Instant),
    /// Nothing was queued, and nobody had anything in hand.
    NotNeeded,
}

/// Due batches, and what is known of the cancellations before them.
#[derive(Debug, Default)]
pub(crate) struct Markers(Mutex<HashMap<BatchId, Marker>>);

impl Markers {
    fn with<T>(&self, read: impl FnOnce(&mut HashMap<BatchId, Marker>) -> T) -> T {
        read(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nothing was queued after this batch had become due.
    pub(crate) fn none_needed(&self, batch: BatchId) -> bool {
        self.with(|markers| matches!(markers.get(&batch), Some(Marker::NotNeeded)))
    }

    /// The batch is released.
    pub(crate) fn forget(&self, batch: BatchId) {
        self.with(|markers| markers.remove(&batch));
    }
}

/// Asks the broker about the cancellations before due batches.
pub(crate) struct Await;

impl Part for Await {
    const NAME: &'static str = "cancellations";
    const EVERY: Duration = Duration::from_millis(100);

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        // A batch that is due only by a clock that is ahead is not asked about.
        if scheduler.lead.term().is_none() {
            return Ok(Turn::Later);
        }
        let due = batches::to_release(&scheduler.service.db.session().await?).await?;
        scheduler.markers.with(|markers| markers.retain(|id, _| due.iter().any(|one| one.batch.batch_id == *id)));
        for one in due.iter().filter(|one| !one.cancellations_handled) {
            if !scheduler.markers.none_needed(one.batch.batch_id) {
                ask(scheduler, one).await;
            }
        }
        Ok(Turn::Later)
    }
}

async fn ask(scheduler: &Scheduler, due: &ToRelease) {
    let (publisher, batch_id) = (&scheduler.service.publisher, due.batch.batch_id);
    let state = match publisher.queue_state(CANCELLATION.name).await {
        Ok(state) => state,
        Err(error) => {
            tracing::debug!(batch = %batch_id, %error, "a batch waits: it cannot be seen whether cancellations are queued");
            return;
        }
    };
    let remember = |marker| scheduler.markers.with(|markers| markers.insert(batch_id, marker));
    // Without a consumer nobody has anything in hand.
    if state == (QueueState { ready: 0, consumers: 0 }) {
        remember(Marker::NotNeeded);
        return;
    }
    let sent = scheduler.markers.with(|markers| markers.get(&batch_id).copied());
    if let Some(Marker::Sent(at)) = sent {
        if at.elapsed() < MARKER_EVERY {
            return;
        }
        tracing::warn!(batch = %batch_id, waiting = state.ready, late_seconds = due.late_seconds, "a late batch waits until the cancellations before it are handled");
    }
    match (CancellationMarker { batch_id }).publish(publisher).await {
        Ok(()) => drop(remember(Marker::Sent(Instant::now()))),
        Err(error) => tracing::warn!(batch = %batch_id, %error, "the marker was not published; trying again"),
    }
}
