//! The purge: what is personal in a request goes a while after the request has ended; keyed digests stay. Callbacks that are
//! still to be delivered need their URL, and are waited for as long as a courier may try them, and no longer.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::Row;

use super::leader::{self, Term};
use super::{Db, DbError, Tx, statements};
use lethe_domain::request::{BatchId, RequestKey};

statements! {
    /// What is completed was of a batch that has run: the many that still wait for theirs are not looked at, however short
    /// the retention. The batches that have anything left are read one by one from the index.
    BATCHES = "
        WITH RECURSIVE sealed AS (
            SELECT (SELECT min(batch_id) FROM lethe.requests WHERE sealed_request IS NOT NULL) AS batch_id
            UNION ALL
            SELECT (SELECT min(r.batch_id) FROM lethe.requests r
                     WHERE r.sealed_request IS NOT NULL AND r.batch_id > sealed.batch_id)
              FROM sealed WHERE sealed.batch_id IS NOT NULL)
        SELECT b.batch_id FROM sealed JOIN lethe.batches b USING (batch_id)
         WHERE b.runs_at <= lethe.now() - make_interval(secs => $1) AND b.batch_id <> ALL ($2)
         ORDER BY b.runs_at LIMIT 1";
    /// The next requests of a batch that hold something personal: whether each has ended long enough ago, and whether
    /// callbacks still need it. Beyond the second span nothing does.
    OF_BATCH = "
        WITH walked AS MATERIALIZED (
            SELECT r.request_key, r.completed_at AS ended_at FROM lethe.requests r
             WHERE r.batch_id = $4 AND r.sealed_request IS NOT NULL AND r.request_key > $5
             ORDER BY r.request_key LIMIT $3),
        instant AS MATERIALIZED (SELECT lethe.now() AS now)
        SELECT w.request_key, w.ended_at, coalesce(w.ended_at <= now - make_interval(secs => $1), false) AS is_over,
               -- Counted, and not asked for existence: that may be planned as one look at all callbacks.
               (SELECT count(*) FROM lethe.callbacks c
                 WHERE c.request_key = w.request_key AND c.state IN ('waiting', 'ready')) > 0 AS has_callbacks,
               coalesce(w.ended_at <= now - make_interval(secs => $2), false) AS is_past_the_end
          FROM walked w, instant ORDER BY w.request_key";
    /// The same of those that were cancelled, with a batch or without.
    OF_CANCELLED = "
        WITH instant AS MATERIALIZED (SELECT lethe.now() AS now),
        walked AS MATERIALIZED (
            SELECT r.request_key, r.cancelled_at AS ended_at FROM lethe.requests r
             WHERE r.sealed_request IS NOT NULL AND r.cancelled_at IS NOT NULL
               AND (r.cancelled_at, r.request_key) > ($4, $5)
               AND r.cancelled_at <= (SELECT now FROM instant) - make_interval(secs => $1)
             ORDER BY r.cancelled_at, r.request_key LIMIT $3)
        SELECT w.request_key, w.ended_at, true AS is_over,
               (SELECT count(*) FROM lethe.callbacks c
                 WHERE c.request_key = w.request_key AND c.state IN ('waiting', 'ready')) > 0 AS has_callbacks,
               w.ended_at <= now - make_interval(secs => $2) AS is_past_the_end
          FROM walked w, instant ORDER BY w.ended_at, w.request_key";
    /// In key order, before the callbacks of these requests are touched. Cancellation and completion are behind them.
    LOCK = "
        SELECT request_key FROM lethe.requests
         WHERE request_key = ANY ($1) AND sealed_request IS NOT NULL ORDER BY request_key FOR UPDATE SKIP LOCKED";
    /// In key order, as everyone who locks several of them does. A delivery that is under way is not ours to record.
    EXHAUST = "
        WITH open AS MATERIALIZED (
            SELECT callback_id FROM lethe.callbacks
             WHERE request_key = ANY ($1) AND state IN ('waiting', 'ready') ORDER BY callback_id FOR UPDATE)
        UPDATE lethe.callbacks c
           SET state = 'exhausted', finished_at = lethe.now(), lease_token = NULL, lease_expires_at = NULL,
               exhausted_because = 'retention'
          FROM open WHERE c.callback_id = open.callback_id";
    PURGE = "
        UPDATE lethe.requests SET sealed_request = NULL, purged_at = lethe.now() WHERE request_key = ANY ($1)";
    FORGET_MPIDS = "DELETE FROM lethe.request_mpids WHERE request_key = ANY ($1)";
}

/// How long what is personal stays.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// After the end of a request.
    pub after_end: Duration,
    /// So much longer at most, for callbacks that are not delivered.
    pub for_callbacks: Duration,
}

impl Retention {
    /// When what was found to be needed still, or to be too young, is looked at again.
    fn look_again(&self) -> Duration {
        (self.after_end / 10).clamp(Duration::from_secs(1), Duration::from_hours(1))
    }
}

/// How far the purge has come. What has to stay is passed over, and not looked at again with each step.
#[derive(Debug, Default)]
pub struct Walk {
    batches: HashMap<BatchId, (RequestKey, Option<Instant>)>,
    cancelled: (Option<(Timestamp, RequestKey)>, Option<Instant>),
}

