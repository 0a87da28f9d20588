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
    /// Identities have no time of receipt of their own: they go with their profile, and stay with a new one.
    DELETE_IDENTITIES = "
        WITH gone AS (
            DELETE FROM subject_data.profile_identities i
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2)
               AND NOT EXISTS (SELECT FROM subject_data.profiles p
                                WHERE p.controller_id = $1 AND p.mpid = i.mpid AND p.created_at > $3) RETURNING mpid)
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
                ON p.controller_id = $1 AND p.mpid = i.mpid AND p.created_at > $3
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
const ROWS_PER_PAGE: i64 = 1_000;

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
            self.erase_profiles(erasure, chunk).await?;
            crate::fault::point("erase.mid_slice");
            while self.erase_event_batches(erasure, chunk).await? == ROWS_PER_TRANSACTION {}
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

    async fn erase_profiles(&self, erasure: &Erasure<'_>, mpids: &[Mpid]) -> Result<(), StoreError> {
        let tx = self.db.begin("erase_profiles").await?;
        slices::hold(&tx, erasure.claimed).await?;
        for statement in [DELETE_PROFILES, DELETE_IDENTITIES] {
            let rows = tx.query(statement, &[erasure.controller_id(), &mpids, &erasure.as_of()]).await?;
            record(&tx, erasure, &rows).await?;
        }
        Ok(tx.commit().await?)
    }

    async fn erase_event_batches(&self, erasure: &Erasure<'_>, mpids: &[Mpid]) -> Result<i64, StoreError> {
        let tx = self.db.begin("erase_event_batches").await?;
        slices::hold(&tx, erasure.claimed).await?;
        let rows = tx
            .query(DELETE_EVENT_BATCHES, &[erasure.controller_id(), &mpids, &erasure.as_of(), &ROWS_PER_TRANSACTION])
            .await?;
        let deleted = record(&tx, erasure, &rows).await?;
        tx.commit().await?;
        Ok(deleted)
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

/// Adds deleted rows to the receipts, in the transaction that deletes them; returns how many there were.
async fn record(tx: &Tx, erasure: &Erasure<'_>, rows: &[Row]) -> Result<i64, DbError> {
    let deleted: Vec<(RequestKey, i64)> = rows
        .iter()
        .filter_map(|row| erasure.mpids.get(&row.get::<_, Mpid>(0)).map(|key| (*key, row.get::<_, i64>(1))))
        .collect();
    if !deleted.is_empty() {
        slices::record_deleted(tx, PostgresStore::NAME, &deleted).await?;
    }
    let total = deleted.iter().map(|(_, rows)| rows).sum();
    metrics::counter!("lethe_rows_erased_total", "store" => PostgresStore::NAME)
        .increment(u64::try_from(total).unwrap_or(0));
    Ok(total)
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
    let first = PageReader::start(db, controller_id, mpid, i64::MIN, as_of);
    futures_util::stream::unfold(Some(first), move |reader| async move {
        let mut reader = reader?;
        loop {
            if let Some(line) = reader.lines.recv().await {
                return Some((Ok(ExportLine::EventBatch(line)), Some(reader)));
            }
            match reader.end.await.unwrap_or(Err(StoreError::Db(DbError::Unexpected { place: "a page" }))) {
                Ok(Some(after)) => reader = PageReader::start(db, controller_id, mpid, after, as_of),
                Ok(None) => return None,
                Err(error) => return Some((Err(error), None)),
            }
        }
    })
}

/// Reads one page in a task of its own. Rows pass through a short channel: a page of large batches is never in memory
/// as a whole, and a slow reader makes the server wait.
struct PageReader {
    lines: tokio::sync::mpsc::Receiver<Bytes>,
    /// The last id of a full page; `None` where nothing follows.
    end: tokio::task::JoinHandle<Result<Option<i64>, StoreError>>,
}

impl PageReader {
    fn start(db: &Db, controller_id: &ControllerId, mpid: Mpid, after: i64, as_of: Timestamp) -> Self {
        let (sender, lines) = tokio::sync::mpsc::channel(8);
        let (db, controller_id) = (db.clone(), controller_id.clone());
        let end = tokio::spawn(async move {
            let session = db.session().await?;
            // The time that a slow reader takes counts as time of the statement.
            session.batch_execute("SET statement_timeout = '1h'").await?;
            let statement = session.prepared(EXPORT_EVENT_BATCHES).await?;
            let params: [&(dyn ToSql + Sync); 5] = [&controller_id, &mpid, &after, &as_of, &ROWS_PER_PAGE];
            let rows = session.raw().query_raw(&statement, params).await.map_err(DbError::from)?;
            futures_util::pin_mut!(rows);
            let (mut read, mut last) = (0, after);
            while let Some(row) = rows.try_next().await.map_err(DbError::from)? {
                read += 1;
                last = row.get(0);
                // A send fails when nobody reads any more.
                if sender.send(Bytes::copy_from_slice(row.get::<_, &str>(1).as_bytes())).await.is_err() {
                    return Ok(None);
                }
            }
            session.batch_execute("RESET statement_timeout").await?;
            Ok((read == ROWS_PER_PAGE).then_some(last))
        });
        Self { lines, end }
    }
}
