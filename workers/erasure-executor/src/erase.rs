//! Erasing a slice: every store erases, is asked again, and only then are the requests complete.

use std::collections::BTreeMap;
use std::sync::Arc;

use lethe_db::slices::{self, Claimed, Member, Receipts, Trouble, Verified};
use lethe_db::{Db, DbError};
use lethe_domain::request::{Mpid, RequestKey, Stage};
use lethe_process::fault;
use lethe_runtime::service::Service;
use lethe_runtime::wake;
use lethe_runtime::work::{self, Attempt, SliceWork};
use lethe_stores::{DataStore, Erasure, StoreError, Stores};

use crate::options::Ready;

/// Erases until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    let stores = Stores::built_in(&service.db);
    let executor = Executor { db: service.db.clone(), publisher: service.publisher.clone(), stores };
    work::run(&service, Stage::Erasure, ready.slices, ready.backoff, Arc::new(executor)).await;
    Ok(())
}

/// Requests, each with the rows that were received after the start of the execution.
type Arrived = BTreeMap<RequestKey, i64>;

/// Why something of a slice was not erased.
struct Failure {
    class: String,
    trouble: Trouble,
}

impl Failure {
    fn of(error: &StoreError) -> Self {
        Self { class: error.class(), trouble: error.trouble() }
    }
}

/// Profiles that are counted again at once; the lease is renewed in between.
const COUNTED_AT_ONCE: usize = 1_000;

struct Executor {
    db: Db,
    publisher: Arc<lethe_broker::Publisher>,
    stores: Stores,
}

impl SliceWork for Executor {
    async fn attempt(&self, claimed: &Claimed) -> Result<Attempt, DbError> {
        let members = slices::members(&self.db.session().await?, claimed.slice_id).await?;
        let (mut failure, mut verified) = (None, Vec::new());
        for store in self.stores.iter() {
            let receipts = slices::open_receipts(&self.db.session().await?, claimed, store.name()).await?;
            let (arrived, failed) = self.erase_from(store.as_ref(), claimed, &receipts, &members).await?;
            verified.push(Verified { receipts, arrived });
            failure = failed.or(failure);
        }
        let finished = slices::finish_erasure(&self.db, claimed, &members, &verified).await?;
        fault::point("finish.after_commit");
        metrics::counter!("lethe_requests_completed_total", "stage" => "erasure").increment(finished.completed as u64);
        wake::endpoints(&self.publisher, finished.endpoints).await;
        Ok(match failure {
            None if finished.slice_done => Attempt::Done,
            None => Attempt::Failed { class: "incomplete".to_owned(), trouble: Trouble::Slice },
            Some(Failure { class, trouble }) => Attempt::Failed { class, trouble },
        })
    }
}

impl Executor {
    /// Erases all requests of a slice from one store; returns what was verified, and what failed. If a single request
    /// may be at fault, each is tried by itself, so that one that cannot be erased does not keep the others from
    /// completing. If the controller's data cannot be worked on at all, each of them would fail.
    async fn erase_from(
        &self,
        store: &dyn DataStore,
        claimed: &Claimed,
        receipts: &Receipts,
        members: &[Member],
    ) -> Result<(Arrived, Option<Failure>), DbError> {
        let error = match self.erase_together(store, claimed, receipts, members).await {
            Ok(arrived) => return Ok((arrived, None)),
            Err(StoreError::Db(DbError::LeaseLost)) => return Err(DbError::LeaseLost),
            Err(error) => error,
        };
        let mut failure = Failure::of(&error);
        if is_everybodys(&error) || members.len() == 1 {
            self.record_failure(claimed, receipts, members, &failure.class).await?;
            return Ok((Arrived::new(), Some(failure)));
        }
        tracing::warn!(
            store = store.name(),
            class = failure.class,
            "a slice was not erased as a whole; trying its requests one by one"
        );
        let mut verified = Arrived::new();
        for (place, member) in members.iter().enumerate() {
            match self.erase_together(store, claimed, receipts, std::slice::from_ref(member)).await {
                Ok(arrived) => verified.extend(arrived),
                Err(StoreError::Db(DbError::LeaseLost)) => return Err(DbError::LeaseLost),
                Err(error) => {
                    let found = Failure::of(&error);
                    let all = is_everybodys(&error);
                    let failed = if all { &members[place..] } else { std::slice::from_ref(member) };
                    self.record_failure(claimed, receipts, failed, &found.class).await?;
                    // A failure that needs an operator must not be hidden by a later one.
                    if all || failure.trouble != Trouble::Operator {
                        failure = found;
                    }
                    if all {
                        break;
                    }
                }
            }
        }
        let failed = (verified.len() < members.len()).then_some(failure);
        Ok((verified, failed))
    }

    async fn record_failure(
        &self,
        claimed: &Claimed,
        receipts: &Receipts,
        members: &[Member],
        class: &str,
    ) -> Result<(), DbError> {
        metrics::counter!("lethe_store_failures_total", "store" => receipts.store, "class" => class.to_owned())
            .increment(1);
        let keys: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
        slices::record_failure(&self.db, claimed, receipts, &keys, class).await
    }

    async fn erase_together(
        &self,
        store: &dyn DataStore,
        claimed: &Claimed,
        receipts: &Receipts,
        members: &[Member],
    ) -> Result<Arrived, StoreError> {
        // A profile that two requests match is counted in the receipt of the first.
        let mut owners: BTreeMap<Mpid, RequestKey> = BTreeMap::new();
        for member in members {
            for mpid in &member.mpids {
                owners.entry(*mpid).or_insert(member.request_key);
            }
        }
        let mpids: Vec<Mpid> = owners.keys().copied().collect();
        let erasure = Erasure { claimed, receipts, mpids: owners };
        store.erase(&erasure).await?;
        // Asked again: what counts is what is there, not what was said to be deleted.
        let mut held = BTreeMap::new();
        for chunk in mpids.chunks(COUNTED_AT_ONCE) {
            slices::hold(&self.db.session().await?, claimed).await?;
            held.extend(store.count(&claimed.controller_id, chunk, claimed.as_of).await?);
        }
        let rows = held.values().map(|held| held.before).sum();
        if rows > 0 {
            return Err(StoreError::Remainder { rows });
        }
        let mut arrived: Arrived = members.iter().map(|member| (member.request_key, 0)).collect();
        for (mpid, held) in held {
            if let Some(count) = erasure.mpids.get(&mpid).and_then(|key| arrived.get_mut(key)) {
                *count += held.later;
            }
        }
        Ok(arrived)
    }
}

/// Whether the error concerns all requests alike: a lock, a time-out, a lost connection, writers under way.
fn is_everybodys(error: &StoreError) -> bool {
    error.trouble() == Trouble::Controller || matches!(error, StoreError::WritersUnderWay)
}
