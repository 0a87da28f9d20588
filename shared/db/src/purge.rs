//! The purge: what is personal in a request goes a while after the request has ended; keyed digests stay. Callbacks that are
//! still to be delivered need their URL, and are waited for as long as a courier may try them, and no longer.
//!
//! Details are dropped with their week ([`super::details`]), once the retention has passed since its end. Before that the week
//! is walked through: the details of what has not ended, or not long enough ago, move to the week from which they will be
//! dropped in time. Requests that were cancelled end long before their week, and are purged by themselves.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;

use super::leader::{self, Term};
use super::{Db, DbError, Tx, details, statements};
use lethe_domain::request::RequestKey;

statements! {
    /// The oldest week that may go.
    DUE = "
        SELECT week FROM lethe.detail_weeks
         WHERE ends_at <= lethe.now() - make_interval(secs => $1) AND week <> ALL ($2) ORDER BY ends_at, week LIMIT 1";
    /// The next requests of a week: whether each has ended long enough ago, and whether callbacks still need it. Beyond the
    /// second span nothing does. Details of no request at all are nobody's.
    OF_WEEK = "
        WITH walked AS MATERIALIZED (
            SELECT d.request_key FROM lethe.request_details d
             WHERE d.week = $4 AND d.request_key > $5 ORDER BY d.request_key LIMIT $3),
        instant AS MATERIALIZED (SELECT lethe.now() AS now)
        SELECT w.request_key, coalesce(r.completed_at, r.cancelled_at) AS ended_at,
               r.request_key IS NULL
                   OR coalesce(coalesce(r.completed_at, r.cancelled_at) <= now - make_interval(secs => $1), false) AS is_over,
               -- Counted, and not asked for existence: that may be planned as one look at all callbacks.
               (SELECT count(*) FROM lethe.callbacks c
                 WHERE c.request_key = w.request_key AND c.state IN ('waiting', 'ready')) > 0 AS has_callbacks,
               coalesce(coalesce(r.completed_at, r.cancelled_at) <= now - make_interval(secs => $2), false) AS is_past_the_end,
               now
          FROM walked w CROSS JOIN instant
          LEFT JOIN LATERAL (SELECT request_key, completed_at, cancelled_at FROM lethe.requests r
                              WHERE r.request_key = w.request_key AND r.details_week = $4 OFFSET 0) r ON true
         ORDER BY w.request_key";
    /// The same of those that were cancelled, with a batch or without.
    OF_CANCELLED = "
        WITH instant AS MATERIALIZED (SELECT lethe.now() AS now),
        walked AS MATERIALIZED (
            SELECT r.request_key, r.cancelled_at AS ended_at FROM lethe.requests r
             WHERE r.details_week IS NOT NULL AND r.cancelled_at IS NOT NULL
               AND (r.cancelled_at, r.request_key) > ($4, $5)
               AND r.cancelled_at <= (SELECT now FROM instant) - make_interval(secs => $1)
             ORDER BY r.cancelled_at, r.request_key LIMIT $3)
        SELECT w.request_key, w.ended_at, true AS is_over,
               (SELECT count(*) FROM lethe.callbacks c
                 WHERE c.request_key = w.request_key AND c.state IN ('waiting', 'ready')) > 0 AS has_callbacks,
               w.ended_at <= now - make_interval(secs => $2) AS is_past_the_end, now
          FROM walked w, instant ORDER BY w.ended_at, w.request_key";
    /// In key order, before the callbacks of these requests are touched. Cancellation and completion are behind them.
    LOCK = "
        SELECT request_key, details_week FROM lethe.requests
         WHERE request_key = ANY ($1) AND details_week IS NOT NULL ORDER BY request_key FOR UPDATE SKIP LOCKED";
    /// In key order, as everyone who locks several of them does. A delivery that is under way is not ours to record.
    EXHAUST = "
        WITH open AS MATERIALIZED (
            SELECT callback_id FROM lethe.callbacks
             WHERE request_key = ANY ($1) AND state IN ('waiting', 'ready') ORDER BY callback_id FOR UPDATE)
        UPDATE lethe.callbacks c
           SET state = 'exhausted', finished_at = lethe.now(), lease_token = NULL, lease_expires_at = NULL,
               exhausted_because = 'retention'
          FROM open WHERE c.callback_id = open.callback_id";
    FORGET_DETAILS = "DELETE FROM lethe.request_details WHERE week = ANY ($1) AND request_key = ANY ($2)";
    PURGE = "UPDATE lethe.requests SET details_week = NULL WHERE request_key = ANY ($1)";
    /// To another week; of those that are still in the one that they were found in.
    MOVE = "
        WITH locked AS MATERIALIZED (
            SELECT request_key FROM lethe.requests
             WHERE request_key = ANY ($3) AND details_week = $1 ORDER BY request_key FOR UPDATE),
        moved AS (
            DELETE FROM lethe.request_details
             WHERE week = $1 AND request_key = ANY (ARRAY (SELECT request_key FROM locked)) RETURNING *),
        placed AS (
            INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, sealed_reporting, named,
                                               at_receipt, at_release)
            SELECT $2, request_key, controller_id, sealed_request, sealed_reporting, named, at_receipt, at_release FROM moved)
        UPDATE lethe.requests SET details_week = $2 WHERE request_key = ANY (ARRAY (SELECT request_key FROM locked))";
    /// In key order, as everyone who locks several of them, whichever weeks they go to.
    LOCK_TO_MOVE = "SELECT request_key FROM lethe.requests WHERE request_key = ANY ($1) ORDER BY request_key FOR UPDATE";
    DROP = "SELECT lethe.drop_week($1, make_interval(secs => $2))";
    /// A week of many millions is read as a whole once; not for a process that is gone.
    TAKE_TIME = "
        SELECT set_config('statement_timeout', '1h', true), set_config('client_connection_check_interval', '1s', true)";
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
    /// When what was found to be needed still is looked at again.
    fn look_again(&self) -> Duration {
        (self.after_end / 10).clamp(Duration::from_secs(1), Duration::from_hours(1))
    }

    fn spans(&self) -> (f64, f64) {
        let soft = self.after_end.as_secs_f64();
        (soft, soft + self.for_callbacks.as_secs_f64())
    }
}

