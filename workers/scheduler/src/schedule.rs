//! The loop: look for what is due, do it, wait. It does database work that an index serves, and nothing else. Whatever
//! waits for somebody else, or may take long, is a part with a task of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lethe_audit::Sealer;
use lethe_db::{DbError, batches, calendar};
use lethe_domain::request::Stage;
use lethe_runtime::service::Service;
use tokio::sync::Notify;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::lead::Lead;
use crate::markers::Markers;
use crate::options::Ready;
use crate::scheduler::Scheduler;
use crate::{cancellations, expiry, keys, measure, overdue, parts, put_off, release, retention, seal, wakes};

/// Why the schedule ended before its time.
#[derive(Debug, thiserror::Error)]
#[error("a part of the scheduler ended unexpectedly: the process exits and must be started again")]
pub(crate) struct PartEnded {
    #[source]
    panic: Option<JoinError>,
}

/// Schedules until the service is told to stop. A part that ends before takes the process with it: nobody else would do its
/// work, and without the keeper of the lead nobody leads.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), PartEnded> {
    let lead = Lead::new(ready.clock_absence);
    let mut tasks = JoinSet::new();
    let (wakes, to_wake) = wakes::channel();
    let interval = ready.interval;
    let done = CancellationToken::new();
    let mut keeping = tokio::spawn(lead.clone().keep(service.clone(), interval, done.clone()));
    tasks.spawn(wakes::publish(service.publisher.clone(), to_wake, service.shutdown.clone()));
    let sealer = seal::Seal(Sealer::new(ready.signatory.clone()));
    let scheduler =
        Arc::new(Scheduler { service, ready, lead, markers: Markers::default(), wakes, hurry: Notify::new() });
    tasks.spawn(cancellations::watch(scheduler.clone()));
    for &stage in Stage::ALL {
        tasks.spawn(parts::run(scheduler.clone(), overdue::Slices(stage)));
    }
    tasks.spawn(parts::run(scheduler.clone(), overdue::Callbacks));
    tasks.spawn(parts::run(scheduler.clone(), expiry::Links));
    tasks.spawn(parts::run(scheduler.clone(), expiry::Objects));
    tasks.spawn(parts::run(scheduler.clone(), keys::Days::new(&scheduler.service)));
    tasks.spawn(parts::run(scheduler.clone(), retention::Purge::default()));
    tasks.spawn(parts::run(scheduler.clone(), retention::Records::default()));
    tasks.spawn(parts::run(scheduler.clone(), retention::Cancellations));
    tasks.spawn(parts::run(scheduler.clone(), retention::MessageFailures));
    tasks.spawn(parts::run(scheduler.clone(), put_off::PutOff));
    tasks.spawn(parts::run(scheduler.clone(), sealer));
    tasks.spawn(parts::run(scheduler.clone(), measure::Totals));
    tasks.spawn(parts::run(scheduler.clone(), measure::Gauges));
    tasks.spawn(parts::run(scheduler.clone(), measure::Lost));
    watched(rounds(&scheduler), &mut tasks, &mut keeping, &scheduler.service.shutdown).await?;
    // The lead goes last: what was under way is done in its term.
    done.cancel();
    let _ = keeping.await;
    Ok(())
}

/// Runs the rounds, and then waits for the parts; ends at once where a part, or the keeper of the lead, ends early.
async fn watched(
    rounds: impl Future<Output = ()>,
    tasks: &mut JoinSet<()>,
    keeping: &mut JoinHandle<()>,
    shutdown: &CancellationToken,
) -> Result<(), PartEnded> {
    tokio::pin!(rounds);
    let mut in_rounds = true;
    while in_rounds || !tasks.is_empty() {
        tokio::select! {
            () = &mut rounds, if in_rounds => in_rounds = false,
            Some(part) = tasks.join_next() => match part {
                // Told to stop, each ends when it is ready.
                Ok(()) if shutdown.is_cancelled() => {}
                ended => return Err(PartEnded { panic: ended.err() }),
            },
            keeper = &mut *keeping => return Err(PartEnded { panic: keeper.err() }),
        }
    }
    Ok(())
}

