//! The end of records: years after a request has ended nothing of it is left but its id, its digest, its status and the times
//! that were answered. These stay for good, so that a repetition is always recognised, and so does the audit trail.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::leader::{self, Term};
use super::{Db, DbError, Tx, statements};
use lethe_domain::request::BatchId;

statements! {
    /// Removing needs to be said, and ends with the transaction (migration V0020).
    ANNOUNCE = "SELECT set_config('lethe.removing_records', 'on', true)";
    /// A batch whose requests have all ended, the oldest first.
    NEXT_BATCH = "
        SELECT batch_id FROM lethe.batches
         WHERE state = 'completed' AND completed_at <= lethe.now() - make_interval(secs => $1) AND batch_id <> ALL ($2)
         ORDER BY runs_at, batch_id LIMIT 1";
    /// The next requests of a batch, or of none (cancelled before they had one), and whether each may go: ended long enough
    /// ago, nothing personal left, no callback on its way, no bytes of a result left. Counted, and not asked for existence:
    /// that may be planned as one look at all callbacks.
    WALK = "
        SELECT r.request_key, r.controller_id,
               coalesce(coalesce(r.completed_at, r.cancelled_at) <= (SELECT lethe.now()) - make_interval(secs => $1), false)
                   AND w.week IS NULL
                   AND (SELECT count(*) FROM lethe.callbacks c
                         WHERE c.request_key = r.request_key AND c.state IN ('waiting', 'ready')) = 0
                   AND (SELECT count(*) FROM lethe.results s
                         WHERE s.request_key = r.request_key AND (s.expired_at IS NULL OR s.object_path IS NOT NULL)) = 0 AS is_due
          FROM lethe.requests r LEFT JOIN lethe.detail_weeks w ON w.week = r.details_week
         WHERE r.batch_id = $2 AND (r.controller_id, r.request_key) > ($3, $4)
         ORDER BY r.controller_id, r.request_key LIMIT $5";
    WALK_WITHOUT_BATCH = "
        SELECT r.request_key, r.controller_id,
               coalesce(r.cancelled_at <= (SELECT lethe.now()) - make_interval(secs => $1), false)
                   AND w.week IS NULL
                   AND (SELECT count(*) FROM lethe.callbacks c
                         WHERE c.request_key = r.request_key AND c.state IN ('waiting', 'ready')) = 0 AS is_due
          FROM lethe.requests r LEFT JOIN lethe.detail_weeks w ON w.week = r.details_week
         WHERE r.batch_id IS NULL AND (r.controller_id, r.request_key) > ($2, $3)
         ORDER BY r.controller_id, r.request_key LIMIT $4";
    KEEP = "
        INSERT INTO lethe.past_requests (controller_id, subject_request_id, request_key, api_version, request_type, status,
                                         content_digest, received_at, expected_completion_time, ended_at,
                                         cancellation_received_at)
        SELECT controller_id, subject_request_id, request_key, api_version, request_type, status, content_digest,
               received_at, expected_completion_time, coalesce(completed_at, cancelled_at), cancellation_received_at
          FROM lethe.requests WHERE request_key = ANY ($1) ORDER BY controller_id, subject_request_id";
    REMOVE_ATTEMPTS = "
        DELETE FROM lethe.callback_attempts a USING lethe.callbacks c
         WHERE c.request_key = ANY ($1) AND a.callback_id = c.callback_id";
    REMOVE_RESULTS = "DELETE FROM lethe.results WHERE request_key = ANY ($1)";
    REMOVE_REQUESTS = "DELETE FROM lethe.requests WHERE request_key = ANY ($1)";
    REMOVE_CALLBACKS = "DELETE FROM lethe.callbacks WHERE request_key = ANY ($1)";
    IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM lethe.requests WHERE batch_id = $1)";
    /// With the receipts of all their requests.
    REMOVE_SLICES = "
        WITH ended AS MATERIALIZED (SELECT slice_id FROM lethe.slices WHERE batch_id = $1 LIMIT $2),
        receipts AS (
            DELETE FROM lethe.slice_receipts WHERE slice_id = ANY (ARRAY (SELECT slice_id FROM ended)))
        DELETE FROM lethe.slices WHERE slice_id = ANY (ARRAY (SELECT slice_id FROM ended))";
    /// A difference that comes to be folded later would leave a total of nothing behind. First the differences, as
    /// everyone who folds, and the totals with a look of their own: a fold may have ended meanwhile.
    FOLD_BATCH = "
        WITH folded AS (DELETE FROM lethe.request_deltas WHERE batch_id = $1 RETURNING request_type, status, delta)
        INSERT INTO lethe.request_totals AS t (request_type, status, total)
        SELECT request_type, status, sum(delta) FROM folded GROUP BY 1, 2
        ON CONFLICT (request_type, status) DO UPDATE SET total = t.total + excluded.total";
    FORGET_TOTALS = "DELETE FROM lethe.batch_totals WHERE batch_id = $1";
    REMOVE_BATCH = "DELETE FROM lethe.batches WHERE batch_id = $1";
}

/// What has to stay in a batch is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_hours(1);
/// Slices that go in one step.
const SLICES: i64 = 1_000;

/// Controller and key, the order in which requests of a batch are walked.
type Place = (String, i64);