/// When a week that somebody is reading is tried again.
const HELD: Duration = Duration::from_mins(1);

/// How far the purge has come.
#[derive(Debug, Default)]
pub struct Walk {
    /// The lead that it is of: another one may have gone on meanwhile.
    epoch: Option<i64>,
    weeks: HashMap<i64, (RequestKey, Option<Instant>)>,
    cancelled: (Option<(Timestamp, RequestKey)>, Option<Instant>),
}

/// What a step of the purge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Requests whose personal data went.
    pub requests: usize,
    /// Requests whose details moved to another week.
    pub moved: u64,
    /// Callbacks that were given up with them.
    pub exhausted: u64,
    /// There may be more to do at once.
    pub more: bool,
}

impl Walk {
    /// Purges the next requests that were cancelled, walks through the next requests of a week that is over, at most `limit`
    /// of each, and drops the week at its end.
    ///
    /// # Errors
    /// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
    pub async fn step(&mut self, db: &Db, term: &Term, retention: Retention, limit: i64) -> Result<Purged, DbError> {
        if self.epoch != Some(term.epoch()) {
            *self = Self { epoch: Some(term.epoch()), ..Self::default() };
        }
        self.wake(retention);
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
        let resting: Vec<i64> =
            self.weeks.iter().filter(|(_, (_, rest))| rest.is_some()).map(|(week, _)| *week).collect();
        let due = db.session().await?.query_opt(DUE, &[&retention.after_end.as_secs_f64(), &resting]).await?;
        let Some(week) = due.map(|row| row.get::<_, i64>("week")) else { return Ok(purged) };
        let after = self.weeks.get(&week).map_or(RequestKey(0), |(place, _)| *place);
        purged.more = true;
        let walked = match super::retrying(|| of_week(db, term, retention, limit, (week, after))).await {
            Err(error) if error.code().is_some() => {
                self.put_off(week, after, &error);
                return Ok(purged);
            }
            walked => walked?,
        };
        purged = purged.with(&walked);
        let last = walked.last.map_or(after, |(_, key)| key);
        if !walked.is_last(limit) {
            self.weeks.insert(week, (last, None));
            return Ok(purged);
        }
        match super::retrying(|| drop_week(db, term, retention, week)).await {
            Ok(requests) => {
                self.weeks.remove(&week);
                purged.requests += requests;
            }
            // Somebody reads it: a dump, say. Or something is needed after all: then it is walked through once more.
            Err(error) if error.code().is_some() => {
                self.put_off(week, if is_held(&error) { last } else { RequestKey(0) }, &error);
            }
            Err(error) => return Err(error),
        }
        Ok(purged)
    }

