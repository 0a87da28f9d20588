//! Self-healing: what is due and untouched is driven again, without storms (DESIGN rule 7). A stage whose queue is deep
//! is left alone: there, due and untouched is normal.

use std::time::{Duration, Instant};

use lethe::broker::topology::CALLBACK_DELIVERY;
use lethe::broker::wake;
use lethe::db::slices::{self, Stage};
use lethe::db::{DbError, endpoints};
use lethe::fault;

use crate::schedule::{Scheduler, is_time};

/// A queue with more messages than this is slow, not broken.
const DEEP: u32 = 100;
/// Items that are driven again at once, at most: the limit in rate.
const AT_ONCE: i64 = 500;
const SLICES_EVERY: Duration = Duration::from_secs(1);
const CALLBACKS_EVERY: Duration = Duration::from_millis(500);
/// An endpoint is not woken twice within this.
const ENDPOINT_PAUSE_SECONDS: f64 = 2.0;

/// When each kind was last looked at.
#[derive(Default)]
pub(crate) struct Pace {
    slices: Option<Instant>,
    callbacks: Option<Instant>,
}

/// Drives due work again.
pub(crate) async fn due_work(scheduler: &Scheduler, pace: &mut Pace) -> Result<(), DbError> {
    if fault::defect("publish_lost") {
        return Ok(());
    }
    let service = &scheduler.service;
    let pause = scheduler.ready.redrive_after.as_secs_f64();
    if is_time(&mut pace.slices, SLICES_EVERY) {
        for stage in [Stage::Erasure, Stage::Compilation] {
            if !has_room(scheduler, wake::queue_of(stage)).await {
                continue;
            }
            let ids = slices::nudge(&service.db.session().await?, stage, pause, AT_ONCE).await?;
            count(stage.as_str(), ids.len());
            wake::slices(&service.publisher, stage, ids).await;
        }
    }
    if is_time(&mut pace.callbacks, CALLBACKS_EVERY) && has_room(scheduler, CALLBACK_DELIVERY.name).await {
        let ids = endpoints::nudge(&service.db.session().await?, ENDPOINT_PAUSE_SECONDS, AT_ONCE).await?;
        count("callback", ids.len());
        wake::endpoints(&service.publisher, ids).await;
    }
    Ok(())
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
