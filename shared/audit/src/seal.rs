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
use lethe_db::{Db, DbError, Tx, leader};
use lethe_domain::audit_chain::{Digest, Entry, GENESIS, Head};
use lethe_domain::crypto;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature::sign_all;
use lethe_signing::signing_keys::SigningError;
use serde_json::json;

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

/// The end of a chain, and when it was seen: another server may lack what this one had (ADR 0027).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    position: i64,
    digest: Digest,
    seen_at: Instant,
}

/// What the end of a chain in the database is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The one that we know, or a later one that we signed.
    Ours,
    /// One that we signed, before the one that we know from a session of before: the server that we are connected to now has
    /// lost what came after it, or was restored.
    CutBack(Known),
    /// Not one that we signed, or an earlier one in a server that had more.
    Foreign,
}

/// Seals, and remembers how far.
#[derive(Debug)]
pub struct Sealer {
    signatory: Arc<Signatory>,
    /// The end of each chain as we have seen it.
    known: BTreeMap<String, Known>,
    /// Chains whose end is none that we signed, and when we saw it. To continue one would be to vouch for whatever was done to
    /// it.
    broken: BTreeMap<String, Instant>,
    looked: Instant,
}

impl Sealer {
    /// Signs as `signatory`, and continues what its certificates have signed.
    #[must_use]
    pub fn new(signatory: Arc<Signatory>) -> Self {
        Self { signatory, known: BTreeMap::new(), broken: BTreeMap::new(), looked: Instant::now() }
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
        let connected_at = tx.connected_at();
        self.broken.retain(|_, seen_at| connected_at <= *seen_at);
        let left_out: Vec<&str> = self.broken.keys().map(String::as_str).collect();
        let entries = audit::take(&tx, &left_out, GROUP).await?;
        if entries.is_empty() {
            tx.rollback().await;
            return Ok(Some(0));
        }
        let chains: BTreeSet<&str> = entries.iter().map(Entry::chain).collect();
        let chains: Vec<&str> = chains.into_iter().collect();
        let (signed_at, ends) = audit::lock_heads(&tx, &chains).await?;
        let found = |chain: &str| self.judge(chain, ends.get(chain), connected_at);
        if let Some(broken) = chains.iter().find(|chain| found(chain) == End::Foreign) {
            tracing::error!(
                chain = broken,
                "the end of an audit chain is not ours, so the chain is not continued: run `lethe audit verify`"
            );
            self.broken.insert((*broken).to_owned(), Instant::now());
            tx.rollback().await;
            return Ok(None);
        }
        for chain in &chains {
            if let End::CutBack(known) = found(chain) {
                let to = ends.get(*chain).map_or(0, |(head, _)| head.position);
                cut_back(&tx, chain, known, to).await?;
            }
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
            let set = entry.set();
            head.digest = entry.digest_by(set, &head.digest, head.position);
            seals.push(NewSeal {
                chain: entry.chain(),
                position: head.position,
                entry_id: entry.entry_id,
                digest: head.digest,
                lines: set.map_or(0, |set| set.length),
            });
        }
        let bodies = heads.values().map(|head| (SignatureAlgorithm::RsaPkcs1v15, head.message())).collect();
        let signatures = sign_all(self.signatory.processor.signer.clone(), bodies).await;
        let signatures: Vec<String> = signatures.into_iter().collect::<Result<_, _>>()?;
        let heads: Vec<(Head, String)> = heads.into_values().zip(signatures).collect();
        audit::write_seals(&tx, &seals, &heads).await?;
        let sealed = seals.len();
        tx.commit().await?;
        let seen_at = Instant::now();
        self.known.extend(heads.into_iter().map(|(head, _)| {
            let Head { chain, position, digest, .. } = head;
            (chain, Known { position, digest, seen_at })
        }));
        Ok(Some(sealed))
    }

    /// What the end of a chain is that the database shows in a session of that age.
    fn judge(&self, chain: &str, end: Option<&(Head, String)>, connected_at: Instant) -> End {
        let known = self.known.get(chain);
        if let (Some(known), Some((head, _))) = (known, end)
            && (head.position, head.digest) == (known.position, known.digest)
        {
            return End::Ours;
        }
        // Nothing is where a chain begins.
        let is_signed = end.is_none_or(|(head, signature)| self.signatory.trust.verifies(&head.message(), signature));
        let position = end.map_or(0, |(head, _)| head.position);
        match known {
            _ if !is_signed => End::Foreign,
            Some(known) if position <= known.position && connected_at > known.seen_at => End::CutBack(*known),
            Some(known) if position <= known.position => End::Foreign,
            _ => End::Ours,
        }
    }
}

/// Enters in a chain that its end was lost, and says so.
async fn cut_back(tx: &Tx, chain: &str, known: Known, to: i64) -> Result<(), DbError> {
    tracing::error!(
        chain,
        from = known.position,
        to,
        "PostgreSQL has lost the end of an audit chain; the chain is continued and records it: was there a failover \
         that lost commits, or a restore? If not, verify against the last export"
    );
    metrics::counter!("lethe_audit_cut_back_total").increment(1);
    let controller = chain.parse().ok();
    let details = json!({"from": known.position, "digest": crypto::hex(&known.digest), "to": to});
    audit::record(tx, controller.as_ref(), None, "trail.cut_back", &details).await
}
