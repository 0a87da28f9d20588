//! From wake-ups to deliveries. Each endpoint that was woken has one task in this process, which claims what is due as
//! the endpoint's limit allows, delivers, and ends when nothing is left. So one endpoint that hangs holds its own few
//! permits and nothing else, and one controller its share of them.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use lethe_broker::topology::CALLBACK_DELIVERY;
use lethe_broker::{Consumer, Gather, GroupHandler, Message, Outcome};
use lethe_db::callbacks::ClaimedCallback;
use lethe_db::{Db, DbError};
use lethe_domain::request::EndpointId;
use lethe_runtime::service::Service;
use lethe_runtime::wake::EndpointWakeUp;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::claim::Claimer;
use crate::deliver::deliver;
use crate::give_up::GiveUp;
use crate::load::Load;
use crate::options::Ready;
use crate::record::Recorder;
use crate::share::{Permit, Share, Shares};

/// Delivers until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    let ready = Arc::new(ready);
    let tasks = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(ready.deliveries.into()));
    let load = Load::new(permits.clone());
    let givers = GiveUp::start(service.db.clone(), ready.policy.give_up, service.shutdown.clone(), &tasks);
    let dispatcher = Dispatcher(Arc::new(Shared {
        claimer: Claimer::start(service.db.clone(), ready.clone(), load.clone()),
        recorder: Recorder::start(service.db.clone(), ready.clone(), load.clone(), givers),
        load,
        shares: Shares::new(permits, ready.share.into()),
        db: service.db.clone(),
        ready,
        active: Mutex::default(),
        tasks: tasks.clone(),
        shutdown: service.shutdown.clone(),
    }));
    let consumer = Consumer {
        broker: service.broker.clone(),
        queue: CALLBACK_DELIVERY,
        prefetch: 256,
        gather: Gather { messages: 256, bytes: usize::MAX, linger: Duration::ZERO },
        handler: Arc::new(dispatcher),
        publisher: service.publisher.clone(),
        health: service.health.clone(),
    };
    consumer.run(service.shutdown.clone()).await;
    tasks.close();
    tasks.wait().await;
    Ok(())
}

struct Dispatcher(Arc<Shared>);

struct Shared {
    claimer: Claimer,
    ready: Arc<Ready>,
    recorder: Recorder,
    load: Load,
    shares: Shares,
    db: Db,
    /// Endpoints with a task, which hears of each further wake-up.
    active: Mutex<HashMap<EndpointId, Arc<Notify>>>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl GroupHandler for Dispatcher {
    /// A wake-up only has to be noted: if we die now, the callbacks are still due and will be found again.
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        let mut woken = BTreeSet::new();
        let outcomes = group
            .iter()
            .map(|message| match serde_json::from_slice(&message.body) {
                Ok(EndpointWakeUp { endpoint_id }) => {
                    woken.insert(endpoint_id);
                    Outcome::Done
                }
                Err(_) => Outcome::DeadLetter {
                    code: "invalid".to_owned(),
                    reason: "not a wake-up for an endpoint".to_owned(),
                },
            })
            .collect();
        let woken: Vec<EndpointId> = woken.into_iter().collect();
        match self.0.shares.of(&self.0.db, &woken).await {
            Ok(shares) => shares.into_iter().for_each(|(endpoint_id, share)| wake(&self.0, endpoint_id, share)),
            Err(error) => tracing::warn!(%error, endpoints = woken.len(), "endpoints could not be woken"),
        }
        outcomes
    }
}

fn wake(shared: &Arc<Shared>, endpoint_id: EndpointId, share: Share) {
    let mut active = shared.active.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(woken) = active.get(&endpoint_id) {
        woken.notify_one();
        return;
    }
    let woken = Arc::new(Notify::new());
    active.insert(endpoint_id, woken.clone());
    let shared = shared.clone();
    shared.tasks.clone().spawn(async move { drain(&shared, endpoint_id, &share, &woken).await });
}

/// Whether no other wake-up came meanwhile; then the endpoint is no longer active.
fn ends(shared: &Shared, endpoint_id: EndpointId, woken: &Notify) -> bool {
    let mut active = shared.active.lock().unwrap_or_else(PoisonError::into_inner);
    if woken.notified().now_or_never().is_some() {
        return false;
    }
    active.remove(&endpoint_id);
    true
}

/// Delivers what an endpoint has until nothing is due any more.
async fn drain(shared: &Arc<Shared>, endpoint_id: EndpointId, share: &Share, woken: &Notify) {
    let limit = usize::try_from(shared.ready.limits.in_flight).unwrap_or(1);
    let mut in_flight = JoinSet::new();
    loop {
        let claimed = claim(shared, endpoint_id, share, limit - in_flight.len(), in_flight.is_empty()).await;
        let idle = claimed.is_empty();
        for (callback, permit) in claimed {
            let shared = shared.clone();
            in_flight.spawn(async move {
                let attempt = deliver(&shared.ready, &callback).await;
                shared.recorder.record(callback, attempt).await;
                drop(permit);
            });
        }
        if in_flight.is_empty() && idle {
            if shared.shutdown.is_cancelled() || ends(shared, endpoint_id, woken) {
                return;
            }
            continue;
        }
        // A delivery that hangs must not keep what became due meanwhile from the places that are free.
        tokio::select! {
            _ = in_flight.join_next(), if !in_flight.is_empty() => {}
            () = woken.notified(), if in_flight.len() < limit => {}
        }
        // Outcomes are recorded in groups, so several places come free at once.
        while in_flight.try_join_next().is_some() {}
        shared.load.places(limit, &mut in_flight).await;
    }
}

/// Claims as many callbacks as there is room and permits for, each with its permit: what is claimed is sent at once,
/// well within its lease. With nothing in flight it waits for the first permit; otherwise it takes what is there.
async fn claim(
    shared: &Shared,
    endpoint_id: EndpointId,
    share: &Share,
    room: usize,
    wait: bool,
) -> Vec<(ClaimedCallback, Permit)> {
    let mut permits = Vec::with_capacity(room);
    if wait && room > 0 {
        tokio::select! {
            first = share.acquire() => permits.extend(first),
            () = shared.shutdown.cancelled() => {}
        }
    }
    while permits.len() < room
        && let Some(permit) = share.try_acquire()
    {
        permits.push(permit);
    }
    let Ok(wanted @ 1..) = i32::try_from(permits.len()) else { return Vec::new() };
    if shared.shutdown.is_cancelled() {
        return Vec::new();
    }
    shared.claimer.claim(endpoint_id, wanted).await.into_iter().zip(permits).collect()
}
