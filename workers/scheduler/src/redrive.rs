//! Self-healing: what is due and untouched is driven again, without storms (DESIGN rule 7). A stage whose queue is deep
//! is left alone: there, due and untouched is normal. Each stage has a turn of its own, since each asks the broker.

use std::time::Duration;

use lethe_broker::topology::CALLBACK_DELIVERY;
use lethe_db::slices::{self, Stage};
use lethe_db::{DbError, endpoints};
use lethe_process::fault;
use lethe_runtime::wake;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

/// A queue with more messages than this is slow, not broken.
const DEEP: u32 = 100;
/// Items that are driven again at once, at most: the limit in rate.
const AT_ONCE: i64 = 500;
/// An endpoint is not woken twice within this.
const ENDPOINT_PAUSE_SECONDS: f64 = 2.0;

/// Drives slices of erasures again.
pub(crate) struct Erasures;
/// Drives compilations again.
pub(crate) struct Compilations;
/// Drives endpoints with due callbacks again.
pub(crate) struct Callbacks;

impl Part for Erasures {
    const NAME: &'static str = "redrive_erasures";
    const EVERY: Duration = Duration::from_secs(1);

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        drive_slices(scheduler, Stage::Erasure).await
    }
}

impl Part for Compilations {
    const NAME: &'static str = "redrive_compilations";
    const EVERY: Duration = Duration::from_secs(1);

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        drive_slices(scheduler, Stage::Compilation).await
    }
}

impl Part for Callbacks {
    const NAME: &'static str = "redrive_callbacks";
    const EVERY: Duration = Duration::from_millis(500);

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let service = &scheduler.service;
        if may_drive(scheduler) && has_room(scheduler, CALLBACK_DELIVERY.name).await {
            let ids = endpoints::nudge(&service.db.session().await?, ENDPOINT_PAUSE_SECONDS, AT_ONCE).await?;
            count("callback", ids.len());
            wake::endpoints(&service.publisher, ids).await;
        }
        Ok(Turn::Later)
    }
}

async fn drive_slices(scheduler: &Scheduler, stage: Stage) -> Result<Turn, DbError> {
    let service = &scheduler.service;
    if may_drive(scheduler) && has_room(scheduler, wake::queue_of(stage)).await {
        let pause = scheduler.ready.redrive_after.as_secs_f64();
        let ids = slices::nudge(&service.db.session().await?, stage, pause, AT_ONCE).await?;
        count(stage.as_str(), ids.len());
        wake::slices(&service.publisher, stage, ids).await;
    }
    Ok(Turn::Later)
}

fn may_drive(scheduler: &Scheduler) -> bool {
    scheduler.lead.epoch().is_some() && !fault::defect("publish_lost")
}

/// Whether wake-ups can be published and would not pile up.
async fn has_room(scheduler: &Scheduler, queue: &str) -> bool {
    scheduler.service.publisher.queue_state(queue).await.is_ok_and(|state| state.ready <= DEEP)
}

fn count(stage: &'static str, items: usize) {
    if items > 0 {
        tracing::debug!(stage, items, "driven again");
        metrics::counter!("lethe_redriven_total", "stage" => stage).increment(items as u64);
    }
}
