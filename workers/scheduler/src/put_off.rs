//! What was put off while PostgreSQL's clock was ahead would stay put off for as long as it was ahead.

use std::time::Duration;

use lethe_db::DbError;
use lethe_db::put_off;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

const AT_ONCE: i64 = 500;

/// Brings back what is put off further than anything waits.
pub(crate) struct PutOff;

impl Part for PutOff {
    const EVERY: Duration = Duration::from_secs(10);

    fn name(&self) -> &'static str {
        "put_off"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let brought = put_off::bring_back(&scheduler.service.db, &term, scheduler.ready.longest, AT_ONCE).await?;
        if brought.items > 0 {
            tracing::warn!(items = brought.items, "work that a clock running ahead had put off was brought forward");
        }
        Ok(Turn::soon_if(brought.more))
    }
}
