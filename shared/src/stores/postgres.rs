//! The built-in store: schema `subject_data` in PostgreSQL (contract 8).

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::{DataStore, Erasure, ExportLine, Held, StoreError};
use crate::db::{Db, DbError, Tx, slices, statements};
use crate::request::{ControllerId, Mpid, RequestKey};

statements! {
    /// A profile that was created after the start of the execution is a new one and stays.
    DELETE_PROFILES = "
        WITH gone AS (
            DELETE FROM subject_data.profiles
             WHERE controller_id = $1 AND mpid = ANY ($2) AND created_at <= $3 RETURNING mpid)
        SELECT mpid, count(*) FROM gone GROUP BY mpid";
    /// Identities have no time of receipt of their own: they go with their profile, and stay with a new one. The profiles
    /// are named once more, here and in `COUNT`: the planner, which expects few new ones, would look for these in the
    /// whole table.
    DELETE_IDENTITIES = "
        WITH gone AS (
            DELETE FROM subject_data.profile_identities i
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2)
               AND NOT EXISTS (SELECT FROM subject_data.profiles p
                                WHERE p.controller_id = $1 AND p.mpid = i.mpid AND p.mpid = ANY ($2)
                                  AND p.created_at > $3) RETURNING mpid)
        SELECT mpid, count(*) FROM gone GROUP BY mpid";
    /// A bounded number of rows for each transaction; found by the index on (mpid, id), deleted by their place.
    DELETE_EVENT_BATCHES = "
        WITH gone AS (
            DELETE FROM subject_data.event_batches
             WHERE controller_id = $1 AND ctid = ANY (ARRAY (
                SELECT ctid FROM subject_data.event_batches
                 WHERE controller_id = $1 AND mpid = ANY ($2) AND received_at <= $3 LIMIT $4))
            RETURNING mpid)
        SELECT mpid, count(*) FROM gone GROUP BY mpid";
    /// Transactions other than ours that hold a write lock on the controller's tables: what they wrote before the
    /// start of the execution is not visible until they end.
    WRITERS = "
        SELECT DISTINCT l.virtualtransaction || '/' || l.pid
          FROM pg_locks l
          JOIN pg_inherits h ON h.inhrelid = l.relation
          JOIN pg_class c ON c.oid = h.inhrelid
         WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND l.mode = 'RowExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()
           AND h.inhparent = ANY (ARRAY['subject_data.profiles', 'subject_data.profile_identities',
                                        'subject_data.event_batches']::regclass[])
           AND c.relname ~ ('_p' || (SELECT partition_no FROM lethe.controllers WHERE controller_id = $1) || '$')";
    COUNT = "
        SELECT mpid, sum(before)::bigint, sum(later)::bigint FROM (
            SELECT mpid, count(*) FILTER (WHERE created_at <= $3) AS before, count(*) FILTER (WHERE created_at > $3) AS later
              FROM subject_data.profiles WHERE controller_id = $1 AND mpid = ANY ($2) GROUP BY mpid
            UNION ALL
            SELECT i.mpid, count(*) FILTER (WHERE p.mpid IS NULL), count(*) FILTER (WHERE p.mpid IS NOT NULL)
              FROM subject_data.profile_identities i
              LEFT JOIN subject_data.profiles p
                ON p.controller_id = $1 AND p.mpid = i.mpid AND p.mpid = ANY ($2) AND p.created_at > $3
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2) GROUP BY i.mpid
            UNION ALL
            SELECT mpid, count(*) FILTER (WHERE received_at <= $3), count(*) FILTER (WHERE received_at > $3)
              FROM subject_data.event_batches WHERE controller_id = $1 AND mpid = ANY ($2) GROUP BY mpid) held
         GROUP BY mpid";
    /// Audience memberships are inferred data and left out (contract 7).
    EXPORT_PROFILES = "
        SELECT json_build_object(
                   'mpid', p.mpid,
                   'identities', coalesce((SELECT json_object_agg(i.identity_type, i.identity_value ORDER BY i.identity_type)
                                             FROM subject_data.profile_identities i
                                            WHERE i.controller_id = $1 AND i.mpid = p.mpid), '{}'::json),
                   'attributes', p.attributes,
                   'created_at', p.created_at,
                   'updated_at', p.updated_at)::text
          FROM subject_data.profiles p
         WHERE p.controller_id = $1 AND p.mpid = ANY ($2) AND p.created_at <= $3
         ORDER BY p.mpid";
    /// A page of the event batches of one profile, in the order of arrival; pages go on behind the last id.
    EXPORT_EVENT_BATCHES = "
        SELECT id, body::text FROM subject_data.event_batches
         WHERE controller_id = $1 AND mpid = $2 AND id > $3 AND received_at <= $4
         ORDER BY id LIMIT $5";
}

