//! What has to come before a release: cancellations that were sent in time may still be queued, or held by a matcher. They
//! come first, however late they or the batch are. The queue is handled in order, so a marker at its end tells when (ADR
//! 0010). The broker is asked here and not in the loop: one that does not answer holds up only batches that wait for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lethe_broker::topology::{CANCELLATION, QueueState};
use lethe_db::batches::ToRelease;
use lethe_runtime::wake::CancellationMarker;

use crate::markers::Marker;
use crate::scheduler::Scheduler;

/// A marker may be lost with its queue; then another one is sent.
const MARKER_EVERY: Duration = Duration::from_secs(10);

/// Asks the broker about the cancellations before due batches, until the service is told to stop.
pub(crate) async fn watch(scheduler: Arc<Scheduler>) {
    let markers = &scheduler.markers;
    loop {
        tokio::select! {
            () = markers.asked() => {}
            () = scheduler.service.shutdown.cancelled() => return,
        }
        let wanted = markers.wanted();
        for one in wanted {
            tokio::select! {
                () = ask(&scheduler, &one) => {}
                () = scheduler.service.shutdown.cancelled() => return,
            }
        }
    }
}

async fn ask(scheduler: &Scheduler, due: &ToRelease) {
    let (publisher, batch_id) = (&scheduler.service.publisher, due.batch.batch_id);
    let state = match publisher.queue_state(CANCELLATION.name).await {
        Ok(state) => state,
        Err(error) => {
            tracing::debug!(batch = %batch_id, %error, "a batch waits: cannot tell whether cancellations are queued");
            return;
        }
    };
    let remember = |marker| scheduler.markers.with(|markers| markers.insert(batch_id, marker));
    // Without a consumer nobody has anything in hand.
    if state == (QueueState { ready: 0, consumers: 0 }) {
        remember(Marker::NotNeeded);
        scheduler.hurry.notify_one();
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
        Err(error) => tracing::warn!(batch = %batch_id, %error, "the marker could not be published; trying again"),
    }
}
