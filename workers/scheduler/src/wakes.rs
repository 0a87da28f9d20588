//! Wake-ups of what a release has made, published by a task of its own: whoever has committed does not wait for a broker.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lethe_broker::Publisher;
use lethe_domain::request::{EndpointId, SliceId, Stage};
use lethe_runtime::wake;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Steps of releases whose wake-ups may wait. What comes on top is found again by `overdue.rs`.
const WAITING: usize = 256;
/// How long the last ones may take once the process is told to stop.
const LAST: Duration = Duration::from_secs(5);

/// What a step of a release has made.
pub(crate) struct Woken {
    pub(crate) stage: Stage,
    pub(crate) slices: Vec<SliceId>,
    pub(crate) endpoints: BTreeSet<EndpointId>,
}

/// Takes wake-ups.
#[derive(Clone, Debug)]
pub(crate) struct Wakes(mpsc::Sender<Woken>);

impl Wakes {
    /// Publishes these soon, or not at all.
    pub(crate) fn send(&self, woken: Woken) {
        let count = woken.slices.len() + woken.endpoints.len();
        if count > 0 && self.0.try_send(woken).is_err() {
            metrics::counter!("lethe_wake_ups_lost_total").increment(count as u64);
        }
    }
}

/// Both ends.
pub(crate) fn channel() -> (Wakes, mpsc::Receiver<Woken>) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (Wakes(sender), receiver)
}

/// Publishes what comes until `shutdown`, and then what is left.
pub(crate) async fn publish(
    publisher: Arc<Publisher>,
    mut receiver: mpsc::Receiver<Woken>,
    shutdown: CancellationToken,
) {
    let one = async |woken: Woken| {
        wake::slices(&publisher, woken.stage, woken.slices).await;
        wake::endpoints(&publisher, woken.endpoints).await;
    };
    loop {
        tokio::select! {
            woken = receiver.recv() => match woken {
                Some(woken) => one(woken).await,
                None => return,
            },
            () = shutdown.cancelled() => break,
        }
    }
    receiver.close();
    let rest = async {
        while let Some(woken) = receiver.recv().await {
            one(woken).await;
        }
    };
    let _ = tokio::time::timeout(LAST, rest).await;
}
