//! The built-in store: schema `subject_data` in PostgreSQL (contract 8).

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::steps::StepSize;
use super::{DataStore, Erasure, ExportLine, Held, StoreError, writers};
use lethe_db::{Db, DbError, Tx, slices, statements};
use lethe_domain::request::{ControllerId, Mpid, RequestKey};

statements! {
    /// A profile that was created, or replaced by an import, after the start of the execution is a new one and stays
    /// (ADR 0037). What a controller's own SQL changes meanwhile is the same one: it goes.
    DELETE_PROFILES = "
        WITH gone AS (
            DELETE FROM subject_data.profiles
             WHERE controller_id = $1 AND mpid = ANY ($2) AND coalesce(replaced_at, created_at) <= $3 RETURNING mpid)
        SELECT mpid, count(*) AS rows FROM gone GROUP BY mpid";
    /// Identities have no time of receipt of their own: they go with their profile, and stay with a new one. The profiles
    /// are named once more, here and in `COUNT`: the planner, which expects few new ones, would look for these in the
    /// whole table.
    DELETE_IDENTITIES = "
        WITH gone AS (
            DELETE FROM subject_data.profile_identities i
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2)
               AND NOT EXISTS (SELECT FROM subject_data.profiles p
                                WHERE p.controller_id = $1 AND p.mpid = i.mpid AND p.mpid = ANY ($2)
                                  AND coalesce(p.replaced_at, p.created_at) > $3) RETURNING mpid)
        SELECT mpid, count(*) AS rows FROM gone GROUP BY mpid";
    /// A step is bounded in rows and in bytes, as stored, and deletes one row at least. It goes on behind the last row of the
    /// step before, so that what is dead and not yet forgotten is not walked over again; rows are found by the key and
    /// deleted by their place.
    DELETE_EVENT_BATCHES = "
        WITH found AS MATERIALIZED (
            SELECT q.no, q.mpid, e.id, e.place, e.size FROM unnest($2::bigint[]) WITH ORDINALITY AS q (mpid, no)
             CROSS JOIN LATERAL (
                SELECT b.id, b.ctid AS place, pg_column_size(b.body) AS size FROM subject_data.event_batches b
                 WHERE b.controller_id = $1 AND b.mpid = q.mpid AND b.received_at <= $3
                   AND b.id > CASE q.no WHEN 1 THEN $4::bigint ELSE '-9223372036854775808' END
                 ORDER BY b.id LIMIT $5) e
             LIMIT $5),
        chosen AS MATERIALIZED (
            SELECT no, mpid, id, place FROM (
                SELECT no, mpid, id, place, sum(size) OVER (ORDER BY no, id) - size AS bytes_before FROM found) f
             WHERE bytes_before < $6),
        gone AS (
            DELETE FROM subject_data.event_batches
             WHERE controller_id = $1 AND ctid = ANY (ARRAY (SELECT place FROM chosen)) RETURNING mpid)
        SELECT c.mpid, coalesce(g.rows, 0) AS rows, c.last,
               (SELECT count(*) FROM found) = $5 OR (SELECT count(*) FROM found) > (SELECT count(*) FROM chosen) AS more
          FROM (SELECT no, mpid, max(id) AS last FROM chosen GROUP BY no, mpid) c
          LEFT JOIN (SELECT mpid, count(*) AS rows FROM gone GROUP BY mpid) g USING (mpid) ORDER BY c.no";
    /// For the transaction of a step. Waiting for a lock holds up what could be done meanwhile. Together the statements
    /// of a step end before the lease; a limit that was set lower stays. And it is not taken for a writer by others.
    BEGIN_STEP = "
        SELECT pg_advisory_xact_lock_shared(lethe.eraser_lock()), set_config('lock_timeout', '2s', true),
               CASE WHEN current_setting('statement_timeout')::interval NOT BETWEEN '1us' AND '10s'
                    THEN set_config('statement_timeout', '10s', true) END";
    COUNT = "
        SELECT mpid, sum(before)::bigint AS before, sum(later)::bigint AS later FROM (
            SELECT mpid, count(*) FILTER (WHERE coalesce(replaced_at, created_at) <= $3) AS before,
                   count(*) FILTER (WHERE coalesce(replaced_at, created_at) > $3) AS later
              FROM subject_data.profiles WHERE controller_id = $1 AND mpid = ANY ($2) GROUP BY mpid
            UNION ALL
            SELECT i.mpid, count(*) FILTER (WHERE p.mpid IS NULL), count(*) FILTER (WHERE p.mpid IS NOT NULL)
              FROM subject_data.profile_identities i
              LEFT JOIN subject_data.profiles p
                ON p.controller_id = $1 AND p.mpid = i.mpid AND p.mpid = ANY ($2)
               AND coalesce(p.replaced_at, p.created_at) > $3
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2) GROUP BY i.mpid
            UNION ALL
            SELECT mpid, count(*) FILTER (WHERE received_at <= $3), count(*) FILTER (WHERE received_at > $3)
              FROM subject_data.event_batches WHERE controller_id = $1 AND mpid = ANY ($2) GROUP BY mpid) held
         GROUP BY mpid";
    /// Of everybody who was held at the start of the execution, as they are now: profiles, and identities without one. One
    /// that was replaced since is still somebody's who asked. Several values of a type are a list, so that no key stands
    /// twice. Audience memberships are inferred data and left out (contract 7).
    EXPORT_PROFILES = "
        SELECT json_build_object(
                   'mpid', m.mpid,
                   'identities', coalesce(i.identities, '{}'::json),
                   'attributes', p.attributes,
                   'created_at', p.created_at,
                   'updated_at', p.updated_at)::text
          FROM unnest($2::bigint[]) AS m (mpid)
          LEFT JOIN subject_data.profiles p ON p.controller_id = $1 AND p.mpid = m.mpid AND p.mpid = ANY ($2)
         CROSS JOIN LATERAL (
            SELECT json_object_agg(t.identity_type, t.value ORDER BY t.identity_type) AS identities
              FROM (SELECT identity_type,
                           CASE count(*) WHEN 1 THEN to_json(min(identity_value))
                                         ELSE json_agg(identity_value ORDER BY identity_value) END AS value
                      FROM subject_data.profile_identities
                     WHERE controller_id = $1 AND mpid = m.mpid GROUP BY identity_type) t) i
         WHERE p.created_at <= $3 OR (p.mpid IS NULL AND i.identities IS NOT NULL)
         ORDER BY m.mpid";
    /// A page of the event batches of one profile, in the order of arrival; pages go on behind the last id.
    EXPORT_EVENT_BATCHES = "
        SELECT id, body::text FROM subject_data.event_batches
         WHERE controller_id = $1 AND mpid = $2 AND id > $3 AND received_at <= $4
         ORDER BY id LIMIT $5";
}