/// What a step of the purge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Requests whose personal data went.
    pub requests: usize,
    /// Callbacks that were given up with them.
    pub exhausted: u64,
    /// There may be more to do at once.
    pub more: bool,
}

impl Walk {
    /// Purges the next requests, at most `limit`, and gives up the callbacks that have kept some of them for too long.
    ///
    /// # Errors
    /// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
    pub async fn step(&mut self, db: &Db, term: &Term, retention: Retention, limit: i64) -> Result<Purged, DbError> {
        self.wake(retention.look_again());
        let mut purged = Purged::default();
        if self.cancelled.1.is_none() {
            let (after, key) = self.cancelled.0.unwrap_or((Timestamp::UNIX_EPOCH, RequestKey(0)));
            let walked = super::retrying(|| of_cancelled(db, term, retention, limit, (after, key))).await?;
            purged = purged.with(&walked);
            if walked.is_last(limit) {
                self.cancelled = (None, Some(Instant::now()));
            } else if let Some(last) = walked.last {
                self.cancelled.0 = Some(last);
            }
        }
        let resting: Vec<BatchId> =
            self.batches.iter().filter(|(_, (_, rest))| rest.is_some()).map(|(batch, _)| *batch).collect();
        let due = db.session().await?.query_opt(BATCHES, &[&retention.after_end.as_secs_f64(), &resting]).await?;
        if let Some(batch) = due.map(|row| row.get::<_, BatchId>("batch_id")) {
            let after = self.batches.get(&batch).map_or(RequestKey(0), |(place, _)| *place);
            let walked = super::retrying(|| of_batch(db, term, retention, limit, (batch, after))).await?;
            purged = purged.with(&walked);
            let place = if walked.is_last(limit) {
                (RequestKey(0), Some(Instant::now()))
            } else {
                (walked.last.map_or(after, |(_, key)| key), None)
            };
            self.batches.insert(batch, place);
            purged.more = true;
        }
        Ok(purged)
    }

    /// Begins anew with what was walked through a while ago.
    fn wake(&mut self, look_again: Duration) {
        let rested = |since: &Option<Instant>| since.is_some_and(|since| since.elapsed() >= look_again);
        self.batches.retain(|_, (_, rest)| !rested(rest));
        if rested(&self.cancelled.1) {
            self.cancelled = (None, None);
        }
    }
}

impl Purged {
    fn with(self, walked: &Walked) -> Self {
        Self {
            requests: self.requests + walked.purged,
            exhausted: self.exhausted + walked.exhausted,
            more: self.more || walked.seen > 0,
        }
    }
}

#[derive(Default)]
struct Walked {
    seen: i64,
    purged: usize,
    exhausted: u64,
    last: Option<(Timestamp, RequestKey)>,
}

impl Walked {
    const fn is_last(&self, limit: i64) -> bool {
        self.seen < limit
    }
}

async fn of_cancelled(
    db: &Db,
    term: &Term,
    retention: Retention,
    limit: i64,
    (after, key): (Timestamp, RequestKey),
) -> Result<Walked, DbError> {
    let tx = db.begin("purge_requests").await?;
    leader::assert_term(&tx, term).await?;
    let (soft, hard) = spans(retention);
    let rows = tx.query(OF_CANCELLED, &[&soft, &hard, &limit, &after, &key]).await?;
    finish(tx, term, &rows).await
}

async fn of_batch(
    db: &Db,
    term: &Term,
    retention: Retention,
    limit: i64,
    (batch, after): (BatchId, RequestKey),
) -> Result<Walked, DbError> {
    let tx = db.begin("purge_requests").await?;
    leader::assert_term(&tx, term).await?;
    let (soft, hard) = spans(retention);
    let rows = tx.query(OF_BATCH, &[&soft, &hard, &limit, &batch, &after]).await?;
    finish(tx, term, &rows).await
}

fn spans(retention: Retention) -> (f64, f64) {
    let soft = retention.after_end.as_secs_f64();
    (soft, soft + retention.for_callbacks.as_secs_f64())
}

/// Purges those of the walked requests that are due.
async fn finish(tx: Tx, term: &Term, rows: &[Row]) -> Result<Walked, DbError> {
    let mut walked = Walked { seen: i64::try_from(rows.len()).unwrap_or(i64::MAX), ..Walked::default() };
    walked.last = rows.last().map(|row| {
        (row.get::<_, Option<Timestamp>>("ended_at").unwrap_or(Timestamp::UNIX_EPOCH), row.get("request_key"))
    });
    let is_due = |row: &&Row| {
        row.get("is_over") && (!row.get::<_, bool>("has_callbacks") || row.get::<_, bool>("is_past_the_end"))
    };
    let due: Vec<RequestKey> = rows.iter().filter(is_due).map(|row| row.get("request_key")).collect();
    if due.is_empty() {
        tx.rollback().await;
        return Ok(walked);
    }
    let locked: Vec<RequestKey> = tx.values(LOCK, &[&due]).await?;
    // Callbacks of the others may have been replayed meanwhile: what is purged has none that is open.
    walked.exhausted = tx.execute(EXHAUST, &[&locked]).await?;
    tx.execute(PURGE, &[&locked]).await?;
    tx.execute(FORGET_MPIDS, &[&locked]).await?;
    walked.purged = locked.len();
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(walked)
}