/// Profiles erased in one transaction at most.
const MPIDS_PER_TRANSACTION: usize = 500;
/// Event batches deleted in one transaction at most.
const ROWS_PER_TRANSACTION: i64 = 10_000;
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
        self.await_writers(erasure).await?;
        let mpids: Vec<Mpid> = erasure.mpids.keys().copied().collect();
        for chunk in mpids.chunks(MPIDS_PER_TRANSACTION) {
            let mut statements = &[DELETE_PROFILES, DELETE_IDENTITIES, DELETE_EVENT_BATCHES][..];
            while self.erase_rows(erasure, chunk, statements).await? {
                statements = &[DELETE_EVENT_BATCHES];
            }
            crate::fault::point("erase.mid_slice");
        }
        Ok(())
    }

    /// Waits until the transactions that were writing to this controller's tables have ended; what begins now has a
    /// later time of receipt.
    async fn await_writers(&self, erasure: &Erasure<'_>) -> Result<(), StoreError> {
        let mut waited_for: Option<Vec<String>> = None;
        for attempt in 0..50_u32 {
            let session = self.db.session().await?;
            let rows = session.query(WRITERS, &[erasure.controller_id()]).await?;
            let now: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            let left = match &waited_for {
                None => now,
                Some(first) => now.into_iter().filter(|writer| first.contains(writer)).collect(),
            };
            if left.is_empty() {
                return Ok(());
            }
            waited_for = Some(left);
            drop(session);
            tokio::time::sleep(std::time::Duration::from_millis(u64::from(attempt.min(20)) * 10 + 5)).await;
        }
        Err(StoreError::WritersUnderWay)
    }

    /// One transaction: a receipt is written once for all that it deletes. Whether event batches may be left.
    async fn erase_rows(
        &self,
        erasure: &Erasure<'_>,
        mpids: &[Mpid],
        statements: &[&'static str],
    ) -> Result<bool, StoreError> {
        let tx = self.db.begin("erase_rows").await?;
        slices::hold(&tx, erasure.claimed).await?;
        let mut deleted: BTreeMap<RequestKey, i64> = BTreeMap::new();
        let mut event_batches = 0;
        for statement in statements {
            let all: [&(dyn ToSql + Sync); 4] =
                [erasure.controller_id(), &mpids, &erasure.as_of(), &ROWS_PER_TRANSACTION];
            let bounded = *statement == DELETE_EVENT_BATCHES;
            let rows = tx.query(statement, if bounded { &all } else { &all[..3] }).await?;
            for row in &rows {
                let (mpid, count): (Mpid, i64) = (row.get(0), row.get(1));
                if let Some(key) = erasure.mpids.get(&mpid) {
                    *deleted.entry(*key).or_default() += count;
                }
                event_batches += if bounded { count } else { 0 };
            }
        }
        record(&tx, erasure, &deleted).await?;
        tx.commit().await?;
        Ok(event_batches == ROWS_PER_TRANSACTION)
    }

    async fn count_all(
        &self,
        controller_id: &ControllerId,
        mpids: &[Mpid],
        as_of: Timestamp,
    ) -> Result<BTreeMap<Mpid, Held>, StoreError> {
        let session = self.db.session().await?;
        let rows = session.query(COUNT, &[controller_id, &mpids, &as_of]).await?;
        Ok(rows.iter().map(|row| (row.get(0), Held { before: row.get(1), later: row.get(2) })).collect())
    }
}

/// Adds deleted rows to the receipts, in the transaction that deletes them.
async fn record(tx: &Tx, erasure: &Erasure<'_>, deleted: &BTreeMap<RequestKey, i64>) -> Result<(), DbError> {
    if !deleted.is_empty() {
        slices::record_deleted(tx, erasure.claimed, PostgresStore::NAME, deleted).await?;
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
        let line = |row: &Row| Ok(ExportLine::Profile(Bytes::copy_from_slice(row.get::<_, &str>(0).as_bytes())));
        Ok::<_, StoreError>(futures_util::stream::iter(rows.iter().map(line).collect::<Vec<_>>()))
    };
    futures_util::stream::iter(mpids.chunks(MPIDS_PER_TRANSACTION)).then(read).try_flatten()
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
        last = row.get(0);
        let line = Bytes::copy_from_slice(row.get::<_, &str>(1).as_bytes());
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
