//! The purge: what is personal in a request goes a while after the request has ended; keyed digests stay.

use std::time::Duration;

use super::{Db, DbError, leader, statements};
use crate::request::{BatchId, RequestKey};

statements! {
    /// What is completed was of a batch that has run; so the many that still wait for theirs are not looked at, however
    /// short the retention.
    BATCHES = "SELECT batch_id FROM lethe.batches WHERE runs_at <= lethe.now() - make_interval(secs => $1)";
    /// A callback that is still to be delivered needs its URL.
    PURGE = "
        WITH until AS MATERIALIZED (SELECT lethe.now() - make_interval(secs => $1) AS instant),
        ended AS (
            SELECT r.request_key FROM lethe.requests r
             WHERE r.sealed_request IS NOT NULL AND r.cancelled_at <= (SELECT instant FROM until)
            UNION ALL
            SELECT r.request_key FROM lethe.requests r
             WHERE r.batch_id = ANY ($3) AND r.sealed_request IS NOT NULL
               AND r.completed_at <= (SELECT instant FROM until)),
        due AS MATERIALIZED (
            SELECT r.request_key FROM ended JOIN lethe.requests r USING (request_key)
             WHERE r.sealed_request IS NOT NULL
               AND NOT EXISTS (SELECT FROM lethe.callbacks c
                                WHERE c.request_key = r.request_key AND c.state IN ('waiting', 'ready'))
             LIMIT $2 FOR UPDATE OF r SKIP LOCKED)
        UPDATE lethe.requests r SET sealed_request = NULL, purged_at = lethe.now()
          FROM due WHERE r.request_key = due.request_key
        RETURNING r.request_key";
    FORGET_MPIDS = "DELETE FROM lethe.request_mpids WHERE request_key = ANY ($1)";
}

/// Purges requests that ended longer than `retention` ago, at most `limit`; returns how many.
///
/// # Errors
/// [`DbError::LeadershipLost`].
pub async fn requests(db: &Db, epoch: i64, retention: Duration, limit: i64) -> Result<usize, DbError> {
    super::retrying(|| async {
        let tx = db.begin("purge_requests").await?;
        leader::assert(&tx, epoch).await?;
        let batches = tx.query(BATCHES, &[&retention.as_secs_f64()]).await?;
        let batches: Vec<BatchId> = batches.iter().map(|row| row.get(0)).collect();
        let rows = tx.query(PURGE, &[&retention.as_secs_f64(), &limit, &batches]).await?;
        let keys: Vec<RequestKey> = rows.iter().map(|row| row.get(0)).collect();
        if !keys.is_empty() {
            tx.execute(FORGET_MPIDS, &[&keys]).await?;
        }
        tx.commit().await?;
        Ok(keys.len())
    })
    .await
}
