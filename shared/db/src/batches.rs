//! Batches: closing ticks, and what operators see of them.

use jiff::Timestamp;
use tokio_postgres::Row;

use super::leader::{self, Term};
use super::pool::{Column, Session};
use super::{Db, DbError, Tx, statements};
use lethe_domain::request::{BatchId, BatchState, Lane, Slot};

statements! {
    /// Shared lock on the calendar first, then the clock.
    BEGIN_INTAKE = "SELECT received_at, calendar_version FROM lethe.begin_intake()";
    OPEN_BATCH = "
        INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING";
    FIND_OPEN_BATCH = "
        SELECT batch_id FROM lethe.batches WHERE lane = $1 AND tick_at = $2 AND runs_at = $3 AND state = 'open'";
    /// Whether anything is due at all: the one question that an idle scheduler asks.
    DUE = "
        SELECT coalesce(bool_or(state = 'open' AND tick_at <= lethe.now()), false) AS closing,
               coalesce(bool_or(state = 'closed' AND runs_at <= lethe.now()), false) AS release,
               coalesce(bool_or(state = 'released'), false) AS completion
          FROM lethe.batches WHERE state <> 'completed'";
    LOCK_OUT_INTAKE = "SELECT pg_advisory_xact_lock(lethe.calendar_lock())";
    CLOSE = "
        UPDATE lethe.batches SET state = 'closed', closed_at = lethe.now()
         WHERE state = 'open' AND tick_at <= lethe.now()
        RETURNING batch_id, lane, tick_at, runs_at";
    CLOSED_THROUGH = "
        UPDATE lethe.lanes l SET closed_through = greatest(closed_through, c.tick_at)
          FROM (SELECT lane, max(tick_at) AS tick_at FROM lethe.batches WHERE batch_id = ANY ($1) GROUP BY lane) c
         WHERE l.lane = c.lane";
    TO_RELEASE = "
        SELECT batch_id, lane, tick_at, runs_at, extract(epoch FROM lethe.now() - runs_at)::float8 AS late_seconds,
               cancellations_handled_at IS NOT NULL AS cancellations_handled
          FROM lethe.batches WHERE state = 'closed' AND runs_at <= lethe.now() ORDER BY runs_at, batch_id";
    CANCELLATIONS_HANDLED = "
        UPDATE lethe.batches SET cancellations_handled_at = lethe.now()
         WHERE batch_id = ANY ($1) AND cancellations_handled_at IS NULL";
    COMPLETE = "
        UPDATE lethe.batches b SET state = 'completed', completed_at = lethe.now()
         WHERE b.state = 'released'
           AND NOT EXISTS (SELECT FROM lethe.slices s WHERE s.batch_id = b.batch_id AND s.state = 'ready')
        RETURNING batch_id";
    /// The totals of those that are listed, and of no other.
    LIST = "
        SELECT b.batch_id, b.lane, b.tick_at, b.runs_at, b.state, b.closed_at, b.released_at, b.completed_at,
               coalesce(t.requests, 0)::bigint AS requests, coalesce(t.pending, 0)::bigint AS pending,
               coalesce(t.in_progress, 0)::bigint AS in_progress, coalesce(t.completed, 0)::bigint AS completed,
               coalesce(t.cancelled, 0)::bigint AS cancelled
          FROM (SELECT * FROM lethe.batches WHERE $1::bigint IS NULL OR batch_id = $1
                 ORDER BY runs_at DESC, batch_id DESC LIMIT $2) b
          LEFT JOIN (
            SELECT batch_id, sum(n) AS requests, sum(n) FILTER (WHERE status = 'pending') AS pending,
                   sum(n) FILTER (WHERE status = 'in_progress') AS in_progress,
                   sum(n) FILTER (WHERE status = 'completed') AS completed,
                   sum(n) FILTER (WHERE status = 'cancelled') AS cancelled
              FROM (SELECT batch_id, status, total AS n FROM lethe.batch_totals
                     WHERE batch_id IN (SELECT batch_id FROM lethe.batches WHERE $1::bigint IS NULL OR batch_id = $1
                                         ORDER BY runs_at DESC, batch_id DESC LIMIT $2)
                    UNION ALL
                    SELECT batch_id, status, delta FROM lethe.request_deltas WHERE batch_id IS NOT NULL) counted
             GROUP BY batch_id) t USING (batch_id)
         ORDER BY b.runs_at DESC, b.batch_id DESC";
    /// Pending requests whose batch is not there, by the number that they name: the numbers of batches are read one by
    /// one from the index, however many requests have each.
    WITHOUT_BATCH = "
        WITH RECURSIVE named AS (
            SELECT (SELECT min(batch_id) FROM lethe.requests) AS batch_id
            UNION ALL
            SELECT (SELECT min(r.batch_id) FROM lethe.requests r WHERE r.batch_id > named.batch_id)
              FROM named WHERE named.batch_id IS NOT NULL)
        SELECT n.batch_id, p.count AS pending
          FROM named n
         CROSS JOIN LATERAL (
            SELECT count(*) FROM (SELECT FROM lethe.requests r
                                   WHERE r.batch_id = n.batch_id AND r.status = 'pending' LIMIT 10000) first) p
         WHERE NOT EXISTS (SELECT FROM lethe.batches b WHERE b.batch_id = n.batch_id) AND n.batch_id IS NOT NULL
           AND p.count > 0
         ORDER BY n.batch_id";
    /// What a batch that has not run yet would be executed on.
    PENDING = "
        SELECT r.request_key, r.controller_id, r.subject_request_id, r.approval, r.details_week, d.sealed_request, d.at_receipt
          FROM (SELECT * FROM lethe.requests
                 WHERE batch_id = $1 AND status = 'pending' AND request_key > $2
                 ORDER BY request_key LIMIT $3) r
          LEFT JOIN LATERAL (SELECT sealed_request, at_receipt FROM lethe.request_details d
                              WHERE d.week = r.details_week AND d.request_key = r.request_key OFFSET 0) d ON true
         ORDER BY r.request_key";
    /// What it was executed on, by the source of each profile; request by request, so that nobody else's are read.
    EXECUTED_MPIDS = "
        SELECT m.source, sum(m.profiles)::bigint AS profiles
          FROM lethe.requests r
         CROSS JOIN LATERAL (SELECT named, at_receipt, at_release FROM lethe.request_details d
                              WHERE d.week = r.details_week AND d.request_key = r.request_key OFFSET 0) d
         CROSS JOIN LATERAL (VALUES ('named', cardinality(d.named)), ('receipt', cardinality(d.at_receipt)),
                                    ('release', cardinality(d.at_release))) AS m (source, profiles)
         WHERE r.batch_id = $1 AND r.status IN ('in_progress', 'completed') AND m.profiles > 0
         GROUP BY m.source ORDER BY m.source";
    EXECUTED_ROWS = "
        SELECT e.store, sum(e.rows_deleted)::bigint AS deleted, coalesce(sum(e.rows_arrived), 0)::bigint AS arrived,
               count(*) FILTER (WHERE e.failure IS NOT NULL) AS failing
          FROM lethe.slices s JOIN lethe.erasure_receipts e ON e.slice_id = s.slice_id
         WHERE s.batch_id = $1 GROUP BY e.store ORDER BY e.store";
    NOW = "SELECT lethe.now()";
}

