//! What the doctor checks for the schedulers: the key store, the clock, and what a restore has lost.

use lethe_db::leader;
use lethe_db::{Db, batches};
use lethe_results::store::{self, Fitness};
use url::Url;

use super::clock::is_doubted;
use super::doctor_findings::{Findings, Verdict};

/// Tries out what a key store must be able to do.
pub(super) async fn key_store(findings: &mut Findings, url: &Url) {
    // Where it cannot be opened, that was said already.
    let Ok(key_store) = store::open("LETHE_KEY_STORE", url) else { return };
    let advice = "see \"The key store\" in docs/operate/keys.md; schedulers and compilers refuse it";
    match store::probe(&key_store, url).await {
        Ok(fitness @ Fitness::Fit) => findings.add("key store", Verdict::Good, fitness.as_str(), ""),
        Ok(fitness @ Fitness::Unknown) => findings.add(
            "key store",
            Verdict::Look,
            fitness.as_str(),
            "make sure that the bucket has no versioning, no object lock and no soft deletion",
        ),
        Ok(fitness) => findings.add("key store", Verdict::Bad, fitness.as_str(), advice),
        Err(error) => {
            findings.add("key store", Verdict::Bad, error, "check its address, credentials and network path");
        }
    }
}

/// The clock, as the leading scheduler judges it.
pub(super) async fn clock(findings: &mut Findings, db: &Db) {
    let known = async { leader::clock(&db.session().await?).await };
    match known.await {
        Err(error) => findings.add("clock", Verdict::Bad, error, ""),
        Ok(known) if is_doubted(&known) => findings.add(
            "clock",
            Verdict::Bad,
            format!(
                "PostgreSQL's is {} s ahead of what the leading scheduler believes; irreversible work waits",
                known.ahead().unwrap_or_default().as_secs()
            ),
            "correct the clock of PostgreSQL's host; if it is right, run `lethe clock agree`",
        ),
        Ok(_) => {}
    }
}

/// Requests and callbacks that nothing will ever move.
pub(super) async fn lost(findings: &mut Findings, db: &Db, lost_endpoints: i64) {
    let found = async { batches::without_batch(&db.session().await?).await };
    match found.await {
        Err(error) => findings.add("lost batches", Verdict::Bad, error, ""),
        Ok(lost) => {
            for (batch, requests) in lost {
                findings.add(
                    "lost batches",
                    Verdict::Bad,
                    format!("{requests} pending requests name batch {batch}, which does not exist"),
                    "see \"Requests without a batch\" in docs/operate/runbook.md",
                );
            }
        }
    }
    if lost_endpoints > 0 {
        findings.add(
            "lost endpoints",
            Verdict::Bad,
            format!("callbacks name {lost_endpoints} endpoints that do not exist"),
            "see \"Requests without a batch\" in docs/operate/runbook.md",
        );
    }
}
