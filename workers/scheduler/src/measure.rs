//! What the leader reports: totals, the oldest work of each stage, and what a restore has lost.

use std::time::Duration;

use lethe_db::{DbError, batches, overview};
use lethe_domain::request::{CallbackState, RequestStatus, RequestType};

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

const FOLDED_AT_ONCE: i64 = 10_000;

/// Folds differences into totals.
pub(crate) struct Totals;
/// Sets the gauges.
pub(crate) struct Gauges;
/// Looks for requests that nothing will ever release.
pub(crate) struct Lost;

impl Part for Totals {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "totals"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(epoch) = scheduler.lead.epoch() else { return Ok(Turn::Later) };
        let folded = overview::fold(&scheduler.service.db, epoch, FOLDED_AT_ONCE).await?;
        Ok(Turn::at_once_if(folded == FOLDED_AT_ONCE))
    }
}

impl Part for Gauges {
    const EVERY: Duration = Duration::from_secs(30);

    fn name(&self) -> &'static str {
        "gauges"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let overview = overview::measure(&scheduler.service.db).await?;
        // What has gone to nothing is not among the totals, and is told as zero.
        for kind in RequestType::ALL {
            for status in RequestStatus::ALL {
                let found = overview.requests.iter().find(|(one, two, _)| one == kind && two == status);
                metrics::gauge!("lethe_requests", "type" => kind.as_str(), "status" => status.as_str())
                    .set(gauge(found.map_or(0, |row| row.2)));
            }
        }
        for state in CallbackState::ALL {
            let found = overview.callbacks.iter().find(|(one, _)| one == state);
            metrics::gauge!("lethe_callbacks", "state" => state.as_str()).set(gauge(found.map_or(0, |row| row.1)));
        }
        for (stage, seconds) in overview.oldest_seconds {
            metrics::gauge!("lethe_oldest_ready_seconds", "stage" => stage).set(seconds);
        }
        metrics::gauge!("lethe_lost_endpoints").set(gauge(overview.lost_endpoints));
        Ok(Turn::Later)
    }
}

impl Part for Lost {
    const EVERY: Duration = Duration::from_secs(30);

    fn name(&self) -> &'static str {
        "lost_batches"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let lost = batches::without_batch(&scheduler.service.db.session().await?).await?;
        let requests = lost.iter().map(|(_, requests)| requests).sum();
        metrics::gauge!("lethe_requests_without_batch").set(gauge(requests));
        for (batch, requests) in lost {
            tracing::error!(%batch, requests, "pending requests name a batch that does not exist: nothing closes or releases them (docs/operate/runbook.md)");
        }
        Ok(Turn::Later)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a gauge is a float; counts stay far below 2^52")]
const fn gauge(count: i64) -> f64 {
    count as f64
}