/// Profiles read or erased at once at most.
const MPIDS_PER_STEP: usize = 500;
/// Event batches deleted in one transaction at most.
const ROWS_PER_STEP: i64 = 10_000;
/// Bytes of event batches deleted in one transaction at most, as they are stored.
const BYTES_PER_STEP: i64 = 64 << 20;
/// Profiles counted in one statement at most.
const MPIDS_PER_COUNT: usize = 1_000;
/// Event batches read in one statement at most.
const ROWS_PER_PAGE: i64 = 10_000;
/// Event batches are handed on in bundles of about so many bytes, and at least one.
const BUNDLE: usize = 64 * 1024;

/// The built-in store.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    db: Db,
}

impl PostgresStore {
    /// The name in receipts and metrics.
    pub const NAME: &'static str = "postgres";

    /// The store in this database.
    #[must_use]
    pub const fn new(db: Db) -> Self {
        Self { db }
    }

    async fn erase_all(&self, erasure: &Erasure<'_>) -> Result<(), StoreError> {
        writers::wait(&self.db, erasure.claimed).await?;
        let mpids: Vec<Mpid> = erasure.mpids.keys().copied().collect();
        let mut size = StepSize::default();
        let mut left = Left { mpids: &mpids, begun: 0, after: i64::MIN };
        while !left.mpids.is_empty() {
            match self.erase_step(erasure, left, size).await {
                Ok(next) => {
                    left = next;
                    size.grow();
                }
                Err(error) if error.is_too_much() && size.shrink() => {
                    tracing::debug!(slice = %erasure.claimed.slice_id, class = error.class(), ?size, "a step was too much; the next one is smaller");
                    // Its own renewal of the lease was rolled back with it.
                    slices::hold(&self.db.session().await?, erasure.claimed).await?;
                }
                Err(error) => return Err(error),
            }
            lethe_process::fault::point("erase.mid_slice");
        }
        Ok(())
    }

