//! Erasing a slice: every store erases, is asked again, and only then the requests are complete.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lethe::broker::wake;
use lethe::db::slices::{self, Claimed, Member, Stage};
use lethe::db::{Db, DbError};
use lethe::fault;
use lethe::request::{Mpid, RequestKey};
use lethe::service::Service;
use lethe::stores::{DataStore, Erasure, StoreError, Stores};
use lethe::work::{self, Attempt, SliceWork};

use crate::options::Ready;

/// Erases until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    let stores = Stores::built_in(&service.db);
    let executor = Executor { db: service.db.clone(), publisher: service.publisher.clone(), stores };
    work::run(&service, Stage::Erasure, ready.slices, ready.backoff, Arc::new(executor)).await;
    Ok(())
}

struct Executor {
    db: Db,
    publisher: Arc<lethe::broker::Publisher>,
    stores: Stores,
}

impl SliceWork for Executor {
    async fn attempt(&self, claimed: &Claimed) -> Result<Attempt, DbError> {
        let members = slices::members(&self.db.session().await?, claimed.slice_id).await?;
        let keys: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
        slices::open_receipts(&self.db, claimed, &keys, &self.stores.names()).await?;
        let mut failure = None;
        for store in self.stores.iter() {
            if let Err(class) = self.erase_from(store.as_ref(), claimed, &members).await? {
                failure = Some(class);
            }
        }
        let finished = slices::finish_erasure(&self.db, claimed, &self.stores.names()).await?;
        fault::point("finish.after_commit");
        metrics::counter!("lethe_requests_completed_total", "stage" => "erasure").increment(finished.completed as u64);
        wake::endpoints(&self.publisher, finished.endpoints).await;
        Ok(match failure {
            None if finished.slice_done => Attempt::Done,
            class => Attempt::Failed { class: class.unwrap_or_else(|| "incomplete".to_owned()) },
        })
    }
}

impl Executor {
    /// Erases all requests of a slice from one store. Where that fails, each request is tried by itself, so that one
    /// that cannot be erased keeps no other from completing. `Err` in the result: the class of the last failure.
    async fn erase_from(
        &self,
        store: &dyn DataStore,
        claimed: &Claimed,
        members: &[Member],
    ) -> Result<Result<(), String>, DbError> {
        let Err(error) = self.erase_together(store, claimed, members).await else { return Ok(Ok(())) };
        if matches!(error, StoreError::Db(DbError::LeaseLost)) {
            return Err(DbError::LeaseLost);
        }
        let mut last = error.class();
        if matches!(error, StoreError::WritersUnderWay) {
            // Nobody's fault in this slice, and each request would wait as long again.
            let keys: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
            slices::record_failure(&self.db, claimed, store.name(), &keys, &last).await?;
            return Ok(Err(last));
        }
        tracing::warn!(store = store.name(), slice = %claimed.slice_id, class = last, "a slice was not erased as a whole; trying its requests one by one");
        let mut failed = false;
        for member in members {
            match self.erase_together(store, claimed, std::slice::from_ref(member)).await {
                Ok(()) => {}
                Err(StoreError::Db(DbError::LeaseLost)) => return Err(DbError::LeaseLost),
                Err(error) => {
                    failed = true;
                    last = error.class();
                    metrics::counter!("lethe_store_failures_total", "store" => store.name(), "class" => last.clone())
                        .increment(1);
                    slices::record_failure(&self.db, claimed, store.name(), &[member.request_key], &last).await?;
                }
            }
        }
        Ok(if failed { Err(last) } else { Ok(()) })
    }

    async fn erase_together(
        &self,
        store: &dyn DataStore,
        claimed: &Claimed,
        members: &[Member],
    ) -> Result<(), StoreError> {
        // A profile that two requests match is counted in the receipt of the first.
        let mut owners: BTreeMap<Mpid, RequestKey> = BTreeMap::new();
        for member in members {
            for mpid in &member.mpids {
                owners.entry(*mpid).or_insert(member.request_key);
            }
        }
        let mpids: Vec<Mpid> = owners.keys().copied().collect();
        let erasure = Erasure { claimed, mpids: owners };
        store.erase(&erasure).await?;
        // Asked again: what counts is what is there, not what was said to be deleted.
        let held = store.count(&claimed.controller_id, &mpids, claimed.as_of).await?;
        let rows = held.values().map(|held| held.before).sum();
        if rows > 0 {
            return Err(StoreError::Remainder { rows });
        }
        let mut arrived: HashMap<RequestKey, i64> = members.iter().map(|member| (member.request_key, 0)).collect();
        for (mpid, held) in held {
            if let Some(count) = erasure.mpids.get(&mpid).and_then(|key| arrived.get_mut(key)) {
                *count += held.later;
            }
        }
        let arrived: Vec<(RequestKey, i64)> = arrived.into_iter().collect();
        Ok(slices::verify(&self.db, claimed, store.name(), &arrived).await?)
    }
}