/// What there is to do for the scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// An open batch whose tick has come.
    pub closing: bool,
    /// A closed batch whose time to run has come.
    pub release: bool,
    /// A released batch that may be complete.
    pub completion: bool,
}

/// Asks what is due.
///
/// # Errors
/// [`DbError`].
pub async fn due(session: &Session) -> Result<Due, DbError> {
    let row = session.query_one(DUE, &[]).await?;
    Ok(Due { closing: row.get("closing"), release: row.get("release"), completion: row.get("completion") })
}

/// A batch that was closed or is to be released.
#[derive(Clone, Copy, Debug)]
pub struct DueBatch {
    /// Which one.
    pub batch_id: BatchId,
    /// What it holds.
    pub lane: Lane,
    /// Its tick.
    pub tick_at: Timestamp,
    /// When it runs.
    pub runs_at: Timestamp,
}

fn read_due(row: &Row) -> Result<DueBatch, DbError> {
    let lane = row.get::<_, &str>("lane").parse();
    Ok(DueBatch {
        batch_id: row.get("batch_id"),
        lane: lane.map_err(|_| DbError::Unexpected { place: "batches.lane" })?,
        tick_at: row.get("tick_at"),
        runs_at: row.get("runs_at"),
    })
}

/// Closes every batch whose tick has come. Waits for the intakes under way, so that none of them can still join.
///
/// # Errors
/// [`DbError::LeadershipLost`] where the term is over, [`DbError::ClockAhead`].
pub async fn close_due(db: &Db, term: &Term) -> Result<Vec<DueBatch>, DbError> {
    let tx = db.begin("close_batches").await?;
    leader::assert_term(&tx, term).await?;
    tx.query(LOCK_OUT_INTAKE, &[]).await?;
    let closed: Vec<DueBatch> = tx.query(CLOSE, &[]).await?.iter().map(read_due).collect::<Result<_, _>>()?;
    let ids: Vec<BatchId> = closed.iter().map(|batch| batch.batch_id).collect();
    tx.execute(CLOSED_THROUGH, &[&ids]).await?;
    lethe_process::fault::point("close.before_commit");
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(closed)
}

