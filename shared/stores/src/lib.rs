//! Data stores: where the data of subjects lies. The built-in one is PostgreSQL; others are added by implementing one
//! trait and joining [`Stores`].
//!
//! **Invariant** (DESIGN rule 10): a store works in bounded steps that can be stopped and repeated.

pub mod import;
pub mod postgres;
mod steps;
mod writers;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;

use lethe_db::slices::{Claimed, Receipts, Trouble};
use lethe_db::{Db, DbError};
use lethe_domain::disposition::Disposition;
use lethe_domain::request::{ControllerId, Mpid, RequestKey};

/// Every statement of every module here: a test prepares them on a migrated database.
#[must_use]
pub fn all_statements() -> Vec<(&'static str, &'static str)> {
    let [import, progress] = import::STATEMENTS;
    [postgres::STATEMENTS, import, progress].concat()
}

/// A store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database behind it failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// Transactions that wrote before the start of the execution are still open; what they wrote is not visible yet.
    #[error("writers from before the start of the execution are still under way")]
    WritersUnderWay,
    /// The store still holds what it was told to erase.
    #[error("{rows} rows are left after the erasure")]
    Remainder {
        /// Rows received up to the start of the execution.
        rows: i64,
    },
}

impl StoreError {
    /// A short class for receipts and metrics; never a value.
    #[must_use]
    pub fn class(&self) -> String {
        match self {
            Self::Db(error) => error.class(),
            Self::WritersUnderWay => "writers_under_way".to_owned(),
            Self::Remainder { .. } => "remainder".to_owned(),
        }
    }

    /// The step was too much for the store; half of it may not be.
    #[must_use]
    pub fn is_too_much(&self) -> bool {
        matches!(self, Self::Db(error) if error.is_too_much())
    }

    /// Who or what is in trouble.
    #[must_use]
    pub fn trouble(&self) -> Trouble {
        match self {
            Self::Db(error) => Trouble::of(error),
            Self::WritersUnderWay => Trouble::Writers,
            Self::Remainder { .. } => Trouble::Slice,
        }
    }

    /// What it means for the work at hand.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Db(error) => error.disposition(),
            Self::WritersUnderWay | Self::Remainder { .. } => Disposition::Transient,
        }
    }
}

/// What is to be erased: a share of a slice.
#[derive(Clone, Debug)]
pub struct Erasure<'a> {
    /// The lease under which it happens: every write of a store holds it.
    pub claimed: &'a Claimed,
    /// Where it is written down what was deleted, in the transaction that deletes it.
    pub receipts: &'a Receipts,
    /// The profiles, each with the request whose receipt counts its rows.
    pub mpids: BTreeMap<Mpid, RequestKey>,
}

impl Erasure<'_> {
    /// Whose profiles.
    #[must_use]
    pub const fn controller_id(&self) -> &ControllerId {
        &self.claimed.controller_id
    }

    /// What was received up to here is erased.
    #[must_use]
    pub const fn as_of(&self) -> Timestamp {
        self.claimed.as_of
    }
}

/// What a store holds of a profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Rows received up to the asked instant.
    pub before: i64,
    /// Rows received later.
    pub later: i64,
}

/// A line of a result file, without the line break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportLine {
    /// A profile.
    Profile(Bytes),
    /// An event batch, exactly as it was stored.
    EventBatch(Bytes),
}

/// A place that holds data of subjects.
pub trait DataStore: Send + Sync {
    /// Its name in receipts and metrics.
    fn name(&self) -> &'static str;

    /// Erases the profiles and adds what was deleted to the receipts, in bounded steps. Can be stopped anywhere and
    /// called again: it goes on where it stopped, and nothing is counted twice.
    fn erase<'a>(&'a self, erasure: &'a Erasure<'a>) -> BoxFuture<'a, Result<(), StoreError>>;

    /// What the store holds of each profile that it holds anything of.
    fn count<'a>(
        &'a self,
        controller_id: &'a ControllerId,
        mpids: &'a [Mpid],
        as_of: Timestamp,
    ) -> BoxFuture<'a, Result<BTreeMap<Mpid, Held>, StoreError>>;

    /// Everything of the profiles that was received up to `as_of`: first the profiles, then the event batches.
    /// Memory stays bounded whatever the size.
    fn export<'a>(
        &'a self,
        controller_id: &'a ControllerId,
        mpids: &'a [Mpid],
        as_of: Timestamp,
    ) -> BoxStream<'a, Result<ExportLine, StoreError>>;
}

/// All configured stores.
#[derive(Clone)]
pub struct Stores(Vec<Arc<dyn DataStore>>);

impl std::fmt::Debug for Stores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|store| store.name())).finish()
    }
}

impl Stores {
    /// The built-in store alone.
    #[must_use]
    pub fn built_in(db: &Db) -> Self {
        Self(vec![Arc::new(postgres::PostgresStore::new(db.clone()))])
    }

    /// Every store, in a fixed order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn DataStore>> {
        self.0.iter()
    }
}

/// Everything that all stores hold of the profiles, store after store.
pub fn export_all<'a>(
    stores: &'a Stores,
    controller_id: &'a ControllerId,
    mpids: &'a [Mpid],
    as_of: Timestamp,
) -> impl futures_util::Stream<Item = Result<ExportLine, StoreError>> + 'a {
    use futures_util::StreamExt;
    futures_util::stream::iter(stores.0.iter()).flat_map(move |store| store.export(controller_id, mpids, as_of))
}
