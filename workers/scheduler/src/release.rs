//! Releasing due batches, one step of each in turn, so that a small batch does not wait behind a large one.

use std::time::{Duration, Instant};

use lethe::broker::topology::{CANCELLATION, QueueState};
use lethe::broker::wake::{self, CancellationMarker};
use lethe::db::DbError;
use lethe::db::batches::{self, DueBatch, ToRelease};
use lethe::db::release::{self, SliceLimits};
use lethe::db::slices::Stage;
use lethe::fault;
use lethe::request::Lane;

use crate::schedule::Scheduler;

/// So long one round releases; then everything else has its turn.
const ROUND: Duration = Duration::from_secs(1);
/// A marker may be lost with its queue; then another one is sent.
const MARKER_EVERY: Duration = Duration::from_secs(10);

/// Releases batches whose time has come, for about a second; whether some of them are not finished. A batch that cannot
/// go on keeps no other waiting.
pub(crate) async fn due_batches(scheduler: &mut Scheduler) -> Result<bool, DbError> {
    let started = Instant::now();
    let due = batches::to_release(&scheduler.service.db.session().await?).await?;
    let mut open: Vec<DueBatch> = Vec::new();
    for one in due {
        if one.cancellations_handled || await_cancellations(scheduler, &one).await {
            open.push(one.batch);
        }
    }
    let mut failed = None;
    while !open.is_empty() && started.elapsed() < ROUND && !scheduler.service.shutdown.is_cancelled() {
        let mut unfinished = Vec::new();
        for batch in open {
            let epoch = scheduler.leadership.epoch().await?.ok_or(DbError::LeadershipLost)?;
            match step(scheduler, epoch, batch).await {
                Ok(true) => {}
                Ok(false) => unfinished.push(batch),
                Err(DbError::LeadershipLost) => return Err(DbError::LeadershipLost),
                Err(error) => failed = Some(error),
            }
        }
        open = unfinished;
    }
    failed.map_or(Ok(!open.is_empty()), Err)
}

/// Cancellations that were sent in time may still be queued, or in a matcher's hands: they come first, however late they
/// or the batch are. The queue is handled in order, so a marker at its end tells when. `true`: there is nothing to wait
/// for (ADR 0010).
async fn await_cancellations(scheduler: &mut Scheduler, due: &ToRelease) -> bool {
    let (publisher, batch_id) = (&scheduler.service.publisher, due.batch.batch_id);
    match publisher.queue_state(CANCELLATION.name).await {
        // Without a consumer nothing is in anybody's hands.
        Ok(QueueState { ready: 0, consumers: 0 }) => return true,
        Ok(state) => {
            let asked = scheduler.markers.get(&batch_id);
            if asked.is_some_and(|asked| asked.elapsed() < MARKER_EVERY) {
                return false;
            }
            if asked.is_some() {
                tracing::warn!(batch = %batch_id, waiting = state.ready, late_seconds = due.late_seconds, "a late batch waits until the cancellations before it are handled");
            }
            match (CancellationMarker { batch_id }).publish(publisher).await {
                Ok(()) => drop(scheduler.markers.insert(batch_id, Instant::now())),
                Err(error) => tracing::warn!(batch = %batch_id, %error, "the marker was not published; trying again"),
            }
        }
        Err(error) => {
            tracing::debug!(batch = %batch_id, %error, "a batch waits: it cannot be seen whether cancellations are queued");
        }
    }
    false
}

/// One step of one batch; `true` when nothing of it is left.
async fn step(scheduler: &mut Scheduler, epoch: i64, batch: DueBatch) -> Result<bool, DbError> {
    let Scheduler { service, ready, .. } = &*scheduler;
    let target = (batch.batch_id, batch.lane);
    let step = release::step(&service.db, &ready.keys, epoch, target, ready.cap, SliceLimits::default()).await?;
    fault::point("release.after_commit");
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
