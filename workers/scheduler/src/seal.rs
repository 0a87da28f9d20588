//! Sealing the audit trail: within seconds, in bounded groups.

use std::time::{Duration, Instant};

use lethe_audit::{SealError, Sealer};
use lethe_db::DbError;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

/// How long one turn seals.
const TURN: Duration = Duration::from_millis(300);

/// Seals what is not sealed yet. What it does can be done at any time by any clock.
pub(crate) struct Seal(pub(crate) Sealer);

impl Part for Seal {
    const EVERY: Duration = Duration::from_millis(500);

    fn name(&self) -> &'static str {
        "sealing"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(epoch) = scheduler.lead.epoch() else { return Ok(Turn::Later) };
        let started = Instant::now();
        let sealer = &mut self.0;
        let mut turn = Turn::AtOnce;
        while started.elapsed() < TURN {
            match sealer.group(&scheduler.service.db, epoch).await {
                Ok(0) => {
                    turn = Turn::Later;
                    break;
                }
                Ok(entries) => metrics::counter!("lethe_audit_sealed_total").increment(entries as u64),
                Err(SealError::Db(error)) => return Err(error),
                Err(SealError::Signing(error)) => {
                    tracing::error!(%error, "the audit trail was not signed; trying again");
                    turn = Turn::Later;
                    break;
                }
            }
        }
        metrics::gauge!("lethe_audit_broken_chains").set(f64::from(u32::try_from(sealer.broken()).unwrap_or(u32::MAX)));
        Ok(turn)
    }
}
