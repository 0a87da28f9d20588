//! Wake-ups: messages that name a row and nothing else. They are published after the commit and may be lost; the
//! scheduler finds the rows again.
//!
//! **Invariant** (DESIGN rule 2): a change of state and the rows of what follows are one transaction; publishing comes after
//! its commit.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use lethe_broker::topology::{CALLBACK_DELIVERY, CANCELLATION, queue_of};
use lethe_broker::{BrokerError, Message, Outgoing, Publisher};
use lethe_domain::request::{BatchId, EndpointId, SliceId, Stage};
use lethe_process::fault;

/// Names a slice.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SliceWakeUp {
    /// Which one.
    pub slice_id: SliceId,
}

/// Names an endpoint.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct EndpointWakeUp {
    /// Which one.
    pub endpoint_id: EndpointId,
}

/// A marker in the queue of cancellations: whoever finds it has handled all that stood before it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CancellationMarker {
    /// The due batch that waits for it.
    pub batch_id: BatchId,
}

impl CancellationMarker {
    /// The marker that a message is. Markers come through the default exchange, where controllers may not publish;
    /// cancellations come through theirs, whatever their routing key is.
    #[must_use]
    pub fn of(message: &Message) -> Option<Self> {
        let ours = message.exchange.is_empty() && message.routing_key == CANCELLATION.name;
        ours.then(|| serde_json::from_slice(&message.body).ok()).flatten()
    }

    /// Puts the marker at the end of the queue of cancellations.
    ///
    /// # Errors
    /// [`BrokerError`].
    pub async fn publish(&self, publisher: &Publisher) -> Result<(), BrokerError> {
        let body = serde_json::to_vec(self).unwrap_or_default();
        publisher.publish(&[Outgoing::to_queue(CANCELLATION.name, body)]).await
    }
}

/// Wakes whoever erases or compiles these slices.
pub async fn slices(publisher: &Publisher, stage: Stage, ids: impl IntoIterator<Item = SliceId>) {
    let body = |slice_id| serde_json::to_vec(&SliceWakeUp { slice_id }).unwrap_or_default();
    send(publisher, ids.into_iter().map(|id| Outgoing::to_queue(queue_of(stage).name, body(id))).collect()).await;
}

/// Wakes whoever delivers to these endpoints.
pub async fn endpoints(publisher: &Publisher, ids: impl IntoIterator<Item = EndpointId>) {
    let body = |endpoint_id| serde_json::to_vec(&EndpointWakeUp { endpoint_id }).unwrap_or_default();
    let messages = ids.into_iter().map(|id| Outgoing::to_queue(CALLBACK_DELIVERY.name, body(id))).collect();
    send(publisher, messages).await;
}

/// Wakes endpoints in the background: whoever has committed need not wait for a broker that is slow or away. An endpoint
/// that waits for its wake-up already is not woken twice. Cheap to clone; ends with its last clone.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Sleepers>);

#[derive(Debug, Default)]
struct Sleepers {
    endpoints: Mutex<BTreeSet<EndpointId>>,
    added: Arc<Notify>,
}

impl Waker {
    /// Publishes by way of `publisher`. To be called within a runtime.
    #[must_use]
    pub fn start(publisher: Arc<Publisher>) -> Self {
        let sleepers = Arc::new(Sleepers::default());
        let (weak, added) = (Arc::downgrade(&sleepers), sleepers.added.clone());
        tokio::spawn(async move {
            while let Some(sleepers) = weak.upgrade() {
                let due = std::mem::take(&mut *sleepers.endpoints.lock().unwrap_or_else(PoisonError::into_inner));
                drop(sleepers);
                if due.is_empty() {
                    added.notified().await;
                } else {
                    endpoints(&publisher, due).await;
                }
            }
        });
        Self(sleepers)
    }

    /// Wakes whoever delivers to these endpoints, soon.
    pub fn endpoints(&self, ids: impl IntoIterator<Item = EndpointId>) {
        self.0.endpoints.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
        self.0.added.notify_one();
    }
}

impl Drop for Sleepers {
    fn drop(&mut self) {
        self.added.notify_one();
    }
}

async fn send(publisher: &Publisher, messages: Vec<Outgoing>) {
    fault::point("wake.before_publish");
    if fault::defect("publish_lost") {
        return;
    }
    if let Err(error) = publisher.publish(&messages).await {
        metrics::counter!("lethe_wake_ups_lost_total").increment(messages.len() as u64);
        tracing::debug!(%error, wake_ups = messages.len(), "wake-ups were not published; the scheduler finds the rows again");
    }
}
