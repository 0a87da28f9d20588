//! The sealer: gives entries their places in the chains, and signs how far each chain goes. Under the epoch of the
//! leading scheduler, so that there is one at a time.
//!
//! **Invariant** (DESIGN rule 12): an entry is written in the transaction of what it records, and chained here, by one
//! process at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Signatory;
use lethe_db::audit::{self, NewSeal};
use lethe_db::{Db, DbError, leader};
use lethe_domain::audit_chain::{Digest, Entry, GENESIS, Head};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature::sign_all;
use lethe_signing::signing_keys::SigningError;

/// Entries of a transaction at most.
const GROUP: i64 = 2_000;
/// A chain that cannot be continued is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_mins(1);

/// Why entries could not be sealed. They stay where they are.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The library refused to sign.
    #[error(transparent)]
    Signing(#[from] SigningError),
}

/// Seals, and remembers how far.
#[derive(Debug)]
pub struct Sealer {
    signatory: Arc<Signatory>,
    /// The end of each chain as we have seen it: position and digest.
    known: BTreeMap<String, (i64, Digest)>,
    /// Chains whose end is none that we signed. To continue one would be to vouch for whatever was done to it.
    broken: BTreeSet<String>,
    looked: Instant,
}

impl Sealer {
    /// Signs as `signatory`, and continues what its certificates have signed.
    #[must_use]
    pub fn new(signatory: Arc<Signatory>) -> Self {
        Self { signatory, known: BTreeMap::new(), broken: BTreeSet::new(), looked: Instant::now() }
    }

    /// Chains that cannot be continued.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.broken.len()
    }

    /// Seals the next group of entries in one transaction; returns how many there were.
    ///
    /// # Errors
    /// [`SealError`]; [`DbError::LeadershipLost`] where `epoch` is over.
    pub async fn group(&mut self, db: &Db, epoch: i64) -> Result<usize, SealError> {
        if self.looked.elapsed() >= LOOK_AGAIN {
            self.looked = Instant::now();
            self.broken.clear();
        }
        loop {
            if let Some(sealed) = self.attempt(db, epoch).await? {
                return Ok(sealed);
            }
        }
    }

    /// `None`: a chain turned out to be broken; the next attempt leaves it out.
    async fn attempt(&mut self, db: &Db, epoch: i64) -> Result<Option<usize>, SealError> {
        let tx = db.begin("seal_audit_entries").await?;
        leader::assert(&tx, epoch).await?;
        let left_out: Vec<&str> = self.broken.iter().map(String::as_str).collect();
        let entries = audit::take(&tx, &left_out, GROUP).await?;
        if entries.is_empty() {
            tx.rollback().await;
            return Ok(Some(0));
        }
        let chains: BTreeSet<&str> = entries.iter().map(Entry::chain).collect();
        let chains: Vec<&str> = chains.into_iter().collect();
        let (signed_at, ends) = audit::lock_heads(&tx, &chains).await?;
        if let Some(broken) = chains.iter().find(|chain| !self.may_continue(chain, ends.get(**chain))) {
            tracing::error!(
                chain = broken,
                "the end of an audit chain is none of ours; it is not continued: run `lethe audit verify`"
            );
            self.broken.insert((*broken).to_owned());
            tx.rollback().await;
            return Ok(None);
        }
        let mut heads: BTreeMap<&str, Head> = chains
            .iter()
            .map(|chain| {
                let (position, digest) =
                    ends.get(*chain).map_or((0, GENESIS), |(head, _)| (head.position, head.digest));
                (*chain, Head { chain: (*chain).to_owned(), position, digest, signed_at })
            })
            .collect();
        let mut seals = Vec::with_capacity(entries.len());
        for entry in &entries {
            let Some(head) = heads.get_mut(entry.chain()) else { continue };
            head.position += 1;
            head.digest = entry.digest(&head.digest, head.position);
            seals.push(NewSeal {
                chain: entry.chain(),
                position: head.position,
                entry_id: entry.entry_id,
                digest: head.digest,
            });
        }
        let bodies = heads.values().map(|head| (SignatureAlgorithm::RsaPkcs1v15, head.message())).collect();
        let signatures = sign_all(self.signatory.processor.signer.clone(), bodies).await;
        let signatures: Vec<String> = signatures.into_iter().collect::<Result<_, _>>()?;
        let heads: Vec<(Head, String)> = heads.into_values().zip(signatures).collect();
        audit::write_seals(&tx, &seals, &heads).await?;
        let sealed = seals.len();
        tx.commit().await?;
        self.known.extend(heads.into_iter().map(|(head, _)| (head.chain, (head.position, head.digest))));
        Ok(Some(sealed))
    }

    /// Whether the end of a chain as the database shows it is one that we signed, and not an earlier one than we have
    /// seen already.
    fn may_continue(&self, chain: &str, end: Option<&(Head, String)>) -> bool {
        match (self.known.get(chain), end) {
            (None, None) => true,
            (Some(_), None) => false,
            (Some((position, digest)), Some((head, _))) if head.position == *position => head.digest == *digest,
            (Some((position, _)), Some((head, _))) if head.position < *position => false,
            (_, Some((head, signature))) => self.signatory.trust.verifies(&head.message(), signature),
        }
    }
}
