//! Releasing due batches, one step of each in turn, so that a small batch does not wait behind a large one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lethe_db::DbError;
use lethe_db::batches::{self, DueBatch};
use lethe_db::release::{self, SliceLimits};
use lethe_domain::request::{BatchId, Stage};
use lethe_process::fault;

use crate::scheduler::Scheduler;
use crate::wakes::Woken;

/// How long one round releases; then everything else has its turn.
const ROUND: Duration = Duration::from_secs(1);

/// After this many successful steps in a row a batch takes larger ones again. Not sooner: a step that is too much can
/// cost a whole statement timeout.
const GROW_AFTER: u32 = 16;

/// How many requests the next step of a batch takes, where that is fewer than usual. Remembered from round to round.
#[derive(Debug, Default)]
pub(crate) struct Sizes(HashMap<BatchId, (u32, u32)>);

impl Sizes {
    fn limits(&self, batch: BatchId) -> SliceLimits {
        let usual = SliceLimits::default();
        SliceLimits { step: self.0.get(&batch).map_or(usual.step, |(size, _)| *size), ..usual }
    }

    /// A step was too much: the next one takes half of it. `false` where there is no smaller one.
    fn shrink(&mut self, batch: BatchId) -> bool {
        let size = self.limits(batch).step;
        self.0.insert(batch, ((size / 2).max(1), 0));
        size > 1
    }

    fn went_well(&mut self, batch: BatchId) {
        let Some((size, steps)) = self.0.get_mut(&batch) else { return };
        *steps += 1;
        if *steps >= GROW_AFTER {
            (*size, *steps) = (*size * 2, 0);
            if *size >= SliceLimits::default().step {
                self.0.remove(&batch);
            }
        }
    }
}

/// What a step of a batch came to.
enum Stepped {
    /// There is more to do.
    Open,
    /// Nothing of it is left to do now.
    Done,
    /// It was too much for one statement. A smaller one is tried in the next round: others come first.
    TooMuch,
}

/// Releases batches whose time has come, for about a second; whether some of them are not finished. A batch that cannot
/// go on keeps no other waiting.
pub(crate) async fn due_batches(scheduler: &Scheduler, sizes: &mut Sizes) -> Result<bool, DbError> {
    let started = Instant::now();
    let due = batches::to_release(&scheduler.service.db.session().await?).await?;
    // A batch that is due only by a clock that is ahead is not asked about. What has to come before a batch is seen to by a
    // task of its own, which asks the broker.
    if scheduler.lead.term().is_none() {
        return Ok(false);
    }
    let mut open: Vec<DueBatch> = scheduler.markers.ready(due).into_iter().map(|one| one.batch).collect();
    sizes.0.retain(|id, _| open.iter().any(|one| one.batch_id == *id));
    let (mut failed, mut again) = (None, false);
    while !open.is_empty() && started.elapsed() < ROUND && !scheduler.service.shutdown.is_cancelled() {
        let mut unfinished = Vec::new();
        for batch in open {
            let stepped = step(scheduler, batch, sizes).await;
            // One that takes long, and many that follow each other, are not a loop that is stuck.
            scheduler.lead.progress();
            match stepped {
                Ok(Stepped::Done) => {}
                Ok(Stepped::Open) => unfinished.push(batch),
                Ok(Stepped::TooMuch) => again = true,
                Err(error @ (DbError::LeadershipLost | DbError::ClockAhead { .. })) => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        open = unfinished;
    }
    failed.map_or(Ok(again || !open.is_empty()), Err)
}

/// One step of one batch.
async fn step(scheduler: &Scheduler, batch: DueBatch, sizes: &mut Sizes) -> Result<Stepped, DbError> {
    // While the clock is doubted nothing is released.
    let Some(term) = scheduler.lead.term() else { return Ok(Stepped::Done) };
    let Scheduler { service, ready, .. } = scheduler;
    let target = (batch.batch_id, batch.lane);
    let limits = sizes.limits(batch.batch_id);
    let step = match release::step(&service.db, &ready.keys, &term, target, ready.cap, limits).await {
        Err(error) if error.is_too_much() && sizes.shrink(batch.batch_id) => {
            tracing::debug!(batch = %batch.batch_id, class = error.class(), requests = limits.step, "a step was too large for the server; the next one is smaller");
            return Ok(Stepped::TooMuch);
        }
        step => step?,
    };
    if step.passed_over {
        return Ok(Stepped::Done);
    }
    sizes.went_well(batch.batch_id);
    fault::point("release.after_commit");
    let stage = Stage::of(batch.lane);
    scheduler.wakes.send(Woken { stage, slices: step.slices, endpoints: step.endpoints });
    metrics::counter!("lethe_requests_released_total", "lane" => batch.lane.as_str()).increment(step.released as u64);
    if step.held_back > 0 {
        tracing::warn!(batch = %batch.batch_id, requests = step.held_back, "requests match too many profiles and wait for `lethe request approve`");
    }
    if step.finished {
        tracing::info!(batch = %batch.batch_id, lane = %batch.lane, "batch released");
    }
    Ok(if step.finished { Stepped::Done } else { Stepped::Open })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_step_is_remembered_shrinks_with_each_failure_and_grows_again() {
        let (mut sizes, batch, usual) = (Sizes::default(), BatchId(1), SliceLimits::default().step);
        let mut failures = 0;
        while sizes.shrink(batch) {
            failures += 1;
        }
        assert_eq!((failures, sizes.limits(batch).step, sizes.limits(BatchId(2)).step), (8, 1, usual));
        (1..GROW_AFTER).for_each(|_| sizes.went_well(batch));
        assert_eq!(sizes.limits(batch).step, 1);
        sizes.went_well(batch);
        assert_eq!(sizes.limits(batch).step, 2);
        (0..20 * GROW_AFTER).for_each(|_| sizes.went_well(batch));
        assert_eq!(sizes.limits(batch).step, usual);
        assert!(sizes.0.is_empty());
    }
}