/// A batch whose time to run has come.
#[derive(Clone, Copy, Debug)]
pub struct ToRelease {
    /// Which one.
    pub batch: DueBatch,
    /// How late it is.
    pub late_seconds: f64,
    /// The cancellations that were queued before its release are handled.
    pub cancellations_handled: bool,
}

/// The batches whose time to run has come.
///
/// # Errors
/// [`DbError`].
pub async fn to_release(session: &Session) -> Result<Vec<ToRelease>, DbError> {
    let read = |row: &Row| {
        Ok(ToRelease {
            batch: read_due(row)?,
            late_seconds: row.get("late_seconds"),
            cancellations_handled: row.get("cancellations_handled"),
        })
    };
    session.query(TO_RELEASE, &[]).await?.iter().map(read).collect()
}

/// Records that the cancellations queued before the release of these batches are handled.
///
/// # Errors
/// [`DbError`].
pub async fn cancellations_handled(session: &Session, batches: &[BatchId]) -> Result<(), DbError> {
    session.execute(CANCELLATIONS_HANDLED, &[&batches]).await?;
    Ok(())
}

/// Marks released batches complete whose slices all are; returns how many.
///
/// # Errors
/// [`DbError::LeadershipLost`].
pub async fn complete(db: &Db, epoch: i64) -> Result<usize, DbError> {
    let tx = db.begin("complete_batches").await?;
    leader::assert(&tx, epoch).await?;
    let completed = tx.query(COMPLETE, &[]).await?.len();
    tx.commit().await?;
    Ok(completed)
}

/// A batch as operators see it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BatchRow {
    /// Which one.
    pub batch_id: BatchId,
    /// `erasure`, `expedited` or `access`.
    pub lane: Lane,
    /// When it closes or closed.
    pub tick_at: Timestamp,
    /// When it runs.
    pub runs_at: Timestamp,
    /// Where it stands.
    pub state: BatchState,
    /// When it was closed.
    pub closed_at: Option<Timestamp>,
    /// When the last slice was released.
    pub released_at: Option<Timestamp>,
    /// When the last slice was complete.
    pub completed_at: Option<Timestamp>,
    /// Requests in it.
    pub requests: i64,
    /// Of these, pending.
    pub pending: i64,
    /// Of these, in progress.
    pub in_progress: i64,
    /// Of these, completed.
    pub completed: i64,
    /// Of these, cancelled.
    pub cancelled: i64,
}