/// How far the removal has come. What has to stay is passed over, and not looked at again with each step.
#[derive(Debug, Default)]
pub struct Walk {
    batches: HashMap<BatchId, (Place, Option<Instant>)>,
    without_batch: (Place, Option<Instant>),
}

/// What a step of the removal did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Requests of which only the past request is left.
    pub requests: usize,
    /// There may be more to do at once.
    pub more: bool,
}

impl Walk {
    /// Removes the records of the next requests that ended longer than `retention` ago, at most `limit`, and of a batch
    /// that has none left.
    ///
    /// # Errors
    /// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
    pub async fn step(&mut self, db: &Db, term: &Term, retention: Duration, limit: i64) -> Result<Removed, DbError> {
        let rested = |since: &Option<Instant>| since.is_some_and(|since| since.elapsed() >= look_again(retention));
        self.batches.retain(|_, (_, rest)| !rested(rest));
        if rested(&self.without_batch.1) {
            self.without_batch = Default::default();
        }
        let mut removed = Removed::default();
        if self.without_batch.1.is_none() {
            let place = self.without_batch.0.clone();
            let walked = super::retrying(|| requests(db, term, retention, limit, None, &place)).await?;
            removed.requests += walked.removed;
            removed.more |= walked.place.is_some();
            self.without_batch =
                walked.place.map_or_else(|| (Place::default(), Some(Instant::now())), |place| (place, None));
        }
        let resting: Vec<BatchId> =
            self.batches.iter().filter(|(_, (_, rest))| rest.is_some()).map(|(batch, _)| *batch).collect();
        let next = db.session().await?.query_opt(NEXT_BATCH, &[&retention.as_secs_f64(), &resting]).await?;
        let Some(batch) = next.map(|row| row.get::<_, BatchId>("batch_id")) else { return Ok(removed) };
        let place = self.batches.get(&batch).map(|(place, _)| place.clone()).unwrap_or_default();
        let walked = super::retrying(|| requests(db, term, retention, limit, Some(batch), &place)).await?;
        removed.requests += walked.removed;
        removed.more = true;
        match walked.place {
            Some(place) => drop(self.batches.insert(batch, (place, None))),
            None if super::retrying(|| end_batch(db, term, batch)).await? => drop(self.batches.remove(&batch)),
            None => drop(self.batches.insert(batch, (Place::default(), Some(Instant::now())))),
        }
        Ok(removed)
    }
}

fn look_again(retention: Duration) -> Duration {
    (retention / 10).clamp(Duration::from_secs(1), LOOK_AGAIN)
}

struct Walked {
    removed: usize,
    /// Where to go on; `None` at the end.
    place: Option<Place>,
}

async fn requests(
    db: &Db,
    term: &Term,
    retention: Duration,
    limit: i64,
    batch: Option<BatchId>,
    (controller, key): &Place,
) -> Result<Walked, DbError> {
    let tx = db.begin("remove_records").await?;
    leader::assert_term(&tx, term).await?;
    let seconds = retention.as_secs_f64();
    let rows = match batch {
        Some(batch) => tx.query(WALK, &[&seconds, &batch, controller, key, &limit]).await?,
        None => tx.query(WALK_WITHOUT_BATCH, &[&seconds, controller, key, &limit]).await?,
    };
    let full = i64::try_from(rows.len()).is_ok_and(|seen| seen >= limit);
    let place = rows.last().filter(|_| full).map(|row| (row.get::<_, String>("controller_id"), row.get("request_key")));
    let due: Vec<i64> = rows.iter().filter(|row| row.get("is_due")).map(|row| row.get("request_key")).collect();
    if due.is_empty() {
        tx.rollback().await;
        return Ok(Walked { removed: 0, place });
    }
    remove(&tx, &due).await?;
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(Walked { removed: due.len(), place })
}

/// First the requests, then their callbacks: the guard lets callbacks go that nothing refers to any more.
async fn remove(tx: &Tx, due: &[i64]) -> Result<(), DbError> {
    tx.query(ANNOUNCE, &[]).await?;
    for statement in [KEEP, REMOVE_ATTEMPTS, REMOVE_RESULTS, REMOVE_REQUESTS, REMOVE_CALLBACKS] {
        tx.execute(statement, &[&due]).await?;
    }
    Ok(())
}

/// Removes slices of a batch that has no request left, and the batch with its last slices; `false` where it has requests.
async fn end_batch(db: &Db, term: &Term, batch: BatchId) -> Result<bool, DbError> {
    let tx = db.begin("remove_batch").await?;
    leader::assert_term(&tx, term).await?;
    if !tx.value::<bool>(IS_EMPTY, &[&batch]).await? {
        tx.rollback().await;
        return Ok(false);
    }
    tx.query(ANNOUNCE, &[]).await?;
    let slices = tx.execute(REMOVE_SLICES, &[&batch, &SLICES]).await?;
    if i64::try_from(slices).is_ok_and(|slices| slices < SLICES) {
        tx.execute(FOLD_BATCH, &[&batch]).await?;
        tx.execute(FORGET_TOTALS, &[&batch]).await?;
        tx.execute(REMOVE_BATCH, &[&batch]).await?;
    }
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(true)
}