    /// One transaction: a receipt is written once for all that it deletes. What is left afterwards.
    async fn erase_step<'a>(
        &self,
        erasure: &Erasure<'_>,
        left: Left<'a>,
        size: StepSize,
    ) -> Result<Left<'a>, StoreError> {
        let at_hand = if left.begun > 0 { left.begun } else { left.mpids.len() };
        let (chunk, rest) = left.mpids.split_at(size.of(MPIDS_PER_STEP).min(at_hand));
        let tx = self.db.begin("erase_rows").await?;
        let rows = match delete(&tx, erasure, chunk, left, size).await {
            Ok(rows) => rows,
            Err(error) => {
                tx.rollback().await;
                return Err(error);
            }
        };
        tx.commit().await?;
        let begun = left.begun.max(chunk.len());
        let more = rows.last().filter(|last| last.get("more"));
        let Some(last) = more else { return Ok(Left { mpids: rest, begun: begun - chunk.len(), after: i64::MIN }) };
        let mpid: Mpid = last.get("mpid");
        let done = chunk.iter().take_while(|one| **one < mpid).count();
        Ok(Left { mpids: left.mpids.split_at(done).1, begun: begun - done, after: last.get("last") })
    }

    async fn count_all(
        &self,
        controller_id: &ControllerId,
        mpids: &[Mpid],
        as_of: Timestamp,
    ) -> Result<BTreeMap<Mpid, Held>, StoreError> {
        let session = self.db.session().await?;
        let (mut held, mut left, mut size) = (BTreeMap::new(), mpids, StepSize::default());
        while !left.is_empty() {
            let (chunk, rest) = left.split_at(size.of(MPIDS_PER_COUNT).min(left.len()));
            match session.query(COUNT, &[controller_id, &chunk, &as_of]).await {
                Ok(rows) => {
                    held.extend(
                        rows.iter()
                            .map(|row| (row.get("mpid"), Held { before: row.get("before"), later: row.get("later") })),
                    );
                    left = rest;
                    size.grow();
                }
                Err(error) if error.is_too_much() && chunk.len() > 1 && size.shrink() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(held)
    }
}

/// What an erasure has still to go through.
#[derive(Clone, Copy)]
struct Left<'a> {
    /// In order.
    mpids: &'a [Mpid],
    /// Of so many, the first ones, the profiles are gone, and only event batches are left.
    begun: usize,
    /// The last event batch of the first one that is gone.
    after: i64,
}

/// The deletes of a step, and their receipts; the event batches that it found, by profile.
async fn delete(
    tx: &Tx,
    erasure: &Erasure<'_>,
    chunk: &[Mpid],
    left: Left<'_>,
    size: StepSize,
) -> Result<Vec<Row>, StoreError> {
    tx.query_one(BEGIN_STEP, &[]).await?;
    slices::hold(tx, erasure.claimed).await?;
    let mut deleted: BTreeMap<RequestKey, i64> = BTreeMap::new();
    let mut count = |row: &Row| {
        if let Some(key) = erasure.mpids.get(&row.get("mpid")) {
            *deleted.entry(*key).or_default() += row.get::<_, i64>("rows");
        }
    };
    if left.begun == 0 {
        for statement in [DELETE_PROFILES, DELETE_IDENTITIES] {
            let rows = tx.query(statement, &[erasure.controller_id(), &chunk, &erasure.as_of()]).await?;
            rows.iter().for_each(&mut count);
        }
    }
    let (rows, bytes) = (size.of_i64(ROWS_PER_STEP), size.of_i64(BYTES_PER_STEP));
    let params: [&(dyn ToSql + Sync); 6] =
        [erasure.controller_id(), &chunk, &erasure.as_of(), &left.after, &rows, &bytes];
    let rows = tx.query(DELETE_EVENT_BATCHES, &params).await?;
    rows.iter().for_each(&mut count);
    record(tx, erasure, &deleted).await?;
    Ok(rows)
}

/// Adds deleted rows to the receipts, in the transaction that deletes them.
async fn record(tx: &Tx, erasure: &Erasure<'_>, deleted: &BTreeMap<RequestKey, i64>) -> Result<(), DbError> {
    if !deleted.is_empty() {
        slices::record_deleted(tx, erasure.receipts, deleted).await?;
    }
    let total: i64 = deleted.values().sum();
    metrics::counter!("lethe_rows_erased_total", "store" => PostgresStore::NAME)
        .increment(u64::try_from(total).unwrap_or(0));
    Ok(())
}

impl DataStore for PostgresStore {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn erase<'a>(&'a self, erasure: &'a Erasure<'a>) -> BoxFuture<'a, Result<(), StoreError>> {
        self.erase_all(erasure).boxed()
    }

    fn count<'a>(
        &'a self,
        controller_id: &'a ControllerId,
        mpids: &'a [Mpid],
        as_of: Timestamp,
    ) -> BoxFuture<'a, Result<BTreeMap<Mpid, Held>, StoreError>> {
        self.count_all(controller_id, mpids, as_of).boxed()
    }

    fn export<'a>(
        &'a self,
        controller_id: &'a ControllerId,
        mpids: &'a [Mpid],
        as_of: Timestamp,
    ) -> BoxStream<'a, Result<ExportLine, StoreError>> {
        let profiles = profiles(&self.db, controller_id, mpids, as_of);
        let batches = futures_util::stream::iter(mpids)
            .flat_map(move |mpid| event_batches(&self.db, controller_id, *mpid, as_of));
        profiles.chain(batches).boxed()
    }
}