/// The latest batches, or the one with the given id.
///
/// # Errors
/// [`DbError`].
pub async fn list(session: &Session, only: Option<BatchId>, limit: i64) -> Result<Vec<BatchRow>, DbError> {
    let rows = session.query(LIST, &[&only, &limit]).await?;
    rows.iter()
        .map(|row| {
            Ok(BatchRow {
                batch_id: row.get("batch_id"),
                lane: row.column("lane")?,
                tick_at: row.get("tick_at"),
                runs_at: row.get("runs_at"),
                state: row.column("state")?,
                closed_at: row.get("closed_at"),
                released_at: row.get("released_at"),
                completed_at: row.get("completed_at"),
                requests: row.get("requests"),
                pending: row.get("pending"),
                in_progress: row.get("in_progress"),
                completed: row.get("completed"),
                cancelled: row.get("cancelled"),
            })
        })
        .collect()
}

/// Pending requests whose batch is not there, by the number that they name, 10,000 of each at most: after a restore or a
/// failover that lost it. Nothing closes or releases them.
///
/// # Errors
/// [`DbError`].
pub async fn without_batch(session: &Session) -> Result<Vec<(BatchId, i64)>, DbError> {
    Ok(session.query(WITHOUT_BATCH, &[]).await?.iter().map(|row| (row.get("batch_id"), row.get("pending"))).collect())
}

/// What a batch was executed on.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Executed {
    /// Profiles by source: `named` and `receipt` were known before, `release` were found in the release.
    pub mpids: Vec<(String, i64)>,
    /// By store: rows deleted, rows that arrived meanwhile, requests whose store fails.
    pub rows: Vec<(String, i64, i64, i64)>,
}

/// What a batch was executed on so far.
///
/// # Errors
/// [`DbError`].
pub async fn executed(session: &Session, batch_id: BatchId) -> Result<Executed, DbError> {
    let mpids = session.query(EXECUTED_MPIDS, &[&batch_id]).await?;
    let rows = session.query(EXECUTED_ROWS, &[&batch_id]).await?;
    Ok(Executed {
        mpids: mpids.iter().map(|row| (row.get("source"), row.get("profiles"))).collect(),
        rows: rows
            .iter()
            .map(|row| (row.get("store"), row.get("deleted"), row.get("arrived"), row.get("failing")))
            .collect(),
    })
}

/// The instant of the database's clock.
///
/// # Errors
/// [`DbError`].
pub async fn now(session: &Session) -> Result<Timestamp, DbError> {
    session.value(NOW, &[]).await
}

/// What intake begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intake {
    /// The instant of receipt.
    pub(super) received_at: Timestamp,
    /// The version of the calendar in force, if there is one.
    pub(super) calendar: Option<i64>,
}

/// Takes the lock on the calendar, shared, and then reads the clock.
pub(super) async fn begin_intake(tx: &Tx) -> Result<Intake, DbError> {
    let row = tx.query_one(BEGIN_INTAKE, &[]).await?;
    Ok(Intake { received_at: row.get("received_at"), calendar: row.get("calendar_version") })
}

/// The open batch of `slot`, opened where it is not there yet. The caller holds the lock on the calendar, shared.
pub(super) async fn open_batch(tx: &Tx, lane: Lane, slot: Slot, version: i64) -> Result<BatchId, DbError> {
    tx.execute(OPEN_BATCH, &[&lane, &slot.tick_at, &slot.runs_at, &version]).await?;
    let row = tx.query_opt(FIND_OPEN_BATCH, &[&lane, &slot.tick_at, &slot.runs_at]).await?;
    // The lock and the clock that never falls behind a closed tick rule this out.
    Ok(row.ok_or(DbError::Unexpected { place: "batches: the tick of a slot is closed" })?.get("batch_id"))
}
