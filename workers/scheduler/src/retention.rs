//! What ends by itself: the personal data of requests that ended a while ago, records of requests that ended years ago,
//! remembered cancellations, counts of failures. Each has a task of its own, and each goes in bounded steps.

use std::time::Duration;

use lethe_db::purge::{self, Retention};
use lethe_db::{DbError, message_failures, records, requests};

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

/// Requests of a step of the purge: each that was cancelled takes its profiles with it, up to the cap and beyond.
const PURGED_AT_ONCE: i64 = 500;
/// Requests whose records go in one step, each with its callbacks and their attempts.
const REMOVED_AT_ONCE: i64 = 200;
/// Intake waits while cancellations are forgotten.
const FORGOTTEN_AT_ONCE: i64 = 500;
/// A message lives for 14 days (contract 3).
const MESSAGES_LIVE: Duration = Duration::from_hours(15 * 24);

/// Whether a turn has forgotten as much as one may, so that there may be more.
fn is_full(forgotten: u64) -> bool {
    i64::try_from(forgotten).is_ok_and(|forgotten| forgotten >= FORGOTTEN_AT_ONCE)
}

/// Purges requests that ended longer ago than the retention.
#[derive(Default)]
pub(crate) struct Purge(purge::Walk);
/// Removes the records of requests that ended longer ago than theirs.
#[derive(Default)]
pub(crate) struct Records(records::Walk);
/// Forgets cancellations whose request never came.
pub(crate) struct Cancellations;
/// Forgets messages that cannot be queued any more.
pub(crate) struct MessageFailures;

impl Part for Purge {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "purge"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let ready = &scheduler.ready;
        let retention = Retention { after_end: ready.retention, for_callbacks: ready.give_up };
        let purged = self.0.step(&scheduler.service.db, &term, retention, PURGED_AT_ONCE).await?;
        if purged.requests > 0 {
            tracing::info!(requests = purged.requests, "the personal data of ended requests was purged");
            metrics::counter!("lethe_requests_purged_total").increment(purged.requests as u64);
        }
        if purged.moved > 0 {
            tracing::info!(
                requests = purged.moved,
                "details are kept for longer: their requests have not ended long enough ago"
            );
        }
        if purged.exhausted > 0 {
            tracing::warn!(
                callbacks = purged.exhausted,
                "gave up on callbacks: the retention of their requests is over"
            );
            metrics::counter!("lethe_callbacks_given_up_total", "reason" => "retention").increment(purged.exhausted);
        }
        Ok(Turn::at_once_if(purged.more))
    }
}

impl Part for Records {
    const EVERY: Duration = Duration::from_secs(10);

    fn name(&self) -> &'static str {
        "records"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let retention = scheduler.ready.record_retention;
        let removed = self.0.step(&scheduler.service.db, &term, retention, REMOVED_AT_ONCE).await?;
        if removed.requests > 0 {
            tracing::info!(requests = removed.requests, "the records of requests that ended long ago were removed");
            metrics::counter!("lethe_requests_removed_total").increment(removed.requests as u64);
        }
        Ok(Turn::at_once_if(removed.more))
    }
}

impl Part for Cancellations {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "early_cancellations"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let forgotten = requests::forget_cancellations(&scheduler.service.db, &term, FORGOTTEN_AT_ONCE).await?;
        if forgotten > 0 {
            tracing::info!(cancellations = forgotten, "remembered cancellations expired; their requests never came");
        }
        Ok(Turn::soon_if(is_full(forgotten)))
    }
}

impl Part for MessageFailures {
    const EVERY: Duration = Duration::from_secs(10);

    fn name(&self) -> &'static str {
        "message_failures"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let db = &scheduler.service.db;
        let forgotten = message_failures::forget_old(db, &term, MESSAGES_LIVE, FORGOTTEN_AT_ONCE).await?;
        Ok(Turn::soon_if(is_full(forgotten)))
    }
}
