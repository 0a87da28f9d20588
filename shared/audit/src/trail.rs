//! The trail in the database, read in order.

use super::Trust;
use super::verify::{Finding, Problem, Verifier};
use lethe_db::audit::{self, SealedRow};
use lethe_db::{DbError, Tx};
use lethe_domain::audit_chain as chain;

/// Places that are read at once.
const PAGE: i64 = 2_000;

/// Reads places page by page, of all chains or of one.
#[derive(Debug)]
pub struct Pages<'a> {
    only: Option<&'a str>,
    after: (String, i64),
}

impl<'a> Pages<'a> {
    /// From the beginning.
    #[must_use]
    pub fn new(only: Option<&'a str>) -> Self {
        Self { only, after: (String::new(), 0) }
    }

    /// The next page; empty at the end.
    ///
    /// # Errors
    /// [`DbError`].
    pub async fn next(&mut self, tx: &Tx) -> Result<Vec<SealedRow>, DbError> {
        let rows = audit::page(tx, (&self.after.0, self.after.1), self.only, PAGE).await?;
        if let Some(last) = rows.last() {
            self.after = (last.head.chain.clone(), last.head.position);
        }
        Ok(rows)
    }
}

/// What a verification came to.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// Chains that were read.
    pub chains: usize,
    /// Sealed entries that were read.
    pub entries: u64,
    /// Entries that are not sealed yet.
    pub unsealed: i64,
    /// What is wrong; of each chain the first.
    pub findings: Vec<Finding>,
}

/// Recomputes everything; `tx` is one snapshot. `only` narrows it to one chain.
///
/// # Errors
/// [`DbError`].
pub async fn verify(tx: &Tx, trust: Trust, only: Option<&str>) -> Result<Report, DbError> {
    let mut verifier = Verifier::new(trust);
    for (head, signature) in audit::heads(tx, only).await? {
        verifier.head(head, signature);
    }
    let mut pages = Pages::new(only);
    loop {
        let rows = pages.next(tx).await?;
        if rows.is_empty() {
            break;
        }
        for row in &rows {
            verifier.sealed(&row.head, row.entry_id, row.signature.as_deref(), row.entry.as_ref());
        }
    }
    let (chains, entries) = (verifier.chains(), verifier.entries());
    let mut findings = verifier.finish();
    let mut add = |chain: &str, entry_id, problem| {
        findings.push(Finding { chain: chain.to_owned(), position: None, entry_id, problem });
    };
    for (entry_id, chain) in audit::unchained(tx, only).await? {
        add(&chain, Some(entry_id), Problem::Unchained);
    }
    if only.is_none() {
        for entry_id in audit::vanished(tx).await? {
            add(chain::PROCESSOR, Some(entry_id), Problem::Vanished);
        }
    }
    for controller in audit::without_trail(tx, only).await? {
        add(&controller, None, Problem::NoTrail);
    }
    Ok(Report { chains, entries, unsealed: audit::unsealed(tx, only).await?, findings })
}
