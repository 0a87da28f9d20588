//! What ends by itself: result files (first the keys, then the bytes, contract 7), the personal data of requests that
//! ended a while ago, remembered cancellations, counts of failures.

use std::time::Duration;

use lethe::db::{DbError, message_failures, purge, requests, results};
use lethe::results::store;

use crate::schedule::Scheduler;

const AT_ONCE: i64 = 500;
/// Requests of a purge: each takes its profiles with it, up to the cap and beyond.
const PURGED_AT_ONCE: i64 = 200;
/// A message lives for 14 days (contract 3).
const MESSAGES_LIVE: Duration = Duration::from_hours(15 * 24);

/// Ends what is over.
pub(crate) async fn due(scheduler: &Scheduler, epoch: i64) -> Result<(), DbError> {
    results(scheduler, epoch).await?;
    purge(scheduler, epoch).await?;
    message_failures::forget_old(&scheduler.service.db.session().await?, MESSAGES_LIVE).await?;
    cancellations(scheduler).await
}

/// Purges requests that ended longer ago than the retention.
async fn purge(scheduler: &Scheduler, epoch: i64) -> Result<(), DbError> {
    let purged = purge::requests(&scheduler.service.db, epoch, scheduler.ready.retention, PURGED_AT_ONCE).await?;
    if purged > 0 {
        tracing::info!(requests = purged, "the personal data of requests that ended was purged");
        metrics::counter!("lethe_requests_purged_total").increment(purged as u64);
    }
    Ok(())
}

/// Forgets cancellations whose request never came.
async fn cancellations(scheduler: &Scheduler) -> Result<(), DbError> {
    let forgotten = requests::forget_cancellations(&scheduler.service.db).await?;
    if forgotten > 0 {
        tracing::info!(cancellations = forgotten, "remembered cancellations ran out; their requests never came");
    }
    Ok(())
}

/// Ends links whose lifetime is over, destroys the keys of days that are over, deletes bytes. A step that fails is
/// taken again in the next round: each is found by what is still there.
async fn results(scheduler: &Scheduler, epoch: i64) -> Result<(), DbError> {
    let db = &scheduler.service.db;
    let expired = results::expire(db, epoch, AT_ONCE).await?;
    if expired > 0 {
        tracing::info!(results = expired, "results expired");
    }
    let session = db.session().await?;
    let today = results::today(&session).await?;
    match scheduler.ready.day_keys.destroy_before(today).await {
        Ok(0) => {}
        Ok(days) => tracing::info!(days, "keys of days of expiry destroyed"),
        Err(error) => tracing::warn!(%error, "keys of days of expiry could not be destroyed; trying again"),
    }
    for (result_id, path) in results::expired_objects(&session, AT_ONCE).await? {
        match store::delete(&scheduler.ready.results, &path).await {
            Ok(()) => results::forget_object(&session, result_id).await?,
            Err(error) => {
                tracing::warn!(%error, "an expired result could not be deleted; trying again");
                break;
            }
        }
    }
    Ok(())
}