    /// Leaves a week for a while, so that it does not keep the next ones from their end.
    fn put_off(&mut self, week: i64, place: RequestKey, error: &DbError) {
        tracing::warn!(%error, week, "a week of details cannot be dropped yet; it is tried again");
        self.weeks.insert(week, (place, Some(Instant::now())));
    }

    /// Begins anew with what was walked through a while ago.
    fn wake(&mut self, retention: Retention) {
        let rested = |since: &Option<Instant>, rest| since.is_some_and(|since| since.elapsed() >= rest);
        for (_, since) in self.weeks.values_mut() {
            if rested(since, retention.look_again().min(HELD)) {
                *since = None;
            }
        }
        if rested(&self.cancelled.1, retention.look_again()) {
            self.cancelled = (None, None);
        }
    }
}

impl Purged {
    fn with(self, walked: &Walked) -> Self {
        Self {
            requests: self.requests + walked.purged,
            moved: self.moved + walked.moved,
            exhausted: self.exhausted + walked.exhausted,
            more: self.more || walked.seen > 0,
        }
    }
}

#[derive(Default)]
struct Walked {
    seen: i64,
    purged: usize,
    moved: u64,
    exhausted: u64,
    last: Option<(Timestamp, RequestKey)>,
}

impl Walked {
    fn of(rows: &[Row]) -> Self {
        let last = rows.last().map(|row| {
            (row.get::<_, Option<Timestamp>>("ended_at").unwrap_or(Timestamp::UNIX_EPOCH), row.get("request_key"))
        });
        Self { seen: i64::try_from(rows.len()).unwrap_or(i64::MAX), last, ..Self::default() }
    }

    const fn is_last(&self, limit: i64) -> bool {
        self.seen < limit
    }
}

/// Whether nothing needs the details of this request any more but callbacks that are given up with it.
fn is_due(row: &Row) -> bool {
    lethe_process::fault::defect("open_weeks_dropped")
        || row.get("is_over") && (!row.get::<_, bool>("has_callbacks") || row.get::<_, bool>("is_past_the_end"))
}

/// Purges those of the next cancelled requests that are due.
async fn of_cancelled(
    db: &Db,
    term: &Term,
    retention: Retention,
    limit: i64,
    (after, key): (Timestamp, RequestKey),
) -> Result<Walked, DbError> {
    let tx = db.begin("purge_requests").await?;
    leader::assert_term(&tx, term).await?;
    let (soft, hard) = retention.spans();
    let rows = tx.query(OF_CANCELLED, &[&soft, &hard, &limit, &after, &key]).await?;
    let mut walked = Walked::of(&rows);
    let due: Vec<RequestKey> = rows.iter().filter(|row| is_due(row)).map(|row| row.get("request_key")).collect();
    if due.is_empty() {
        tx.rollback().await;
        return Ok(walked);
    }
    let rows = tx.query(LOCK, &[&due]).await?;
    let locked: Vec<RequestKey> = rows.iter().map(|row| row.get("request_key")).collect();
    let weeks: Vec<i64> = rows.iter().map(|row| row.get("details_week")).collect();
    // Callbacks of the others may have been replayed meanwhile: what is purged has none that is open.
    walked.exhausted = tx.execute(EXHAUST, &[&locked]).await?;
    tx.execute(FORGET_DETAILS, &[&weeks, &locked]).await?;
    tx.execute(PURGE, &[&locked]).await?;
    walked.purged = locked.len();
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(walked)
}

