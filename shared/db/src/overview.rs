//! Figures about everything, for metrics and `lethe top`: totals are kept, and what is open is found by an index. Nothing
//! here reads all of history.
//!
//! **Invariant** (DESIGN rule 18): an index serves every list, gauge and command, however much has ended.

use super::pool::{Column, Session};
use super::{Db, DbError, leader, statements};
use lethe_domain::request::{CallbackState, RequestStatus, RequestType, Stage};

statements! {
    BY_STATUS = "
        SELECT request_type, status, sum(n)::bigint AS number
          FROM (SELECT request_type, status, total AS n FROM lethe.request_totals
                UNION ALL
                SELECT request_type, status, delta FROM lethe.request_deltas) counted
         GROUP BY 1, 2 HAVING sum(n) <> 0 ORDER BY 1, 2";
    CALLBACKS_BY_STATE = "
        SELECT state, sum(n)::bigint AS number
          FROM (SELECT state, total AS n FROM lethe.callback_totals
                UNION ALL
                SELECT state, delta FROM lethe.callback_deltas) counted
         GROUP BY 1 HAVING sum(n) <> 0 ORDER BY 1";
    /// Differences become totals. Whatever is under way is not seen yet, and comes with the next turn.
    FOLD_REQUESTS = "
        WITH taken AS (
            DELETE FROM lethe.request_deltas
             WHERE ctid = ANY (ARRAY (SELECT ctid FROM lethe.request_deltas LIMIT $1))
            RETURNING batch_id, request_type, status, delta),
        totals AS (
            INSERT INTO lethe.request_totals AS t (request_type, status, total)
            SELECT request_type, status, sum(delta) FROM taken GROUP BY 1, 2
            ON CONFLICT (request_type, status) DO UPDATE SET total = t.total + excluded.total),
        batches AS (
            INSERT INTO lethe.batch_totals AS t (batch_id, status, total)
            SELECT batch_id, status, sum(delta) FROM taken WHERE batch_id IS NOT NULL GROUP BY 1, 2
            ON CONFLICT (batch_id, status) DO UPDATE SET total = t.total + excluded.total)
        SELECT count(*) FROM taken";
    FOLD_CALLBACKS = "
        WITH taken AS (
            DELETE FROM lethe.callback_deltas
             WHERE ctid = ANY (ARRAY (SELECT ctid FROM lethe.callback_deltas LIMIT $1))
            RETURNING state, delta),
        totals AS (
            INSERT INTO lethe.callback_totals AS t (state, total) SELECT state, sum(delta) FROM taken GROUP BY 1
            ON CONFLICT (state) DO UPDATE SET total = t.total + excluded.total)
        SELECT count(*) FROM taken";
    /// Since when the oldest item of each stage has been ready; what lies in the future is not ready.
    OLDEST = "
        SELECT 'closing' AS stage, (SELECT min(tick_at) FROM lethe.batches WHERE state = 'open') AS since
        UNION ALL
        SELECT 'release', (SELECT min(runs_at) FROM lethe.batches WHERE state = 'closed')
        UNION ALL
        SELECT work.stage, (SELECT min(next_attempt_at) FROM lethe.slices s WHERE s.state = 'ready' AND s.stage = work.stage)
          FROM unnest($1::text[]) AS work (stage)
        UNION ALL
        SELECT 'sealing', (SELECT recorded_at FROM lethe.audit_entries
                            WHERE entry_id = (SELECT min(entry_id) FROM lethe.audit_unsealed))
        UNION ALL
        SELECT 'approval', (SELECT received_at FROM lethe.requests
                             WHERE approval = 'needed' AND cancelled_at IS NULL ORDER BY request_key LIMIT 1)";
    /// The first callback of each endpoint that has one, read one by one from the index: since when the oldest is due, and
    /// how many of these endpoints are not there.
    OLDEST_CALLBACK = "
        WITH RECURSIVE first AS (
            (SELECT endpoint_id, next_attempt_at FROM lethe.callbacks
              WHERE state = 'ready' ORDER BY endpoint_id, next_attempt_at LIMIT 1)
            UNION ALL
            SELECT next.endpoint_id, next.next_attempt_at
              FROM first CROSS JOIN LATERAL (
                SELECT c.endpoint_id, c.next_attempt_at FROM lethe.callbacks c
                 WHERE c.state = 'ready' AND c.endpoint_id > first.endpoint_id
                 ORDER BY c.endpoint_id, c.next_attempt_at LIMIT 1) next)
        SELECT min(first.next_attempt_at) AS since, count(*) FILTER (WHERE e.endpoint_id IS NULL) AS lost_endpoints
          FROM first LEFT JOIN lethe.endpoints e USING (endpoint_id)";
    NOW = "SELECT lethe.now()";
    LEADER_EPOCH = "SELECT epoch FROM lethe.leaders WHERE name = 'scheduler'";
}

