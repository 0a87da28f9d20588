//! The audit trail in the database: what is not sealed yet, seals, heads, and reading it all in order.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::pool::Session;
use super::{DbError, Tx, statements};
use lethe_domain::audit_chain::{Digest, Entry, GENESIS, Head};
use lethe_domain::request::{ControllerId, RequestKey};

statements! {
    RECORD = "
        INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
        VALUES ($1, $2, $3, $4::jsonb || jsonb_build_object('database_user', session_user))";
    /// What is listed is committed, whatever its number. An entry that is gone stays listed: `lethe audit verify`
    /// names it.
    TAKE = "
        WITH listed AS MATERIALIZED (
            SELECT e.*, sum(pg_column_size(e.requests)) OVER (ORDER BY q.entry_id) AS bytes,
                   row_number() OVER (ORDER BY q.entry_id) AS place
              FROM lethe.audit_unsealed q
             -- Probed one by one: the whole trail must not be read for its end.
             CROSS JOIN LATERAL (SELECT * FROM lethe.audit_entries e WHERE e.entry_id = q.entry_id LIMIT 1) e
             WHERE coalesce(e.controller_id, '') <> ALL ($1) ORDER BY q.entry_id LIMIT $2),
        chosen AS MATERIALIZED (
            SELECT entry_id, controller_id, request_key, event, details, requests, recorded_at FROM listed
             WHERE place = 1 OR coalesce(bytes, 0) <= $3),
        taken AS (
            DELETE FROM lethe.audit_unsealed WHERE entry_id = ANY (ARRAY (SELECT entry_id FROM chosen)))
        SELECT entry_id, controller_id, request_key, event, details::text, requests::text, recorded_at
          FROM chosen ORDER BY entry_id";
    NOW = "SELECT lethe.now()";
    LOCK_HEADS = "
        SELECT chain, position, digest, signed_at, signature FROM lethe.audit_heads
         WHERE chain = ANY ($1) ORDER BY chain FOR UPDATE";
    /// The last place of each chain in a group is signed.
    WRITE_SEALS = "
        INSERT INTO lethe.audit_seals (chain, position, entry_id, digest, lines, signature, signed_at)
        SELECT s.chain, s.position, s.entry_id, s.digest, s.lines, h.signature,
               CASE WHEN h.chain IS NOT NULL THEN $8::timestamptz END
          FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bytea[], $9::integer[])
               AS s (chain, position, entry_id, digest, lines)
          LEFT JOIN unnest($5::text[], $6::bigint[], $7::text[]) AS h (chain, position, signature) USING (chain, position)
         ORDER BY s.chain, s.position";
    WRITE_HEADS = "
        INSERT INTO lethe.audit_heads AS h (chain, position, digest, signature, signed_at)
        SELECT chain, position, digest, signature, $5
          FROM unnest($1::text[], $2::bigint[], $3::bytea[], $4::text[]) AS q (chain, position, digest, signature)
         ORDER BY chain
        ON CONFLICT (chain) DO UPDATE
        SET position = excluded.position, digest = excluded.digest, signature = excluded.signature,
            signed_at = excluded.signed_at";
    PAGE = "
        SELECT chain, position, digest, signed_at, signature, entry_id, is_there, controller_id, request_key, event,
               details::text, requests::text, recorded_at
          FROM (SELECT s.chain, s.position, s.digest, coalesce(s.signed_at, '-infinity') AS signed_at, s.signature, s.entry_id,
                       e.entry_id IS NOT NULL AS is_there, e.controller_id, e.request_key, e.event, e.details, e.requests,
                       e.recorded_at, row_number() OVER in_order AS place, sum(pg_column_size(e.requests)) OVER in_order AS bytes
                  FROM lethe.audit_seals s LEFT JOIN lethe.audit_entries e USING (entry_id)
                 WHERE (s.chain, s.position) > ($1, $2) AND ($3::text IS NULL OR s.chain = $3)
                WINDOW in_order AS (ORDER BY s.chain, s.position)
                 ORDER BY s.chain, s.position LIMIT $4) page
         WHERE place = 1 OR coalesce(bytes, 0) <= $5
         ORDER BY chain, position";
    HEADS = "
        SELECT chain, position, digest, signed_at, signature FROM lethe.audit_heads
         WHERE $1::text IS NULL OR chain = $1 ORDER BY chain";
    UNSEALED = "
        SELECT count(*) FROM lethe.audit_unsealed u JOIN lethe.audit_entries e USING (entry_id)
         WHERE $1::text IS NULL OR coalesce(e.controller_id, '') = $1";
    /// Of which chain they were is gone with them.
    VANISHED = "
        SELECT u.entry_id FROM lethe.audit_unsealed u
         WHERE NOT EXISTS (SELECT FROM lethe.audit_entries e WHERE e.entry_id = u.entry_id) ORDER BY 1 LIMIT 1000";
    /// A range of numbers at a time: the whole of it would be too much for one statement.
    UNCHAINED = "
        SELECT e.entry_id, coalesce(e.controller_id, '') AS chain FROM lethe.audit_entries e
         WHERE e.entry_id > $1 AND e.entry_id <= $1 + $2
           AND NOT EXISTS (SELECT FROM lethe.audit_seals s WHERE s.entry_id = e.entry_id)
           AND NOT EXISTS (SELECT FROM lethe.audit_unsealed u WHERE u.entry_id = e.entry_id)
           AND ($3::text IS NULL OR coalesce(e.controller_id, '') = $3)
         ORDER BY e.entry_id LIMIT 1000";
    LAST_ENTRY = "SELECT coalesce(max(entry_id), 0) FROM lethe.audit_entries";
    /// Every controller was added, which is an entry.
    WITHOUT_TRAIL = "
        SELECT c.controller_id FROM lethe.controllers c
         WHERE ($1::text IS NULL OR c.controller_id = $1)
           AND NOT EXISTS (SELECT FROM lethe.audit_seals s WHERE s.chain = c.controller_id)
           AND NOT EXISTS (SELECT FROM lethe.audit_unsealed u JOIN lethe.audit_entries e USING (entry_id)
                            WHERE e.controller_id = c.controller_id)
         ORDER BY 1";
    /// Those of its slice: a request may complete before its neighbours.
    COMPLETIONS = "
        SELECT e.entry_id, e.controller_id, e.request_key, e.event, e.details::text, e.requests::text, e.recorded_at,
               s.position, s.digest, p.digest AS previous
          FROM lethe.requests r
         -- Each with a limit that none reaches: the planner has no other way than by the index.
         CROSS JOIN LATERAL (
            SELECT * FROM lethe.audit_entries e
             WHERE e.event = 'requests.completed' AND e.slice_id = r.slice_id AND e.controller_id = r.controller_id
             LIMIT 10000) e
          LEFT JOIN LATERAL (
            SELECT * FROM lethe.audit_seals s WHERE s.entry_id = e.entry_id LIMIT 1) s ON true
          LEFT JOIN LATERAL (
            SELECT * FROM lethe.audit_seals p WHERE p.chain = s.chain AND p.position = s.position - 1 LIMIT 1) p ON true
         WHERE r.request_key = $1 ORDER BY e.entry_id";
}

