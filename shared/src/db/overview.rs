//! Figures over everything, for metrics and `lethe top`.

use super::pool::Session;
use super::{DbError, statements};

statements! {
    BY_STATUS = "SELECT request_type, status, count(*) FROM lethe.requests GROUP BY 1, 2 ORDER BY 1, 2";
    CALLBACKS_BY_STATE = "SELECT state, count(*) FROM lethe.callbacks GROUP BY 1 ORDER BY 1";
    /// Seconds that the oldest item of each stage has been ready; 0 where none is.
    OLDEST = "
        SELECT 'closing' AS stage, min(tick_at) AS since FROM lethe.batches WHERE state = 'open' AND tick_at <= lethe.now()
        UNION ALL
        SELECT 'release', min(runs_at) FROM lethe.batches WHERE state = 'closed' AND runs_at <= lethe.now()
        UNION ALL
        SELECT 'erasure', min(next_attempt_at) FROM lethe.slices
         WHERE state = 'ready' AND stage = 'erasure' AND next_attempt_at <= lethe.now()
        UNION ALL
        SELECT 'compilation', min(next_attempt_at) FROM lethe.slices
         WHERE state = 'ready' AND stage = 'compilation' AND next_attempt_at <= lethe.now()
        UNION ALL
        SELECT 'callback', min(next_attempt_at) FROM lethe.callbacks WHERE state = 'ready' AND next_attempt_at <= lethe.now()
        UNION ALL
        SELECT 'sealing', min(recorded_at) FROM lethe.audit_entries
         WHERE entry_id = (SELECT min(entry_id) FROM lethe.audit_unsealed)
        UNION ALL
        SELECT 'approval', min(received_at) FROM lethe.requests WHERE approval = 'needed' AND status = 'pending'";
    NOW = "SELECT lethe.now()";
    LEADER_EPOCH = "SELECT epoch FROM lethe.leaders WHERE name = 'scheduler'";
}

/// Figures over everything, as of one instant.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Overview {
    /// Requests: type, status, number.
    pub requests: Vec<(String, String, i64)>,
    /// Callbacks: state, number.
    pub callbacks: Vec<(String, i64)>,
    /// Seconds that the oldest ready item of each stage has waited; 0 where there is none.
    pub oldest_seconds: Vec<(String, f64)>,
    /// The epoch of the leading scheduler.
    pub leader_epoch: i64,
}

/// Counts everything.
///
/// # Errors
/// [`DbError`].
pub async fn load(session: &Session) -> Result<Overview, DbError> {
    let requests = session.query(BY_STATUS, &[]).await?;
    let callbacks = session.query(CALLBACKS_BY_STATE, &[]).await?;
    Ok(Overview {
        requests: requests.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect(),
        callbacks: callbacks.iter().map(|row| (row.get(0), row.get(1))).collect(),
        oldest_seconds: oldest(session).await?,
        leader_epoch: session.query_one(LEADER_EPOCH, &[]).await?.get(0),
    })
}

async fn oldest(session: &Session) -> Result<Vec<(String, f64)>, DbError> {
    let now: jiff::Timestamp = session.query_one(NOW, &[]).await?.get(0);
    let rows = session.query(OLDEST, &[]).await?;
    let age =
        |since: Option<jiff::Timestamp>| since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0));
    Ok(rows.iter().map(|row| (row.get(0), age(row.get(1)))).collect())
}
