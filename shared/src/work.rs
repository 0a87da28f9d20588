//! Working on slices: claim under a lease, acknowledge, do it, finish or try again later. What the work is, is the
//! worker's own; everything else about it is here.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::backoff::{BackoffPolicy, jitter};
use crate::broker::topology::{ACCESS_COMPILATION, ERASURE_EXECUTION};
use crate::broker::wake::SliceWakeUp;
use crate::broker::{Consumer, Gather, GroupHandler, Message, Outcome};
use crate::db::slices::{self, Claimed, Stage};
use crate::db::{Db, DbError};
use crate::service::Service;

/// What an attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The slice is done, and recorded as such.
    Done,
    /// Something failed that may succeed later.
    Failed {
        /// A short class, shown to operators; never a value.
        class: String,
    },
}

/// One attempt on a claimed slice.
pub trait SliceWork: Send + Sync + 'static {
    /// Works under the lease; every write checks it. May be stopped at any await and be called again.
    fn attempt(&self, claimed: &Claimed) -> impl Future<Output = Result<Attempt, DbError>> + Send;
}

/// Works on slices of a stage until the service is told to stop; then finishes those in hand. `permits` bounds them.
pub async fn run<W: SliceWork>(service: &Service, stage: Stage, permits: u16, backoff: BackoffPolicy, work: Arc<W>) {
    let tasks = TaskTracker::new();
    let handler = SliceHandler {
        db: service.db.clone(),
        stage,
        backoff,
        permits: Arc::new(Semaphore::new(permits.into())),
        tasks: tasks.clone(),
        work,
        shutdown: service.shutdown.clone(),
    };
    let consumer = Consumer {
        broker: service.broker.clone(),
        queue: match stage {
            Stage::Erasure => ERASURE_EXECUTION,
            Stage::Compilation => ACCESS_COMPILATION,
        },
        prefetch: 1,
        gather: Gather::SINGLE,
        handler: Arc::new(handler),
        publisher: service.publisher.clone(),
        health: service.health.clone(),
    };
    consumer.run(service.shutdown.clone()).await;
    tasks.close();
    tasks.wait().await;
}

struct SliceHandler<W> {
    db: Db,
    stage: Stage,
    backoff: BackoffPolicy,
    permits: Arc<Semaphore>,
    tasks: TaskTracker,
    work: Arc<W>,
    shutdown: tokio_util::sync::CancellationToken,
}

impl<W: SliceWork> GroupHandler for SliceHandler<W> {
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(group.len());
        for message in group {
            outcomes.push(self.begin(message).await);
        }
        outcomes
    }
}

impl<W: SliceWork> SliceHandler<W> {
    /// Acknowledged as soon as the lease is committed: from then on the row and its lease carry the work.
    async fn begin(&self, message: &Message) -> Outcome {
        let Ok(SliceWakeUp { slice_id }) = serde_json::from_slice(&message.body) else {
            return Outcome::DeadLetter { code: "invalid".to_owned(), reason: "not a wake-up for a slice".to_owned() };
        };
        let permit = tokio::select! {
            permit = self.permits.clone().acquire_owned() => permit,
            () = self.shutdown.cancelled() => return Outcome::RetryAfter(Duration::ZERO),
        };
        let Ok(permit) = permit else { return Outcome::RetryAfter(Duration::ZERO) };
        let claim = async { slices::claim(&self.db.session().await?, slice_id, self.stage).await };
        match claim.await {
            Ok(None) => Outcome::Done, // done, not due, or in somebody else's hand
            Ok(Some(claimed)) => {
                crate::fault::point("slice.claimed");
                let (db, work, backoff) = (self.db.clone(), self.work.clone(), self.backoff);
                let span = tracing::info_span!("slice", stage = self.stage.as_str(), slice = %slice_id, attempt = claimed.attempts);
                let stage = self.stage;
                self.tasks.spawn(
                    async move {
                        carry(&db, stage, backoff, work.as_ref(), &claimed).await;
                        drop(permit);
                    }
                    .instrument(span),
                );
                Outcome::Done
            }
            Err(error) => {
                tracing::debug!(%error, "a slice could not be claimed");
                Outcome::RetryAfter(Duration::from_secs(1))
            }
        }
    }
}

/// Works on a claimed slice while its lease is kept alive, and hands it back where it was not finished.
async fn carry<W: SliceWork>(db: &Db, stage: Stage, backoff: BackoffPolicy, work: &W, claimed: &Claimed) {
    let started = Instant::now();
    let outcome = tokio::select! {
        outcome = work.attempt(claimed) => outcome,
        lost = slices::keep_alive(db, claimed) => Err(lost),
    };
    let (name, class) = match outcome {
        Ok(Attempt::Done) => ("done", None),
        Ok(Attempt::Failed { class }) => ("failed", Some(class)),
        Err(DbError::LeaseLost) => ("lease_lost", None),
        Err(error) => ("failed", Some(error.class())),
    };
    metrics::counter!("lethe_slices_total", "stage" => stage.as_str(), "outcome" => name).increment(1);
    metrics::histogram!("lethe_slice_seconds", "stage" => stage.as_str()).record(started.elapsed().as_secs_f64());
    match class {
        None => tracing::debug!(outcome = name, "slice"),
        Some(class) => {
            let failures = u32::try_from(claimed.attempts).unwrap_or(1);
            let delay = backoff.delay(failures, jitter());
            tracing::warn!(class, ?delay, "a slice is tried again later");
            let handed_back = async { slices::retry_later(&db.session().await?, claimed, delay, Some(&class)).await };
            if let Err(error) = handed_back.await {
                // Its lease runs out instead.
                tracing::debug!(%error, "the slice could not be handed back");
            }
        }
    }
}
