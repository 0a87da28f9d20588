//! Releasing due batches, one step of each in turn, so that a small batch does not wait behind a large one.

use lethe::broker::topology::CANCELLATION;
use lethe::broker::wake;
use lethe::db::batches::{self, DueBatch};
use lethe::db::release::{self, SliceLimits};
use lethe::db::slices::Stage;
use lethe::db::DbError;
use lethe::request::Lane;

use crate::schedule::Scheduler;

/// A batch that is released later than this was held up; cancellations may have been held up with it.
const LATE_SECONDS: f64 = 2.0;

/// Releases every batch whose time has come, until none is left or the process is told to stop.
pub(crate) async fn due_batches(scheduler: &mut Scheduler) -> Result<(), DbError> {
    let due = batches::to_release(&scheduler.service.db.session().await?).await?;
    let mut open: Vec<DueBatch> = Vec::new();
    for (batch, late) in due {
        if late < LATE_SECONDS || scheduler.drained.contains(&batch.batch_id) || cancellations_drained(scheduler, &batch).await {
            open.push(batch);
        }
    }
    while !open.is_empty() && !scheduler.service.shutdown.is_cancelled() {
        let mut unfinished = Vec::new();
        for batch in open {
            // Long releases outlast the lease; it is renewed on the way.
            let epoch = scheduler.leadership.epoch().await?.ok_or(DbError::LeadershipLost)?;
            if !step(scheduler, epoch, batch).await? {
                unfinished.push(batch);
            }
        }
        open = unfinished;
    }
    Ok(())
}

/// Cancellations that were sent in time may still be queued when a batch is late: they come first (contract 5).
async fn cancellations_drained(scheduler: &mut Scheduler, batch: &DueBatch) -> bool {
    match scheduler.service.publisher.depth(CANCELLATION.name).await {
        Ok(0) => {
            scheduler.drained.insert(batch.batch_id);
            true
        }
        Ok(waiting) => {
            tracing::warn!(batch = %batch.batch_id, waiting, "a late batch waits until the cancellations before it are handled");
            false
        }
        Err(error) => {
            tracing::warn!(batch = %batch.batch_id, %error, "a late batch waits: it cannot be seen whether cancellations are queued");
            false
        }
    }
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
        scheduler.drained.remove(&batch.batch_id);
    }
    Ok(step.finished)
}