/// Records what an operator did, in the transaction in which it is done. `details` hold no personal data.
///
/// # Errors
/// [`DbError`].
pub async fn record(
    tx: &Tx,
    controller_id: Option<&ControllerId>,
    request: Option<RequestKey>,
    event: &str,
    details: &serde_json::Value,
) -> Result<(), DbError> {
    tx.execute(RECORD, &[&controller_id, &request, &event, details]).await?;
    Ok(())
}

fn digest(row: &Row, index: usize) -> Result<Digest, DbError> {
    row.get::<_, &[u8]>(index).try_into().map_err(|_| DbError::Unexpected { place: "audit digests" })
}

fn read_entry(row: &Row) -> Entry {
    Entry {
        entry_id: row.get("entry_id"),
        controller_id: row.get("controller_id"),
        request_key: row.get("request_key"),
        event: row.get("event"),
        details: row.get("details"),
        requests: row.get("requests"),
        recorded_at: row.get("recorded_at"),
    }
}

/// Bytes of sets that are read at once: one set may be larger, and then comes alone.
const SETS_AT_ONCE: i64 = 16 << 20;

/// Takes the next unsealed entries, of all chains but `left_out`; fewer than `limit` where their sets are large.
///
/// # Errors
/// [`DbError`].
pub async fn take(tx: &Tx, left_out: &[&str], limit: i64) -> Result<Vec<Entry>, DbError> {
    let rows = tx.query(TAKE, &[&left_out, &limit, &SETS_AT_ONCE]).await?;
    Ok(rows.iter().map(read_entry).collect())
}

