//! Due batches, and what is known about the cancellations before them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use lethe_db::batches::ToRelease;
use lethe_domain::request::BatchId;
use tokio::sync::Notify;

/// What is known of the cancellations before a due batch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Marker {
    /// It was put at the end of the queue.
    Sent(Instant),
    /// Nothing was queued, and nobody had anything in hand.
    NotNeeded,
}

/// Due batches, and what is known of the cancellations before them.
#[derive(Debug, Default)]
pub(crate) struct Markers {
    known: Mutex<HashMap<BatchId, Marker>>,
    wanted: Mutex<Vec<ToRelease>>,
    asked: Notify,
}

impl Markers {
    pub(crate) fn with<T>(&self, read: impl FnOnce(&mut HashMap<BatchId, Marker>) -> T) -> T {
        read(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Of these due batches, those that nothing has to come before. The broker is asked about the others soon.
    pub(crate) fn ready(&self, due: Vec<ToRelease>) -> Vec<ToRelease> {
        self.with(|known| known.retain(|id, _| due.iter().any(|one| one.batch.batch_id == *id)));
        let (ready, wanted): (Vec<_>, Vec<_>) = due.into_iter().partition(|one| {
            one.cancellations_handled
                || self.with(|known| matches!(known.get(&one.batch.batch_id), Some(Marker::NotNeeded)))
        });
        if !wanted.is_empty() {
            *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
            self.asked.notify_one();
        }
        ready
    }

    /// Waits until somebody wants to know of a batch.
    pub(crate) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Those that somebody wants to know of; each is told once.
    pub(crate) fn wanted(&self) -> Vec<ToRelease> {
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
