//! Claiming callbacks: for all endpoints that have room by now, in one call.

use std::collections::HashMap;
use std::sync::Arc;

use lethe_db::callbacks::{self, ClaimedCallback};
use lethe_db::{Db, DbError};
use lethe_domain::request::EndpointId;
use lethe_process::fault;
use tokio::sync::{mpsc, oneshot};

use crate::load::Load;
use crate::options::Ready;

/// Endpoints of a call at most.
const GROUP: usize = 64;

struct Ask {
    endpoint_id: EndpointId,
    wanted: i32,
    claimed: oneshot::Sender<Vec<ClaimedCallback>>,
}

/// Hands what endpoints ask for to the task that claims.
#[derive(Clone)]
pub(crate) struct Claimer(mpsc::Sender<Ask>);

impl Claimer {
    /// Starts the task; it ends when the last claimer is gone.
    pub(crate) fn start(db: Db, ready: Arc<Ready>, load: Load) -> Self {
        let (sender, receiver) = mpsc::channel(GROUP);
        tokio::spawn(claim_all(db, ready, load, receiver));
        Self(sender)
    }

    /// Up to `wanted` due callbacks of an endpoint; nobody else asks for it meanwhile. None where the database fails:
    /// what is due stays due, and the scheduler wakes us again.
    pub(crate) async fn claim(&self, endpoint_id: EndpointId, wanted: i32) -> Vec<ClaimedCallback> {
        let (claimed, answer) = oneshot::channel();
        match self.0.send(Ask { endpoint_id, wanted, claimed }).await {
            Ok(()) => answer.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }
}

async fn claim_all(db: Db, ready: Arc<Ready>, load: Load, mut receiver: mpsc::Receiver<Ask>) {
    let mut asks = Vec::with_capacity(GROUP);
    while load.gather(&mut receiver, &mut asks, GROUP).await {
        let wanted: Vec<(EndpointId, i32)> = asks.iter().map(|ask| (ask.endpoint_id, ask.wanted)).collect();
        let mut claimed: HashMap<EndpointId, Vec<ClaimedCallback>> = HashMap::new();
        match claim(&db, &ready, &wanted).await {
            Ok(all) => all.into_iter().for_each(|one| claimed.entry(one.endpoint_id).or_default().push(one)),
            Err(error) => tracing::warn!(%error, endpoints = wanted.len(), "callbacks could not be claimed"),
        }
        for ask in asks.drain(..) {
            let _ = ask.claimed.send(claimed.remove(&ask.endpoint_id).unwrap_or_default());
        }
    }
}

async fn claim(db: &Db, ready: &Ready, wanted: &[(EndpointId, i32)]) -> Result<Vec<ClaimedCallback>, DbError> {
    let session = db.session().await?;
    if fault::defect("callbacks_out_of_order") {
        session.batch_execute("UPDATE lethe.callbacks SET state = 'ready' WHERE state = 'waiting'").await?;
    }
    callbacks::claim(&session, &ready.keys, ready.limits, wanted).await
}
