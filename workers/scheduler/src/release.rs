//! Releasing due batches, one step of each in turn, so that a small batch does not wait behind a large one.

use std::time::{Duration, Instant};

use lethe::db::DbError;
use lethe::db::batches::{self, DueBatch};
use lethe::db::release::{self, SliceLimits};
use lethe::db::slices::Stage;
use lethe::fault;
use lethe::request::Lane;

use crate::schedule::Scheduler;
use crate::wakes::Woken;

/// So long one round releases; then everything else has its turn.
const ROUND: Duration = Duration::from_secs(1);

/// Releases batches whose time has come, for about a second; whether some of them are not finished. A batch that cannot
/// go on keeps no other waiting.
pub(crate) async fn due_batches(scheduler: &Scheduler) -> Result<bool, DbError> {
    let started = Instant::now();
    let due = batches::to_release(&scheduler.service.db.session().await?).await?;
    // A batch that is due only by a clock that is ahead is not asked about. What has to come before a batch is seen to by a
    // task of its own, which asks the broker.
    if scheduler.lead.term().is_none() {
        return Ok(false);
    }
    let mut open: Vec<DueBatch> = scheduler.markers.ready(due).into_iter().map(|one| one.batch).collect();
    let mut failed = None;
    while !open.is_empty() && started.elapsed() < ROUND && !scheduler.service.shutdown.is_cancelled() {
        let mut unfinished = Vec::new();
        for batch in open {
            match step(scheduler, batch).await {
                Ok(true) => {}
                Ok(false) => unfinished.push(batch),
                Err(error @ (DbError::LeadershipLost | DbError::ClockAhead { .. })) => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        open = unfinished;
    }
    failed.map_or(Ok(!open.is_empty()), Err)
}

/// One step of one batch; `true` when nothing of it is left to do now.
async fn step(scheduler: &Scheduler, batch: DueBatch) -> Result<bool, DbError> {
    // While the clock is doubted nothing is released.
    let Some(term) = scheduler.lead.term() else { return Ok(true) };
    let Scheduler { service, ready, .. } = scheduler;
    let target = (batch.batch_id, batch.lane);
    let step = release::step(&service.db, &ready.keys, &term, target, ready.cap, SliceLimits::default()).await?;
    fault::point("release.after_commit");
    let stage = if batch.lane == Lane::Access { Stage::Compilation } else { Stage::Erasure };
    scheduler.wakes.send(Woken { stage, slices: step.slices, endpoints: step.endpoints });
    metrics::counter!("lethe_requests_released_total", "lane" => batch.lane.as_str()).increment(step.released as u64);
    if step.held_back > 0 {
        tracing::warn!(batch = %batch.batch_id, requests = step.held_back, "requests match too many profiles and wait for `lethe request approve`");
    }
    if step.finished {
        tracing::info!(batch = %batch.batch_id, lane = %batch.lane, "batch released");
    }
    Ok(step.finished)
}
