//! The keys of the days of expiry: each wraps the keys of the files that expire on its day. They lie
//! outside PostgreSQL, sealed under the master key. Once the day is over its key is destroyed, and no dump, backup or
//! write-ahead log can bring a file of that day back.
//!
//! **Invariant** (DESIGN rule 13): destroying the key of a day is what makes the expiry of its files final.

use std::sync::Arc;

use futures_util::TryStreamExt;
use jiff::civil::Date;

use super::store::{self, Store};
use lethe_domain::crypto::{CryptoError, KEY_LEN, Keys, SealingKey, random};

/// A day's key could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DayKeyError {
    /// The key store failed.
    #[error("the key store failed: {source}")]
    Store {
        /// What it said.
        #[from]
        source: object_store::Error,
    },
    /// The key store accepts calls and does not answer them.
    #[error("the key store does not answer")]
    Silent,
    /// The key was sealed under another master key, or changed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The day is over and its key destroyed.
    #[error("the key of {day} has been destroyed")]
    Destroyed {
        /// Which day.
        day: Date,
    },
}

/// The key store.
#[derive(Clone, Debug)]
pub struct DayKeys {
    store: Store,
    keys: Arc<Keys>,
}

fn path(day: Date) -> String {
    format!("{day}.key")
}

fn context(day: Date) -> Vec<u8> {
    format!("key of the expiry day {day}").into_bytes()
}

impl DayKeys {
    /// Keys in `store`, sealed under the master key.
    #[must_use]
    pub const fn new(store: Store, keys: Arc<Keys>) -> Self {
        Self { store, keys }
    }

    /// The key of a day; made by whoever needs it first.
    ///
    /// # Errors
    /// [`DayKeyError`].
    pub async fn get_or_create(&self, day: Date) -> Result<SealingKey, DayKeyError> {
        if let Some(sealed) = store::read(&self.store, &path(day)).await? {
            return self.open(day, &sealed);
        }
        let key = random::<KEY_LEN>()?;
        let sealed = self.keys.days().seal(&context(day), &key)?;
        if store::create(&self.store, &path(day), sealed).await? {
            return Ok(SealingKey::new(&key)?);
        }
        // Another process was faster: its key counts.
        self.get(day).await
    }

    /// The key of a day, where it is still there.
    ///
    /// # Errors
    /// [`DayKeyError::Destroyed`] where it is not.
    pub async fn get(&self, day: Date) -> Result<SealingKey, DayKeyError> {
        let sealed = store::read(&self.store, &path(day)).await?.ok_or(DayKeyError::Destroyed { day })?;
        self.open(day, &sealed)
    }

    fn open(&self, day: Date, sealed: &[u8]) -> Result<SealingKey, DayKeyError> {
        Ok(SealingKey::new(&self.keys.days().open(&context(day), sealed)?)?)
    }

    /// Destroys the keys of all days before `today`, several at once; one that cannot be destroyed keeps no other.
    ///
    /// # Errors
    /// [`DayKeyError`] where the store cannot be listed.
    pub async fn destroy_before(&self, today: Date) -> Result<Destroyed, DayKeyError> {
        let listed = tokio::time::timeout(store::CALL_LIMIT, self.store.list(None).try_collect::<Vec<_>>()).await;
        let objects = listed.map_err(|_| DayKeyError::Silent)??;
        let over = objects.into_iter().filter_map(|object| {
            let day = object.location.filename()?.strip_suffix(".key")?.parse::<Date>().ok()?;
            (day < today).then(|| (day, object.location.to_string()))
        });
        let mut destroyed = Destroyed::default();
        for (day, outcome) in store::delete_all(&self.store, over.collect::<Vec<_>>()).await {
            match outcome {
                Ok(()) => destroyed.days += 1,
                Err(error) => {
                    tracing::warn!(%day, %error, "the key of an expiry day could not be destroyed; trying again");
                    destroyed.failed += 1;
                }
            }
        }
        Ok(destroyed)
    }
}

/// What became of the keys of days that are over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destroyed {
    /// So many are gone.
    pub days: usize,
    /// So many could not be destroyed.
    pub failed: usize,
}
