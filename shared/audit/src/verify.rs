//! Verifying a trail, from the database or from a file: entries in the order of their chains, then the heads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::Trust;
use lethe_domain::audit_chain::{Digest, Entry, GENESIS, Head, Unfolding};

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "problem", rename_all = "snake_case")]
pub enum Problem {
    /// The entry is not what was chained here: it was changed, or stands in another place.
    Changed,
    /// The entry that was chained here is gone.
    Removed,
    /// Positions up to this one are missing.
    Missing {
        /// The first of them.
        from: i64,
    },
    /// The entry belongs to another chain.
    Misplaced,
    /// The signature is not ours over this digest: something from `from` on was rewritten.
    Forged {
        /// The first position that the signature vouches for and an earlier one does not.
        from: i64,
    },
    /// The chain was signed up to here, and ends before it.
    Truncated {
        /// Where it ends.
        ends_at: i64,
    },
    /// What follows the signed end was appended without a signature.
    Unsigned,
    /// The chain has no signed end.
    NoHead,
    /// The signed end is none of ours.
    ForgedHead,
    /// The lines of an export that tell of single requests do not follow from their set.
    Unfolded,
    /// The entry tells of requests in a way that we do not write.
    Unreadable,
    /// The entry is in no chain, and the sealer was never told of it.
    Unchained,
    /// The sealer was told of the entry, and it is gone.
    Vanished,
    /// The controller has no trail at all.
    NoTrail,
}

/// Something that is wrong with a trail, and where.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The chain: a controller's id, empty for the processor's own.
    pub chain: String,
    /// The place in the chain.
    pub position: Option<i64>,
    /// The number of the entry.
    pub entry_id: Option<i64>,
    /// What is wrong.
    #[serde(flatten)]
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = if self.chain.is_empty() { "the processor's chain" } else { &self.chain };
        write!(f, "{chain}")?;
        if let Some(position) = self.position {
            write!(f, ", position {position}")?;
        }
        if let Some(entry) = self.entry_id {
            write!(f, ", entry {entry}")?;
        }
        match self.problem {
            Problem::Changed => f.write_str(": the entry was changed, or is not in the place where it was sealed"),
            Problem::Removed => f.write_str(": the entry was removed"),
            Problem::Missing { from } => write!(f, ": the positions from {from} up to here are missing"),
            Problem::Misplaced => f.write_str(": the entry belongs to another chain"),
            Problem::Forged { from } => {
                write!(f, ": the signature is not ours; something from position {from} on was rewritten")
            }
            Problem::Truncated { ends_at } => {
                write!(f, ": the chain was signed up to here, but ends at position {ends_at}")
            }
            Problem::Unsigned => f.write_str(": the chain continues beyond its signed end"),
            Problem::NoHead => f.write_str(": the chain has no signed end"),
            Problem::ForgedHead => f.write_str(": the signed end is not ours"),
            Problem::Unreadable => f.write_str(": what the entry tells of requests cannot be read"),
            Problem::Unfolded => f.write_str(": the lines after it do not follow from the set: they were changed"),
            Problem::Unchained => f.write_str(": the entry is in no chain"),
            Problem::Vanished => f.write_str(": the entry was removed before it was sealed"),
            Problem::NoTrail => f.write_str(": the controller has no trail"),
        }
    }
}

/// A chain as far as it was read.
#[derive(Debug)]
struct Chain {
    position: i64,
    digest: Digest,
    /// The last position with a signature that holds.
    signed: i64,
}

/// Checks a trail as it streams by. Of each chain the first finding counts: what follows one follows from it.
#[derive(Debug)]
pub struct Verifier {
    trust: Trust,
    chains: BTreeMap<String, Chain>,
    heads: BTreeMap<String, (Head, String)>,
    findings: Vec<Finding>,
    bad: BTreeSet<String>,
    entries: u64,
}

impl Verifier {
    /// Accepts the signatures of these.
    #[must_use]
    pub fn new(trust: Trust) -> Self {
        Self {
            trust,
            chains: BTreeMap::new(),
            heads: BTreeMap::new(),
            findings: Vec::new(),
            bad: BTreeSet::new(),
            entries: 0,
        }
    }

    /// Adds a finding; of each chain only the first.
    pub fn found(&mut self, chain: &str, position: Option<i64>, entry_id: Option<i64>, problem: Problem) {
        if self.bad.insert(chain.to_owned()) {
            self.findings.push(Finding { chain: chain.to_owned(), position, entry_id, problem });
        }
    }

    /// The next place of a chain: its digest, the signature where the sealer signed here, and its entry where that is
    /// still there. Returns what that tells of requests, if it is what was chained here.
    pub fn sealed(
        &mut self,
        head: &Head,
        entry_id: i64,
        signature: Option<&str>,
        entry: Option<&Entry>,
    ) -> Option<Unfolding> {
        let (chain, position) = (head.chain.as_str(), head.position);
        self.entries += 1;
        let (last, previous, signed) =
            self.chains.get(chain).map_or((0, GENESIS, 0), |before| (before.position, before.digest, before.signed));
        let mut now = Chain { position, digest: head.digest, signed };
        let mut unfolding = None;
        match entry {
            _ if position != last.saturating_add(1) => {
                self.found(chain, Some(position), None, Problem::Missing { from: last.saturating_add(1) });
            }
            None => self.found(chain, Some(position), Some(entry_id), Problem::Removed),
            Some(entry) if entry.chain() != chain => {
                self.found(chain, Some(position), Some(entry_id), Problem::Misplaced);
            }
            Some(entry) if entry.digest(&previous, position) != head.digest => {
                self.found(chain, Some(position), Some(entry_id), Problem::Changed);
            }
            Some(entry) => {
                unfolding = entry.unfold();
                if unfolding.is_none() {
                    self.found(chain, Some(position), Some(entry_id), Problem::Unreadable);
                }
            }
        }
        if let Some(signature) = signature {
            if self.trust.verifies(&head.message(), signature) {
                now.signed = position;
            } else {
                self.found(chain, Some(position), Some(entry_id), Problem::Forged { from: signed.saturating_add(1) });
            }
        }
        self.chains.insert(chain.to_owned(), now);
        unfolding
    }

    /// The signed end of a chain.
    pub fn head(&mut self, head: Head, signature: String) {
        self.heads.insert(head.chain.clone(), (head, signature));
    }

    /// Entries seen.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.entries
    }

    /// Chains seen.
    #[must_use]
    pub fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Compares chains with their signed ends; everything that was found.
    #[must_use]
    pub fn finish(mut self) -> Vec<Finding> {
        let heads = std::mem::take(&mut self.heads);
        let chains = std::mem::take(&mut self.chains);
        for (name, (head, signature)) in &heads {
            let ends_at = chains.get(name).map_or(0, |chain| chain.position);
            let at = Some(head.position);
            if !self.trust.verifies(&head.message(), signature) {
                self.found(name, at, None, Problem::ForgedHead);
            } else if ends_at < head.position {
                self.found(name, at, None, Problem::Truncated { ends_at });
            } else if ends_at > head.position {
                self.found(name, Some(head.position.saturating_add(1)), None, Problem::Unsigned);
            } else if chains.get(name).is_some_and(|chain| chain.digest != head.digest) {
                let from = chains.get(name).map_or(1, |chain| chain.signed.saturating_add(1));
                self.found(name, at, None, Problem::Forged { from });
            }
        }
        for name in chains.keys().filter(|name| !heads.contains_key(*name)) {
            self.found(name, None, None, Problem::NoHead);
        }
        self.findings
    }
}