/// One round after the other.
async fn rounds(scheduler: &Scheduler) {
    let healthy = scheduler.service.health.component("schedule");
    let shutdown = &scheduler.service.shutdown;
    let (mut calendar_of, mut sizes) = (None, release::Sizes::default());
    // Not ready before it is known who leads, and the leader not before its calendar is in force.
    tokio::select! {
        () = scheduler.lead.known() => {}
        () = shutdown.cancelled() => {}
    }
    while !shutdown.is_cancelled() {
        let started = Instant::now();
        let outcome = round(scheduler, &mut calendar_of, &mut sizes).await;
        scheduler.lead.progress();
        if let Ok(Some(_)) = outcome {
            metrics::histogram!("lethe_schedule_round_seconds").record(started.elapsed().as_secs_f64());
        }
        if healthy.set(outcome.is_ok()) || matches!(outcome, Err(DbError::LeadershipLost)) {
            match &outcome {
                Ok(_) => tracing::info!("scheduling"),
                Err(error) => tracing::warn!(%error, "a round of the schedule has failed; trying again"),
            }
        }
        if let Err(error) = &outcome {
            scheduler.lead.doubt(error);
        }
        let pause = if matches!(outcome, Ok(Some(true))) { Duration::ZERO } else { scheduler.ready.interval };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = scheduler.hurry.notified() => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// A round while we lead: whether a release goes on at once. `None` while another one leads.
async fn round(
    scheduler: &Scheduler,
    calendar_of: &mut Option<i64>,
    sizes: &mut release::Sizes,
) -> Result<Option<bool>, DbError> {
    let db = &scheduler.service.db;
    let Some(epoch) = scheduler.lead.epoch() else { return Ok(None) };
    if *calendar_of != Some(epoch) {
        let (version, is_new) =
            calendar::store(db, epoch, &scheduler.ready.calendar, scheduler.ready.details_span).await?;
        tracing::info!(version, is_new, "calendar in force");
        *calendar_of = Some(epoch);
    }
    let due = batches::due(&db.session().await?).await?;
    // Each part is tried, whatever came of the others; the first failure is the one that is told.
    let closed = if due.closing { close(scheduler).await } else { Ok(()) };
    let released = if due.release || due.closing { release::due_batches(scheduler, sizes).await } else { Ok(false) };
    let completed = if due.completion { batches::complete(db, epoch).await.map(drop) } else { Ok(()) };
    closed?;
    let in_a_hurry = released?;
    completed?;
    Ok(Some(in_a_hurry))
}

async fn close(scheduler: &Scheduler) -> Result<(), DbError> {
    let Some(term) = scheduler.lead.term() else { return Ok(()) };
    for batch in batches::close_due(&scheduler.service.db, &term).await? {
        tracing::info!(batch = %batch.batch_id, lane = %batch.lane, tick = %batch.tick_at, runs = %batch.runs_at, "batch closed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn outcome(
        part: impl Future<Output = ()> + Send + 'static,
        keeper: impl Future<Output = ()> + Send + 'static,
        told_to_stop: bool,
    ) -> Result<(), PartEnded> {
        let (mut tasks, mut keeping, shutdown) = (JoinSet::new(), tokio::spawn(keeper), CancellationToken::new());
        if told_to_stop {
            shutdown.cancel();
        }
        tasks.spawn(part);
        watched(shutdown.cancelled(), &mut tasks, &mut keeping, &shutdown).await
    }

    #[tokio::test]
    async fn a_part_or_a_keeper_that_ends_early_ends_the_schedule() {
        let forever = std::future::pending::<()>;
        assert!(outcome(async { panic!("a part") }, forever(), false).await.is_err_and(|ended| ended.panic.is_some()));
        assert!(outcome(async {}, forever(), false).await.is_err_and(|ended| ended.panic.is_none()));
        assert!(outcome(forever(), async { panic!("the keeper") }, false).await.is_err());
        assert!(outcome(async {}, forever(), true).await.is_ok(), "told to stop, a part may end");
        assert!(outcome(async { panic!("a part") }, forever(), true).await.is_err(), "but not like this");
    }
}
