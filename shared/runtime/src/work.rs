//! Working on slices: claim under a lease, acknowledge, do it, finish or try again later. What the work consists of
//! is up to the worker; everything else about it is here.
//!
//! **Invariant** (DESIGN rule 19): one controller uses half of the permits of a process at most.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::service::Service;
use crate::wake::SliceWakeUp;
use lethe_broker::{Consumer, Gather, GroupHandler, Message, Outcome, topology};
use lethe_db::slices::{self, Claimed, Trouble, Turn};
use lethe_db::{Db, DbError};
use lethe_domain::backoff::{BackoffPolicy, jitter};
use lethe_domain::request::{ControllerId, Stage};

/// What an attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The slice is done, and recorded as such.
    Done,
    /// Something failed; the slice is tried again.
    Failed {
        /// A short class, shown to operators; never a value.
        class: String,
        /// Who or what is in trouble.
        trouble: Trouble,
    },
}

impl Attempt {
    /// The work on the slice failed as a whole.
    fn failed(error: &DbError) -> Self {
        Self::Failed { class: error.class(), trouble: Trouble::of(error) }
    }
}

/// One attempt on a claimed slice.
pub trait SliceWork: Send + Sync + 'static {
    /// Works under the lease; every write checks it. May be stopped at any await and be called again.
    fn attempt(&self, claimed: &Claimed) -> impl Future<Output = Result<Attempt, DbError>> + Send;
}