/// Moves what has to stay of the next requests of a week, and gives up callbacks that have kept some of them for too long.
async fn of_week(
    db: &Db,
    term: &Term,
    retention: Retention,
    limit: i64,
    (week, after): (i64, RequestKey),
) -> Result<Walked, DbError> {
    let tx = db.begin("purge_requests").await?;
    leader::assert_term(&tx, term).await?;
    let (soft, hard) = retention.spans();
    let rows = tx.query(OF_WEEK, &[&soft, &hard, &limit, &week, &after]).await?;
    let mut walked = Walked::of(&rows);
    let late: Vec<RequestKey> =
        rows.iter().filter(|row| is_due(row) && row.get("has_callbacks")).map(|row| row.get("request_key")).collect();
    let needed: Vec<&Row> = rows.iter().filter(|row| !is_due(row)).collect();
    if late.is_empty() && needed.is_empty() {
        // What was found to be over is not looked at again.
        leader::assert_clock(&tx, term).await?;
        tx.rollback().await;
        return Ok(walked);
    }
    if !late.is_empty() {
        walked.exhausted = tx.execute(EXHAUST, &[&late]).await?;
    }
    if !needed.is_empty() {
        walked.moved = move_on(&tx, retention, week, &needed).await?;
    }
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(walked)
}

/// Moves details to the weeks from which they are dropped in time.
async fn move_on(tx: &Tx, retention: Retention, from: i64, rows: &[&Row]) -> Result<u64, DbError> {
    let keys: Vec<RequestKey> = rows.iter().map(|row| row.get("request_key")).collect();
    tx.query(LOCK_TO_MOVE, &[&keys]).await?;
    let mut keys_by_week: HashMap<i64, Vec<RequestKey>> = HashMap::new();
    let mut weeks: Vec<details::Week> = Vec::new();
    for row in rows {
        let place = stays_for(row, retention);
        let known = weeks.iter().find(|week| week.holds(place)).copied();
        let week = if let Some(week) = known { week } else { details::week_of(tx, place).await? };
        if known.is_none() {
            weeks.push(week);
        }
        keys_by_week.entry(week.number).or_default().push(row.get("request_key"));
    }
    let mut moved = 0;
    for (week, keys) in keys_by_week.into_iter().filter(|(week, _)| *week != from) {
        moved += tx.execute(MOVE, &[&from, &week, &keys]).await?;
    }
    Ok(moved)
}

/// The instant that the week of a request has to hold: of one that has ended the end, or so much later as callbacks may need
/// it; of another one now.
fn stays_for(row: &Row, retention: Retention) -> Timestamp {
    let for_callbacks = if row.get("has_callbacks") { retention.for_callbacks } else { Duration::ZERO };
    match row.get::<_, Option<Timestamp>>("ended_at") {
        Some(ended_at) => ended_at.checked_add(for_callbacks).unwrap_or(ended_at),
        None => row.get("now"),
    }
}

fn is_held(error: &DbError) -> bool {
    error.code().is_some_and(|code| *code == SqlState::LOCK_NOT_AVAILABLE)
}

/// Drops a week that was walked through; the number of requests whose details were in it.
async fn drop_week(db: &Db, term: &Term, retention: Retention, week: i64) -> Result<usize, DbError> {
    let tx = db.begin("drop_week").await?;
    tx.query(TAKE_TIME, &[]).await?;
    let requests: Option<i64> = tx.value(DROP, &[&week, &retention.after_end.as_secs_f64()]).await?;
    lethe_process::fault::point("purge.before_commit");
    // Last: it holds the lead, and reading a week takes long.
    leader::assert_term(&tx, term).await?;
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(requests.and_then(|requests| usize::try_from(requests).ok()).unwrap_or(0))
}
