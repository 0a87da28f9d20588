//! Self-healing: sends wake-ups again for what is due and untouched, without storms. A queue that is deep is left
//! alone: there, due and untouched is normal. Each queue has a task of its own, since each asks the broker.
//!
//! **Invariant** (DESIGN rule 7): long waits lie in PostgreSQL; waking again backs off per row and leaves a deep queue alone.

use std::time::Duration;

use lethe_broker::topology::{self, CALLBACK_DELIVERY};
use lethe_db::slices;
use lethe_db::{DbError, endpoints};
use lethe_domain::request::Stage;
use lethe_process::fault;
use lethe_runtime::wake;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

/// A queue with more messages than this is slow, not broken.
const DEEP: u32 = 100;
/// The most items that are woken in one turn: the limit in rate.
const AT_ONCE: i64 = 500;
/// An endpoint is not woken twice within this.
const ENDPOINT_PAUSE_SECONDS: f64 = 2.0;
/// What the metrics call what is woken for endpoints; slices have the names of their stages.
const CALLBACK: &str = "callback";

/// Wakes for the slices of a stage.
pub(crate) struct Slices(pub(crate) Stage);
/// Wakes for endpoints with callbacks.
pub(crate) struct Callbacks;

impl Part for Slices {
    const EVERY: Duration = Duration::from_secs(1);

    fn name(&self) -> &'static str {
        self.0.as_str()
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let (service, stage) = (&scheduler.service, self.0);
        if may_wake(scheduler) && has_room(scheduler, topology::queue_of(stage).name).await {
            let pause = scheduler.ready.redrive_after.as_secs_f64();
            let ids = slices::to_wake(&service.db.session().await?, stage, pause, AT_ONCE).await?;
            count(stage.as_str(), ids.len());
            wake::slices(&service.publisher, stage, ids).await;
        }
        Ok(Turn::Later)
    }
}

impl Part for Callbacks {
    const EVERY: Duration = Duration::from_millis(500);

    fn name(&self) -> &'static str {
        CALLBACK
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let service = &scheduler.service;
        if may_wake(scheduler) && has_room(scheduler, CALLBACK_DELIVERY.name).await {
            let ids = endpoints::to_wake(&service.db.session().await?, ENDPOINT_PAUSE_SECONDS, AT_ONCE).await?;
            count(CALLBACK, ids.len());
            wake::endpoints(&service.publisher, ids).await;
        }
        Ok(Turn::Later)
    }
}

fn may_wake(scheduler: &Scheduler) -> bool {
    scheduler.lead.epoch().is_some() && !fault::defect("publish_lost")
}

/// Whether wake-ups can be published and would not pile up.
async fn has_room(scheduler: &Scheduler, queue: &str) -> bool {
    scheduler.service.publisher.queue_state(queue).await.is_ok_and(|state| state.ready <= DEEP)
}

fn count(stage: &'static str, items: usize) {
    if items > 0 {
        tracing::debug!(stage, items, "woken again");
        metrics::counter!("lethe_redriven_total", "stage" => stage).increment(items as u64);
    }
}
