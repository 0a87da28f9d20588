//! The loop: look what is due, do it, wait.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lethe::db::{DbError, batches, calendar, overview};
use lethe::request::{BatchId, RequestStatus, RequestType};
use lethe::service::Service;

use crate::leadership::Leadership;
use crate::options::Ready;
use crate::{expiry, redrive, release, seal};

/// How often the less urgent things are looked at.
const METRICS_EVERY: Duration = Duration::from_secs(30);
const EXPIRY_EVERY: Duration = Duration::from_secs(2);
const SEALING_EVERY: Duration = Duration::from_millis(500);

/// Everything that the parts of the scheduler share.
pub(crate) struct Scheduler {
    pub(crate) service: Service,
    pub(crate) ready: Ready,
    pub(crate) leadership: Leadership,
    /// Due batches, and when a marker was last sent for each.
    pub(crate) markers: HashMap<BatchId, Instant>,
    /// A release goes on in the next round, which begins at once.
    in_a_hurry: bool,
}

/// Schedules until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    let healthy = service.health.component("schedule");
    let leadership = Leadership::new(service.db.clone());
    let shutdown = service.shutdown.clone();
    let interval = ready.interval;
    let mut scheduler = Scheduler { service, ready, leadership, markers: HashMap::new(), in_a_hurry: false };
    let mut rounds = Rounds::default();
    while !shutdown.is_cancelled() {
        let outcome = scheduler.round(&mut rounds).await;
        if healthy.set(outcome.is_ok()) || matches!(outcome, Err(DbError::LeadershipLost)) {
            match &outcome {
                Ok(()) => tracing::info!("scheduling"),
                Err(error) => tracing::warn!(%error, "a round of the schedule has failed; trying again"),
            }
        }
        if matches!(outcome, Err(DbError::LeadershipLost)) {
            scheduler.leadership.doubt();
        }
        let pause = if std::mem::take(&mut scheduler.in_a_hurry) { Duration::ZERO } else { interval };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
    scheduler.leadership.resign().await;
    Ok(())
}

/// When the less frequent parts were last done.
#[derive(Default)]
struct Rounds {
    calendar_of: Option<i64>,
    metrics: Option<Instant>,
    expiry: Option<Instant>,
    sealing: Option<Instant>,
    redrive: redrive::Pace,
}

/// Whether `every` has passed since `last`; then `last` is now.
pub(crate) fn is_time(last: &mut Option<Instant>, every: Duration) -> bool {
    let time = last.is_none_or(|last| last.elapsed() >= every);
    if time {
        *last = Some(Instant::now());
    }
    time
}

impl Scheduler {
    async fn round(&mut self, rounds: &mut Rounds) -> Result<(), DbError> {
        let Some(epoch) = self.leadership.epoch().await? else { return Ok(()) };
        if rounds.calendar_of != Some(epoch) {
            let (version, is_new) = calendar::store(&self.service.db, epoch, &self.ready.calendar).await?;
            tracing::info!(version, is_new, "calendar in force");
            rounds.calendar_of = Some(epoch);
        }
        let session = self.service.db.session().await?;
        let due = batches::due(&session).await?;
        drop(session);
        let sealing = is_time(&mut rounds.sealing, SEALING_EVERY);
        // Each part is tried, whatever came of the others; the first failure is the one that is told.
        let parts = [
            if due.closing { self.close(epoch).await } else { Ok(()) },
            if due.release || due.closing { self.release().await } else { Ok(()) },
            if due.completion { batches::complete(&self.service.db, epoch).await.map(drop) } else { Ok(()) },
            redrive::due_work(self, &mut rounds.redrive).await,
            if is_time(&mut rounds.expiry, EXPIRY_EVERY) { expiry::due(self, epoch).await } else { Ok(()) },
            if sealing { seal::entries(&mut self.ready.sealer, &self.service.db, epoch).await } else { Ok(()) },
            if is_time(&mut rounds.metrics, METRICS_EVERY) { self.measure(epoch).await } else { Ok(()) },
        ];
        parts.into_iter().collect()
    }

    async fn close(&self, epoch: i64) -> Result<(), DbError> {
        for batch in batches::close_due(&self.service.db, epoch).await? {
            tracing::info!(batch = %batch.batch_id, lane = %batch.lane, tick = %batch.tick_at, runs = %batch.runs_at, "batch closed");
        }
        Ok(())
    }

    async fn release(&mut self) -> Result<(), DbError> {
        self.in_a_hurry = release::due_batches(self).await?;
        Ok(())
    }

    async fn measure(&self, epoch: i64) -> Result<(), DbError> {
        let session = self.service.db.session().await?;
        let overview = overview::load(&session).await?;
        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; counts stay far below 2^52")]
        let gauge = |count: i64| count as f64;
        metrics::gauge!("lethe_leader_epoch").set(gauge(epoch));
        // What has gone to nothing is not among the counts, and is told as zero.
        for kind in RequestType::ALL.iter().map(|kind| kind.as_str()) {
            for status in RequestStatus::ALL.iter().map(|status| status.as_str()) {
                let found = overview.requests.iter().find(|(one, two, _)| one == kind && two == status);
                metrics::gauge!("lethe_requests", "type" => kind, "status" => status)
                    .set(gauge(found.map_or(0, |row| row.2)));
            }
        }
        for state in ["waiting", "ready", "delivered", "exhausted"] {
            let found = overview.callbacks.iter().find(|(one, _)| one == state);
            metrics::gauge!("lethe_callbacks", "state" => state).set(gauge(found.map_or(0, |row| row.1)));
        }
        for (stage, seconds) in overview.oldest_seconds {
            metrics::gauge!("lethe_oldest_ready_seconds", "stage" => stage).set(seconds);
        }
        Ok(())
    }
}
