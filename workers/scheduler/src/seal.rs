//! Sealing the audit trail: within seconds, in bounded groups, so that everything else has its turn.

use std::time::{Duration, Instant};

use lethe::audit::{SealError, Sealer};
use lethe::db::{Db, DbError};

/// So long one round seals.
const ROUND: Duration = Duration::from_millis(300);

/// Seals what is not sealed yet.
pub(crate) async fn entries(sealer: &mut Sealer, db: &Db, epoch: i64) -> Result<(), DbError> {
    let started = Instant::now();
    while started.elapsed() < ROUND {
        match sealer.group(db, epoch).await {
            Ok(0) => break,
            Ok(entries) => metrics::counter!("lethe_audit_sealed_total").increment(entries as u64),
            Err(SealError::Db(error)) => return Err(error),
            Err(SealError::Signing(error)) => {
                tracing::error!(%error, "the audit trail was not signed; trying again");
                break;
            }
        }
    }
    metrics::gauge!("lethe_audit_broken_chains").set(f64::from(u32::try_from(sealer.broken()).unwrap_or(u32::MAX)));
    Ok(())
}
