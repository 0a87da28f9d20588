//! What ends by itself: result files (first the keys, then the bytes, contract 7) and remembered cancellations.

use lethe::db::{DbError, requests, results};
use lethe::results::store;

use crate::schedule::Scheduler;

const AT_ONCE: i64 = 500;

/// Ends what is over.
pub(crate) async fn due(scheduler: &Scheduler, epoch: i64) -> Result<(), DbError> {
    results(scheduler, epoch).await?;
    cancellations(scheduler).await
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