/// Figures over everything, as of one instant.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Overview {
    /// Requests: type, status, number.
    pub requests: Vec<(RequestType, RequestStatus, i64)>,
    /// Callbacks: state, number.
    pub callbacks: Vec<(CallbackState, i64)>,
    /// Seconds that the oldest ready item of each stage has waited; 0 where there is none.
    pub oldest_seconds: Vec<(String, f64)>,
    /// Endpoints with callbacks that are to be delivered and no row of their own: lost with a restore.
    pub lost_endpoints: i64,
    /// The epoch of the leading scheduler.
    pub leader_epoch: i64,
}

/// Reads the totals, and looks for the oldest work of each stage.
///
/// # Errors
/// [`DbError`].
pub async fn load(session: &Session) -> Result<Overview, DbError> {
    let requests = session.query(BY_STATUS, &[]).await?;
    let callbacks = session.query(CALLBACKS_BY_STATE, &[]).await?;
    let now: jiff::Timestamp = session.value(NOW, &[]).await?;
    let age =
        |since: Option<jiff::Timestamp>| since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0));
    let mut oldest: Vec<(String, f64)> = session
        .query(OLDEST, &[&Stage::ALL])
        .await?
        .iter()
        .map(|row| (row.get("stage"), age(row.get("since"))))
        .collect();
    let callback = session.query_one(OLDEST_CALLBACK, &[]).await?;
    oldest.push(("callback".to_owned(), age(callback.get("since"))));
    Ok(Overview {
        requests: requests
            .iter()
            .map(|row| Ok((row.column("request_type")?, row.column("status")?, row.get("number"))))
            .collect::<Result<_, DbError>>()?,
        callbacks: callbacks
            .iter()
            .map(|row| Ok((row.column("state")?, row.get("number"))))
            .collect::<Result<_, DbError>>()?,
        oldest_seconds: oldest,
        lost_endpoints: callback.get("lost_endpoints"),
        leader_epoch: session.value(LEADER_EPOCH, &[]).await?,
    })
}

/// The same, as of one instant and within a bounded time: whoever measures again and again must not fall behind.
///
/// # Errors
/// [`DbError`].
pub async fn measure(db: &Db) -> Result<Overview, DbError> {
    let tx = db.begin_snapshot("measure").await?;
    tx.batch_execute("SET LOCAL statement_timeout = '10s'").await?;
    let overview = load(&tx).await?;
    tx.commit().await?;
    Ok(overview)
}

/// Folds up to `limit` differences of each kind into the totals; returns how many there were.
///
/// # Errors
/// [`DbError::LeadershipLost`].
pub async fn fold(db: &Db, epoch: i64, limit: i64) -> Result<i64, DbError> {
    // The end of a batch folds what is left of it: each takes its rows of differences in an order of its own.
    super::retrying(|| async {
        let tx = db.begin("fold_totals").await?;
        leader::assert(&tx, epoch).await?;
        let requests: i64 = tx.value(FOLD_REQUESTS, &[&limit]).await?;
        let callbacks: i64 = tx.value(FOLD_CALLBACKS, &[&limit]).await?;
        tx.commit().await?;
        Ok(requests.max(callbacks))
    })
    .await
}