/// The profiles, some hundreds at once: each is small.
fn profiles<'a>(
    db: &'a Db,
    controller_id: &'a ControllerId,
    mpids: &'a [Mpid],
    as_of: Timestamp,
) -> impl futures_util::Stream<Item = Result<ExportLine, StoreError>> + 'a {
    let read = move |chunk: &'a [Mpid]| async move {
        let rows = db.session().await?.query(EXPORT_PROFILES, &[controller_id, &chunk, &as_of]).await?;
        let line = |row: &Row| {
            Ok(ExportLine::Profile(Bytes::copy_from_slice(row.get::<_, &str>("json_build_object").as_bytes())))
        };
        Ok::<_, StoreError>(futures_util::stream::iter(rows.iter().map(line).collect::<Vec<_>>()))
    };
    futures_util::stream::iter(mpids.chunks(MPIDS_PER_STEP)).then(read).try_flatten()
}

/// The event batches of one profile, page after page.
fn event_batches<'a>(
    db: &'a Db,
    controller_id: &'a ControllerId,
    mpid: Mpid,
    as_of: Timestamp,
) -> impl futures_util::Stream<Item = Result<ExportLine, StoreError>> + 'a {
    let bundles = futures_util::stream::unfold(None, move |reader: Option<BatchReader>| async move {
        let mut reader = reader.unwrap_or_else(|| BatchReader::start(db, controller_id, mpid, as_of));
        if let Some(bundle) = reader.bundles.recv().await {
            return Some((Ok(bundle), Some(reader)));
        }
        // The end of the reader says whether it has read everything. Asked for once: an error ends the export.
        let end = reader.end.take()?.await;
        match end.unwrap_or(Err(StoreError::Db(DbError::Unexpected { place: "a page" }))) {
            Ok(()) => None,
            Err(error) => Some((Err(error), Some(reader))),
        }
    });
    bundles
        .map_ok(|bundle| futures_util::stream::iter(bundle).map(|line| Ok(ExportLine::EventBatch(line))))
        .try_flatten()
}

/// Reads pages in a task of its own, ahead of whoever takes them. Rows pass in bundles through a short channel: a page of
/// large batches is never in memory as a whole, and a slow reader makes the server wait.
struct BatchReader {
    bundles: tokio::sync::mpsc::Receiver<Vec<Bytes>>,
    end: Option<tokio::task::JoinHandle<Result<(), StoreError>>>,
}

impl BatchReader {
    fn start(db: &Db, controller_id: &ControllerId, mpid: Mpid, as_of: Timestamp) -> Self {
        let (sender, bundles) = tokio::sync::mpsc::channel(2);
        let (db, controller_id) = (db.clone(), controller_id.clone());
        let end = tokio::spawn(async move {
            let mut after = i64::MIN;
            while let Some(last) = read_page(&db, &controller_id, mpid, after, as_of, &sender).await? {
                after = last;
            }
            Ok(())
        });
        Self { bundles, end: Some(end) }
    }
}

/// Reads one page; its last id, or `None` where nothing follows or nobody listens any more.
async fn read_page(
    db: &Db,
    controller_id: &ControllerId,
    mpid: Mpid,
    after: i64,
    as_of: Timestamp,
    sender: &tokio::sync::mpsc::Sender<Vec<Bytes>>,
) -> Result<Option<i64>, StoreError> {
    // The time that a slow reader takes counts as time of the statement. For this transaction only: whatever becomes of
    // it, nobody inherits the setting.
    let tx = db.begin_snapshot("export_page").await?;
    tx.batch_execute("SET LOCAL statement_timeout = '1h'").await?;
    let params: [&(dyn ToSql + Sync); 5] = [controller_id, &mpid, &after, &as_of, &ROWS_PER_PAGE];
    let rows = tx.stream(EXPORT_EVENT_BATCHES, &params).await?;
    futures_util::pin_mut!(rows);
    let (mut read, mut last) = (0, after);
    let (mut bundle, mut size) = (Vec::new(), 0);
    while let Some(row) = rows.try_next().await.map_err(DbError::from)? {
        read += 1;
        last = row.get("id");
        let line = Bytes::copy_from_slice(row.get::<_, &str>("body").as_bytes());
        size += line.len();
        bundle.push(line);
        if size >= BUNDLE {
            size = 0;
            // A send fails when nobody reads any more.
            if sender.send(std::mem::take(&mut bundle)).await.is_err() {
                return Ok(None);
            }
        }
    }
    tx.commit().await?;
    if !bundle.is_empty() && sender.send(bundle).await.is_err() {
        return Ok(None);
    }
    Ok((read == ROWS_PER_PAGE).then_some(last))
}
