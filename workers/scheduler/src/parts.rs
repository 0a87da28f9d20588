//! Parts of the scheduler that have tasks of their own: what one of them waits for holds up no other, and costs nobody the
//! lead.
//!
//! **Invariant** (DESIGN rule 17): a loop that others share awaits nothing that one party can hold up.

use std::sync::Arc;
use std::time::Duration;

use lethe_db::DbError;
use tokio_util::sync::CancellationToken;

use crate::scheduler::Scheduler;

/// When a part has its next turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There is more to do.
    AtOnce,
    /// There is more to do, and others wait while it is done: after a short pause.
    Soon,
    /// After the pause.
    Later,
}

impl Turn {
    pub(crate) const fn at_once_if(more: bool) -> Self {
        if more { Self::AtOnce } else { Self::Later }
    }

    pub(crate) const fn soon_if(more: bool) -> Self {
        if more { Self::Soon } else { Self::Later }
    }
}

/// Something that the leader does again and again.
pub(crate) trait Part: Send + 'static {
    /// The pause between turns.
    const EVERY: Duration;

    /// As metrics and logs call it.
    fn name(&self) -> &'static str;

    /// One turn, while we lead. What has to be under the epoch takes it, or the term, from the scheduler's lead.
    fn turn(&mut self, scheduler: &Scheduler) -> impl Future<Output = Result<Turn, DbError>> + Send;
}

/// The pause before a turn that comes soon.
const SOON: Duration = Duration::from_millis(100);
/// How long a turn may go on once the process is told to stop. What it has not committed is done again.
const GRACE: Duration = Duration::from_secs(2);

/// Comes when a turn has to end that waits for a store or a broker.
async fn cut_off(shutdown: &CancellationToken) {
    shutdown.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

/// Gives a part its turns until the service is told to stop. A failure is told once, and tried again.
pub(crate) async fn run<P: Part>(scheduler: Arc<Scheduler>, mut part: P) {
    let shutdown = &scheduler.service.shutdown;
    let mut failing = false;
    while !shutdown.is_cancelled() {
        if scheduler.lead.epoch().is_none() {
            tokio::select! {
                () = tokio::time::sleep(P::EVERY.min(scheduler.ready.interval)) => {}
                () = shutdown.cancelled() => {}
            }
            continue;
        }
        let outcome = tokio::select! {
            outcome = part.turn(&scheduler) => outcome,
            () = cut_off(shutdown) => return,
        };
        match &outcome {
            Ok(_) if failing => tracing::info!(part = part.name(), "working again"),
            Ok(_) => {}
            Err(error) => {
                metrics::counter!("lethe_scheduler_failures_total", "part" => part.name()).increment(1);
                scheduler.lead.doubt(error);
                if !failing && !matches!(error, DbError::LeadershipLost | DbError::ClockAhead { .. }) {
                    tracing::warn!(part = part.name(), %error, "failed; trying again");
                }
            }
        }
        failing = outcome.is_err();
        if matches!(outcome, Ok(Turn::AtOnce)) {
            tokio::task::yield_now().await;
            continue;
        }
        let pause = if matches!(outcome, Ok(Turn::Soon)) { SOON.min(P::EVERY) } else { P::EVERY };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
}
