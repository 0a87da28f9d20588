//! The end of results (contract 7): first the link and the wrapped key, in one transaction; then the bytes.

use std::time::Duration;

use lethe_db::{DbError, results};
use lethe_results::store;
use uuid::Uuid;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

const LINKS_AT_ONCE: i64 = 500;
const OBJECTS_AT_ONCE: i64 = 64;

/// Ends links whose lifetime is over.
pub(crate) struct Links;
/// Deletes the bytes of results that have expired, and whatever a compiler has left beside them that was no longer the one
/// at work. What cannot be deleted is tried again later, and keeps no other.
pub(crate) struct Objects;

impl Part for Links {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "expiry"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        let expired = results::expire(&scheduler.service.db, &term, LINKS_AT_ONCE).await?;
        if expired > 0 {
            tracing::info!(results = expired, "results expired");
        }
        Ok(Turn::at_once_if(i64::try_from(expired).is_ok_and(|expired| expired == LINKS_AT_ONCE)))
    }
}

impl Part for Objects {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "objects"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let db = &scheduler.service.db;
        let due = results::expired_objects(&db.session().await?, OBJECTS_AT_ONCE).await?;
        if due.is_empty() {
            return Ok(Turn::Later);
        }
        let more = i64::try_from(due.len()).is_ok_and(|due| due == OBJECTS_AT_ONCE);
        let (mut gone, mut failed): (Vec<Uuid>, Vec<Uuid>) = (Vec::new(), Vec::new());
        let mut first = None;
        let ready = &scheduler.ready;
        let folders = due.into_iter().map(|(result, path)| (result, store::folder_of(&path)));
        for (result, outcome) in store::empty_all(&ready.results, &ready.results_url, folders).await {
            match outcome {
                Ok(()) => gone.push(result),
                Err(error) => {
                    failed.push(result);
                    first.get_or_insert(error);
                }
            }
        }
        if let Some(error) = first {
            tracing::warn!(results = failed.len(), %error, "expired results could not be deleted; their deletion is tried again later");
            metrics::counter!("lethe_result_deletions_failed_total").increment(failed.len() as u64);
        }
        results::record_deletions(&db.session().await?, &gone, &failed).await?;
        Ok(Turn::at_once_if(more))
    }
}
