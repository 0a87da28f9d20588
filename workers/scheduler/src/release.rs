//! Releasing due batches, one step of each in turn, so that a small batch does not wait behind a large one.

use std::time::{Duration, Instant};

use lethe::broker::topology::{CANCELLATION, QueueState};
use lethe::broker::wake::{self, CancellationMarker};
use lethe::db::DbError;
use lethe::db::batches::{self, DueBatch};
use lethe::db::release::{self, SliceLimits};
use lethe::db::slices::Stage;
use lethe::request::{BatchId, Lane};

use crate::schedule::Scheduler;

/// A batch that is released later than this was held up; cancellations may have been held up with it.
const LATE_SECONDS: f64 = 2.0;
/// A marker may be lost with its queue; then another one is sent.
const MARKER_EVERY: Duration = Duration::from_secs(10);

/// Releases every batch whose time has come, until none is left or the process is told to stop. A batch that cannot go
/// on keeps no other waiting.
pub(crate) async fn due_batches(scheduler: &mut Scheduler) -> Result<(), DbError> {
    let due = batches::to_release(&scheduler.service.db.session().await?).await?;
    let mut open: Vec<DueBatch> = Vec::new();
    for one in due {
        if one.late_seconds < LATE_SECONDS
            || one.cancellations_handled
            || await_cancellations(scheduler, one.batch.batch_id).await
        {
            open.push(one.batch);
        }
    }
    let mut failed = Ok(());
    while !open.is_empty() && !scheduler.service.shutdown.is_cancelled() {
        let mut unfinished = Vec::new();
        for batch in open {
            // Long releases outlast the lease; it is renewed on the way.
            let epoch = scheduler.leadership.epoch().await?.ok_or(DbError::LeadershipLost)?;
            match step(scheduler, epoch, batch).await {
                Ok(true) => {}
                Ok(false) => unfinished.push(batch),
                Err(DbError::LeadershipLost) => return Err(DbError::LeadershipLost),
                Err(error) => failed = Err(error),
            }
        }
        open = unfinished;
    }
    failed
}

/// Cancellations that were sent in time may still be queued, or in a matcher's hands, when a batch is late: they come
/// first (contract 5). The queue is handled in order, so a marker at its end tells when. `true`: there is nothing to
/// wait for.
async fn await_cancellations(scheduler: &mut Scheduler, batch_id: BatchId) -> bool {
    let publisher = &scheduler.service.publisher;
    match publisher.queue_state(CANCELLATION.name).await {
        // Without a consumer nothing is in anybody's hands.
        Ok(QueueState { ready: 0, consumers: 0 }) => return true,
        Ok(state) => {
            let asked = scheduler.markers.get(&batch_id);
            if asked.is_some_and(|asked| asked.elapsed() < MARKER_EVERY) {
                return false;
            }
            tracing::warn!(batch = %batch_id, waiting = state.ready, "a late batch waits until the cancellations before it are handled");
            if let Err(error) = (CancellationMarker { batch_id }).publish(publisher).await {
                tracing::warn!(batch = %batch_id, %error, "the marker was not published; trying again");
                return false;
            }
            scheduler.markers.insert(batch_id, Instant::now());
        }
        Err(error) => {
            tracing::debug!(batch = %batch_id, %error, "a late batch waits: it cannot be seen whether cancellations are queued");
        }
    }
    false
}

/// One step of one batch; `true` when nothing of it is left.
async fn step(scheduler: &mut Scheduler, epoch: i64, batch: DueBatch) -> Result<bool, DbError> {
    let Scheduler { service, ready, .. } = &*scheduler;
    let target = (batch.batch_id, batch.lane);
    let step = release::step(&service.db, &ready.keys, epoch, target, ready.cap, SliceLimits::default()).await?;
    let stage = if batch.lane == Lane::Access { Stage::Compilation } else { Stage::Erasure };
    wake::slices(&service.publisher, stage, step.slices).await;
    wake::endpoints(&service.publisher, step.endpoints).await;
    metrics::counter!("lethe_requests_released_total", "lane" => batch.lane.as_str()).increment(step.released as u64);
    if step.held_back > 0 {
        tracing::warn!(batch = %batch.batch_id, requests = step.held_back, "requests match too many profiles and wait for `lethe request approve`");
    }
    if step.finished {
        tracing::info!(batch = %batch.batch_id, lane = %batch.lane, "batch released");
        scheduler.markers.remove(&batch.batch_id);
    }
    Ok(step.finished)
}