/// A wake-up is kept no longer than this; then it goes back to the queue, for whoever is free.
const PATIENCE: Duration = Duration::from_secs(10);
/// While all that is due may belong to controllers at their limit, others are looked for again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Works on slices of a stage until the service is told to stop; then finishes those that are leased. `permits` bounds
/// them; half of the permits, rounded up, is the limit of one controller.
pub async fn run<W: SliceWork>(service: &Service, stage: Stage, permits: u16, backoff: BackoffPolicy, work: Arc<W>) {
    let tasks = TaskTracker::new();
    let handler = SliceHandler {
        db: service.db.clone(),
        stage,
        backoff,
        permits: Arc::new(Semaphore::new(permits.into())),
        shares: Arc::new(Shares::new(usize::from(permits.div_ceil(2)))),
        tasks: tasks.clone(),
        work,
        shutdown: service.shutdown.clone(),
    };
    let consumer = Consumer {
        broker: service.broker.clone(),
        queue: topology::queue_of(stage),
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

/// How many permits each controller uses in this process, and who was served last.
struct Shares {
    limit: usize,
    state: Mutex<InUse>,
    /// One has ended.
    ended: Notify,
}

#[derive(Default)]
struct InUse {
    by_controller: HashMap<ControllerId, usize>,
    served_last: Option<ControllerId>,
}

impl Shares {
    fn new(limit: usize) -> Self {
        Self { limit, state: Mutex::default(), ended: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, InUse> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> Turn {
        let state = self.state();
        let full = state.by_controller.iter().filter(|(_, used)| **used >= self.limit);
        Turn { served_last: state.served_last.clone(), at_limit: full.map(|(id, _)| id.clone()).collect() }
    }

    fn take(self: &Arc<Self>, controller_id: &ControllerId) -> Share {
        let mut state = self.state();
        *state.by_controller.entry(controller_id.clone()).or_default() += 1;
        state.served_last = Some(controller_id.clone());
        Share { shares: self.clone(), controller_id: controller_id.clone() }
    }
}

/// A permit that a controller uses, until it is dropped.
struct Share {
    shares: Arc<Shares>,
    controller_id: ControllerId,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.shares.state();
        if let Some(used) = state.by_controller.get_mut(&self.controller_id) {
            *used -= 1;
            if *used == 0 {
                state.by_controller.remove(&self.controller_id);
            }
        }
        drop(state);
        self.shares.ended.notify_one();
    }
}

struct SliceHandler<W> {
    db: Db,
    stage: Stage,
    backoff: BackoffPolicy,
    permits: Arc<Semaphore>,
    shares: Arc<Shares>,
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
    /// A wake-up says that something is due, not what: the claim finds it. Each begins one slice at most, and is
    /// acknowledged as soon as the lease is committed: from then on the row and its lease carry the work. It is also
    /// acknowledged if nothing can be claimed; what becomes due later, or was paused, the scheduler wakes for.
    async fn begin(&self, message: &Message) -> Outcome {
        if serde_json::from_slice::<SliceWakeUp>(&message.body).is_err() {
            return Outcome::DeadLetter { code: "invalid".to_owned(), reason: "not a wake-up for a slice".to_owned() };
        }
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            let permit = tokio::select! {
                permit = tokio::time::timeout_at(until, self.permits.clone().acquire_owned()) => permit,
                () = self.shutdown.cancelled() => return Outcome::RetryAfter(Duration::ZERO),
            };
            let Ok(Ok(permit)) = permit else { return Outcome::RetryAfter(Duration::ZERO) };
            let turn = self.shares.turn();
            let claim = async { slices::claim(&self.db.session().await?, self.stage, &turn).await };
            match claim.await {
                Ok(Some(claimed)) => {
                    self.spawn(claimed, permit);
                    return Outcome::Done;
                }
                Ok(None) if turn.at_limit.is_empty() => return Outcome::Done,
                Ok(None) if tokio::time::Instant::now() >= until => return Outcome::RetryAfter(Duration::ZERO),
                // What is due may be of those at their limit: then this wake-up is theirs.
                Ok(None) => {
                    drop(permit);
                    tokio::select! {
                        _ = tokio::time::timeout(LOOK_AGAIN, self.shares.ended.notified()) => {}
                        () = self.shutdown.cancelled() => return Outcome::RetryAfter(Duration::ZERO),
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no slice could be claimed");
                    return Outcome::RetryAfter(Duration::from_secs(1));
                }
            }
        }
    }

    fn spawn(&self, claimed: Claimed, permit: OwnedSemaphorePermit) {
        lethe_process::fault::point("slice.claimed");
        let share = self.shares.take(&claimed.controller_id);
        let (db, work, backoff, stage) = (self.db.clone(), self.work.clone(), self.backoff, self.stage);
        let span = tracing::info_span!(
            "slice",
            stage = stage.as_str(),
            slice = %claimed.slice_id,
            attempt = claimed.attempts
        );
        self.tasks.spawn(
            async move {
                run_attempt(&db, stage, backoff, work.as_ref(), &claimed).await;
                // The permit first: a task that is told that a share is free must also find a permit.
                drop(permit);
                drop(share);
            }
            .instrument(span),
        );
    }
}

/// Works on a claimed slice while its lease is kept alive, and gives it back if it was not finished.
async fn run_attempt<W: SliceWork>(db: &Db, stage: Stage, backoff: BackoffPolicy, work: &W, claimed: &Claimed) {
    let started = Instant::now();
    let outcome = tokio::select! {
        outcome = work.attempt(claimed) => outcome,
        lost = slices::keep_alive(db, claimed) => Err(lost),
    };
    let is_lost = matches!(outcome, Err(DbError::LeaseLost));
    let attempt = outcome.unwrap_or_else(|error| Attempt::failed(&error));
    let name = match &attempt {
        Attempt::Done => "done",
        Attempt::Failed { .. } if is_lost => "lease_lost",
        Attempt::Failed { trouble: Trouble::Operator, .. } => "needs_operator",
        Attempt::Failed { .. } => "failed",
    };
    metrics::counter!("lethe_slices_total", "stage" => stage.as_str(), "outcome" => name).increment(1);
    metrics::histogram!("lethe_slice_seconds", "stage" => stage.as_str()).record(started.elapsed().as_secs_f64());
    let recorded = match attempt {
        Attempt::Failed { class, trouble } if !is_lost => {
            let delay = slices::give_back(db, claimed, backoff, trouble, &class, jitter()).await;
            tracing::warn!(class, ?trouble, delay = ?delay.as_ref().ok(), "a slice is tried again later");
            delay.map(drop)
        }
        Attempt::Done => {
            tracing::debug!("the slice is done");
            slices::went_well(db, claimed).await
        }
        Attempt::Failed { .. } => {
            tracing::debug!("the lease was lost");
            Ok(())
        }
    };
    if let Err(error) = recorded {
        // The lease runs out instead; a pause ends with its time.
        tracing::debug!(%error, "the end of an attempt could not be recorded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_at_its_limit_until_one_of_its_permits_is_free() {
        let shares = Arc::new(Shares::new(2));
        let acme: ControllerId = "acme".parse().unwrap();
        let other: ControllerId = "other".parse().unwrap();
        let first = shares.take(&acme);
        assert!(shares.turn().at_limit.is_empty());
        let _second = shares.take(&acme);
        let _third = shares.take(&other);
        assert_eq!(shares.turn().at_limit, [acme]);
        assert_eq!(shares.turn().served_last, Some(other));
        drop(first);
        assert!(shares.turn().at_limit.is_empty());
    }
}
