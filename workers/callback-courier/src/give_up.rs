//! Giving up on endpoints that have not answered for long: step by step, alongside the recording. A failed attempt
//! starts it, so it needs nothing but the attempts that are made anyway; if we die, the next one continues it.

use std::time::Duration;

use lethe_db::give_up::{self, GivenUpBy};
use lethe_db::{Db, DbError};
use lethe_domain::request::EndpointId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Endpoints that wait for their turn at most; a further one is told again by its next attempt.
const WAITING: usize = 1_024;

/// Hears of endpoints that have not answered for the time after which one is given up.
#[derive(Clone)]
pub(crate) struct GiveUp(mpsc::Sender<EndpointId>);

impl GiveUp {
    /// Starts the task; it ends with the last sender, or at shutdown between two steps.
    pub(crate) fn start(db: Db, after: Duration, shutdown: CancellationToken, tasks: &TaskTracker) -> Self {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        tasks.spawn(async move {
            while let Some(Some(endpoint)) = shutdown.run_until_cancelled(receiver.recv()).await {
                if let Err(error) = exhaust(&db, endpoint, after, &shutdown).await {
                    tracing::warn!(%error, %endpoint, "giving up on an endpoint failed; its next attempt tries again");
                }
            }
        });
        Self(sender)
    }

    /// An endpoint has not answered for that long.
    pub(crate) fn tell(&self, endpoint: EndpointId) {
        let _ = self.0.try_send(endpoint);
    }
}

async fn exhaust(db: &Db, endpoint: EndpointId, after: Duration, shutdown: &CancellationToken) -> Result<(), DbError> {
    let mut callbacks = 0;
    let by = GivenUpBy::Courier { after };
    let cutoff = give_up::cutoff(db, by).await?;
    while !shutdown.is_cancelled() {
        let Some(step) = give_up::step(db, endpoint, by, cutoff, false).await? else { break };
        if step.first {
            metrics::counter!("lethe_endpoints_given_up_total").increment(1);
        }
        if step.exhausted == 0 {
            break;
        }
        callbacks += step.exhausted;
        metrics::counter!("lethe_callbacks_recorded_total", "state" => "exhausted").increment(step.exhausted as u64);
    }
    if callbacks > 0 {
        tracing::warn!(%endpoint, callbacks, "gave up on an endpoint that does not answer");
    }
    Ok(())
}
