//! Recording what came of deliveries: whatever has come in meanwhile, in one transaction.

use std::sync::Arc;

use lethe_db::callbacks::{self, ClaimedCallback};
use lethe_db::{Db, DbError};
use lethe_domain::backoff::jitter;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::disposition::Disposition;
use lethe_domain::group::Parts;
use lethe_process::fault;
use lethe_process::reconnect::Reconnect;
use tokio::sync::{mpsc, oneshot};

use crate::give_up::GiveUp;
use crate::load::Load;
use crate::options::Ready;

/// Outcomes of a group at most.
const GROUP: usize = 256;

struct Item {
    claimed: ClaimedCallback,
    attempt: DeliveryAttempt,
    recorded: oneshot::Sender<()>,
}

/// Hands outcomes to the task that records them.
#[derive(Clone)]
pub(crate) struct Recorder(mpsc::Sender<Item>);

impl Recorder {
    /// Starts the task; it ends when the last recorder is gone.
    pub(crate) fn start(db: Db, ready: Arc<Ready>, load: Load, give_up: GiveUp) -> Self {
        let (sender, receiver) = mpsc::channel(4 * GROUP);
        tokio::spawn(record_all(db, ready, load, give_up, receiver));
        Self(sender)
    }

    /// Returns once the outcome is durable.
    pub(crate) async fn record(&self, claimed: ClaimedCallback, attempt: DeliveryAttempt) {
        let (recorded, done) = oneshot::channel();
        if self.0.send(Item { claimed, attempt, recorded }).await.is_ok() {
            let _ = done.await;
        }
    }
}

async fn record_all(db: Db, ready: Arc<Ready>, load: Load, give_up: GiveUp, mut receiver: mpsc::Receiver<Item>) {
    let mut items = Vec::with_capacity(GROUP);
    while load.gather(&mut receiver, &mut items, GROUP).await {
        let (outcomes, acknowledgements): (Vec<_>, Vec<_>) =
            items.drain(..).map(|item| ((item.claimed, item.attempt), item.recorded)).unzip();
        record_group(&db, &ready, &give_up, &outcomes).await;
        for acknowledgement in acknowledgements {
            let _ = acknowledgement.send(());
        }
    }
}

/// Records a group, however long that takes: without the record a delivered callback would be sent again. Where the
/// database refuses one outcome and nothing else, the group is halved until that one stands alone and is left out.
async fn record_group(db: &Db, ready: &Ready, give_up: &GiveUp, outcomes: &[(ClaimedCallback, DeliveryAttempt)]) {
    let mut parts = Parts::new(outcomes);
    let mut reconnect = Reconnect::default();
    while let Some(part) = parts.take() {
        match callbacks::record(db, &ready.policy, part, jitter).await {
            Ok(recorded) => {
                fault::point("record.after_commit");
                for (state, count) in recorded.states {
                    metrics::counter!("lethe_callbacks_recorded_total", "state" => state.as_str())
                        .increment(count as u64);
                }
                metrics::counter!("lethe_breakers_opened_total").increment(recorded.breakers_opened as u64);
                recorded.unanswered.into_iter().for_each(|endpoint| give_up.tell(endpoint));
            }
            Err(error) if is_of_one_outcome(&error) && part.len() > 1 => {
                parts.halve(part);
            }
            Err(error) if is_of_one_outcome(&error) => {
                tracing::error!(%error, "an outcome cannot be recorded; its callback will be sent again");
            }
            Err(error) => {
                if reconnect.is_first() {
                    tracing::warn!(%error, outcomes = part.len(), "outcomes could not be recorded; trying again");
                }
                parts.put_back(part);
                reconnect.wait().await;
            }
        }
    }
}

fn is_of_one_outcome(error: &DbError) -> bool {
    error.disposition() == Disposition::Poison || matches!(error, DbError::Unexpected { .. })
}