fn read_head(row: &Row) -> Result<(Head, String), DbError> {
    let head = Head {
        chain: row.get("chain"),
        position: row.get("position"),
        digest: digest(row, 2)?,
        signed_at: row.get("signed_at"),
    };
    Ok((head, row.get("signature")))
}

/// The time, and the ends of these chains with their signatures; locks them.
///
/// # Errors
/// [`DbError`].
pub async fn lock_heads(tx: &Tx, chains: &[&str]) -> Result<(Timestamp, BTreeMap<String, (Head, String)>), DbError> {
    let now = tx.value(NOW, &[]).await?;
    let mut heads = BTreeMap::new();
    for row in tx.query(LOCK_HEADS, &[&chains]).await? {
        heads.insert(row.get("chain"), read_head(&row)?);
    }
    Ok((now, heads))
}

/// A place that an entry is given.
#[derive(Clone, Copy, Debug)]
pub struct NewSeal<'a> {
    /// The chain.
    pub chain: &'a str,
    /// The place in it.
    pub position: i64,
    /// The entry.
    pub entry_id: i64,
    /// The digest at this place.
    pub digest: Digest,
    /// How many lines of a set it covers.
    pub lines: usize,
}

/// Writes places, and the new ends of their chains with their signatures.
///
/// # Errors
/// [`DbError`].
pub async fn write_seals(tx: &Tx, seals: &[NewSeal<'_>], heads: &[(Head, String)]) -> Result<(), DbError> {
    let Some((first, _)) = heads.first() else { return Ok(()) };
    let chains: Vec<&str> = seals.iter().map(|seal| seal.chain).collect();
    let positions: Vec<i64> = seals.iter().map(|seal| seal.position).collect();
    let entries: Vec<i64> = seals.iter().map(|seal| seal.entry_id).collect();
    let digests: Vec<&[u8]> = seals.iter().map(|seal| seal.digest.as_slice()).collect();
    let names: Vec<&str> = heads.iter().map(|(head, _)| head.chain.as_str()).collect();
    let ends: Vec<i64> = heads.iter().map(|(head, _)| head.position).collect();
    let last: Vec<&[u8]> = heads.iter().map(|(head, _)| head.digest.as_slice()).collect();
    let signatures: Vec<&str> = heads.iter().map(|(_, signature)| signature.as_str()).collect();
    let lines: Vec<i32> = seals.iter().map(|seal| i32::try_from(seal.lines).unwrap_or(i32::MAX)).collect();
    let params: [&(dyn ToSql + Sync); 9] =
        [&chains, &positions, &entries, &digests, &names, &ends, &signatures, &first.signed_at, &lines];
    tx.execute(WRITE_SEALS, &params).await?;
    tx.execute(WRITE_HEADS, &[&names, &ends, &last, &signatures, &first.signed_at]).await?;
    Ok(())
}

/// A place of a chain, as it is read.
#[derive(Clone, Debug)]
pub struct SealedRow {
    /// Chain, position, digest; the time of the signature means something only with one.
    pub head: Head,
    /// The signature, where the sealer signed here.
    pub signature: Option<String>,
    /// The number of the entry.
    pub entry_id: i64,
    /// The entry; `None` where it is gone.
    pub entry: Option<Entry>,
}

/// The next places, in the order of chain and position, after the given one; fewer than `limit` where their sets are large.
///
/// # Errors
/// [`DbError`].
pub async fn page(
    session: &Session,
    (chain, position): (&str, i64),
    only: Option<&str>,
    limit: i64,
) -> Result<Vec<SealedRow>, DbError> {
    let rows = session.query(PAGE, &[&chain, &position, &only, &limit, &SETS_AT_ONCE]).await?;
    rows.iter()
        .map(|row| {
            let signature: Option<String> = row.get("signature");
            let signed_at = if signature.is_some() { row.get("signed_at") } else { Timestamp::UNIX_EPOCH };
            let head =
                Head { chain: row.get("chain"), position: row.get("position"), digest: digest(row, 2)?, signed_at };
            let entry_id = row.get("entry_id");
            let entry = row.get::<_, bool>("is_there").then(|| read_entry(row));
            Ok(SealedRow { head, signature, entry_id, entry })
        })
        .collect()
}

/// The signed ends of the chains, or of the one that is given.
///
/// # Errors
/// [`DbError`].
pub async fn heads(session: &Session, only: Option<&str>) -> Result<Vec<(Head, String)>, DbError> {
    session.query(HEADS, &[&only]).await?.iter().map(read_head).collect()
}

/// Entries that are not sealed yet.
///
/// # Errors
/// [`DbError`].
pub async fn unsealed(session: &Session, only: Option<&str>) -> Result<i64, DbError> {
    session.value(UNSEALED, &[&only]).await
}

/// Entries that were removed before they were sealed.
///
/// # Errors
/// [`DbError`].
pub async fn vanished(session: &Session) -> Result<Vec<i64>, DbError> {
    session.values(VANISHED, &[]).await
}

/// Entries that are neither sealed nor waiting for it, with their chains.
///
/// # Errors
/// [`DbError`].
pub async fn unchained(session: &Session, only: Option<&str>) -> Result<Vec<(i64, String)>, DbError> {
    const STEP: i64 = 50_000;
    let last: i64 = session.value(LAST_ENTRY, &[]).await?;
    let mut found = Vec::new();
    for after in (0..last).step_by(usize::try_from(STEP).unwrap_or(1)) {
        let rows = session.query(UNCHAINED, &[&after, &STEP, &only]).await?;
        found.extend(rows.iter().map(|row| (row.get("entry_id"), row.get("chain"))));
    }
    Ok(found)
}

/// Controllers without any entry.
///
/// # Errors
/// [`DbError`].
pub async fn without_trail(session: &Session, only: Option<&str>) -> Result<Vec<String>, DbError> {
    session.values(WITHOUT_TRAIL, &[&only]).await
}

/// A place in a chain.
#[derive(Clone, Debug)]
pub struct Place {
    /// From 1.
    pub position: i64,
    /// The digest there.
    pub digest: Digest,
    /// The digest before it; `None` where that place is gone.
    pub previous: Option<Digest>,
}

/// The entries that tell of completed requests of the slice of a request, each with its place once it is sealed. One of them
/// tells of the request itself, if it is completed.
///
/// # Errors
/// [`DbError`].
pub async fn completions(session: &Session, request: RequestKey) -> Result<Vec<(Entry, Option<Place>)>, DbError> {
    let unexpected = |_| DbError::Unexpected { place: "audit digests" };
    let rows = session.query(COMPLETIONS, &[&request]).await?;
    rows.iter()
        .map(|row| {
            let place = match row.get::<_, Option<i64>>("position") {
                None => None,
                Some(position) => {
                    let previous: Option<&[u8]> = row.get("previous");
                    let before = previous.map(Digest::try_from).transpose().map_err(unexpected)?;
                    let previous = if position == 1 { Some(GENESIS) } else { before };
                    let digest = row.get::<_, &[u8]>("digest").try_into().map_err(unexpected)?;
                    Some(Place { position, digest, previous })
                }
            };
            Ok((read_entry(row), place))
        })
        .collect()
}
