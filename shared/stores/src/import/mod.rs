//! Import of subject data from JSON Lines into the built-in store (contract 8).
//!
//! A line of profiles is the whole profile: what it no longer has is removed. A line of event batches is added. What
//! cannot be imported is named by line, field and rule.

mod group;
mod line;
mod progress;
mod rule;
mod source;
mod storable;

use std::collections::{BTreeMap, BTreeSet};

pub use group::{End, Group, Limits, Outcome, gather, store};
pub use line::{EventBatchLine, LeftOut, ProfileLine};
pub use progress::{Progress, known, pass, recognise};
pub use rule::{InvalidLine, Rule};
pub use source::{LineEnd, Lines, MAX_LINE, Reading, Source, SourceError};

use super::StoreError;
use lethe_db::{Db, DbError, Tx, statements};
use lethe_domain::request::{ControllerId, Mpid};

mod sql {
    use super::statements;

    statements! {
        /// Profiles that are not stored as the lines have them. Those that are must not be touched: a changed row counts
        /// as received anew, for matching and for erasure.
        CHANGED_PROFILES = "
            SELECT q.mpid
              FROM unnest($2::bigint[], $3::text[], $4::text[]) AS q (mpid, attributes, audiences)
              LEFT JOIN subject_data.profiles p ON p.controller_id = $1 AND p.mpid = q.mpid AND p.mpid = ANY ($2)
             WHERE p.mpid IS NULL OR p.attributes <> q.attributes::jsonb OR p.audiences <> q.audiences::jsonb
             UNION
            SELECT mpid
              FROM (SELECT mpid, identity_type, identity_value, true AS is_stored
                      FROM subject_data.profile_identities WHERE controller_id = $1 AND mpid = ANY ($2)) i
              FULL JOIN (SELECT mpid, identity_type, identity_value, true AS is_given
                           FROM unnest($5::bigint[], $6::text[], $7::text[])
                                AS q (mpid, identity_type, identity_value)) g
                USING (mpid, identity_type, identity_value)
             WHERE is_stored IS NULL OR is_given IS NULL";
        /// Locks each profile as well, so that two imports of one do not mix their identities. Only here is a profile
        /// replaced: an erasure under way leaves it.
        UPSERT_PROFILES = "
            INSERT INTO subject_data.profiles AS p (controller_id, mpid, attributes, audiences)
            SELECT $1, mpid, attributes::jsonb, audiences::jsonb
              FROM unnest($2::bigint[], $3::text[], $4::text[]) AS q (mpid, attributes, audiences) ORDER BY mpid
            ON CONFLICT (controller_id, mpid) DO UPDATE
               SET attributes = excluded.attributes, audiences = excluded.audiences,
                   updated_at = clock_timestamp(), replaced_at = clock_timestamp()";
        /// What the profiles no longer have.
        DELETE_GONE_IDENTITIES = "
            DELETE FROM subject_data.profile_identities i
             WHERE i.controller_id = $1 AND i.mpid = ANY ($2)
               AND NOT EXISTS (SELECT FROM unnest($3::bigint[], $4::text[], $5::text[])
                                           AS q (mpid, identity_type, identity_value)
                                WHERE q.mpid = i.mpid AND q.identity_type = i.identity_type
                                  AND q.identity_value = i.identity_value)";
        INSERT_IDENTITIES = "
            INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
            SELECT $1, identity_type, identity_value, mpid
              FROM unnest($2::bigint[], $3::text[], $4::text[]) AS q (mpid, identity_type, identity_value)
             ORDER BY mpid, identity_type
            ON CONFLICT DO NOTHING";
        INSERT_EVENT_BATCHES = "
            INSERT INTO subject_data.event_batches (controller_id, mpid, body)
            SELECT $1, mpid, body::json FROM unnest($2::bigint[], $3::text[]) AS q (mpid, body)";
        /// No identity leads to them: only a request that names the mpid does.
        COUNT_WITHOUT_PROFILE = "
            SELECT count(*) FROM unnest($2::bigint[]) AS q (mpid)
             WHERE NOT EXISTS (SELECT FROM subject_data.profiles p
                                WHERE p.controller_id = $1 AND p.mpid = q.mpid AND p.mpid = ANY ($2))";
        CONTROLLER_EXISTS = "SELECT 1 FROM lethe.controllers WHERE controller_id = $1";
    }
}

/// Every statement of the import, by name.
pub(crate) const STATEMENTS: [&[(&str, &str)]; 2] = [sql::STATEMENTS, progress::STATEMENTS];
use sql::{
    CHANGED_PROFILES, CONTROLLER_EXISTS, COUNT_WITHOUT_PROFILE, DELETE_GONE_IDENTITIES, INSERT_EVENT_BATCHES,
    INSERT_IDENTITIES, UPSERT_PROFILES,
};

/// Lines could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Two runs of one import are under way.
    #[error("another run of this import has stored more lines meanwhile; start again with --resume once it has ended")]
    Overtaken,
}

impl From<DbError> for ImportError {
    fn from(error: DbError) -> Self {
        Self::Store(error.into())
    }
}

impl ImportError {
    /// The SQLSTATE, where the server gave one.
    #[must_use]
    pub(crate) fn sqlstate(&self) -> Option<String> {
        match self {
            Self::Store(StoreError::Db(error)) => error.code().map(|code| code.code().to_owned()),
            Self::Store(_) | Self::Overtaken => None,
        }
    }

    /// Two transactions were in each other's way.
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Store(StoreError::Db(error)) if error.is_conflict())
    }
}

/// Whether there is such a controller, and hence partitions for its data.
///
/// # Errors
/// [`StoreError`].
pub async fn controller_exists(db: &Db, controller_id: &ControllerId) -> Result<bool, StoreError> {
    Ok(db.session().await?.query_opt(CONTROLLER_EXISTS, &[controller_id]).await?.is_some())
}

/// Columns of profiles, and of their identities.
#[derive(Default)]
struct Columns<'a> {
    mpids: Vec<Mpid>,
    attributes: Vec<&'a str>,
    audiences: Vec<&'a str>,
    owners: Vec<Mpid>,
    types: Vec<&'a str>,
    values: Vec<&'a str>,
}

impl<'a> FromIterator<&'a ProfileLine> for Columns<'a> {
    fn from_iter<I: IntoIterator<Item = &'a ProfileLine>>(lines: I) -> Self {
        let mut columns = Self::default();
        for line in lines {
            columns.mpids.push(line.mpid);
            columns.attributes.push(&line.attributes);
            columns.audiences.push(&line.audiences);
            for (kind, value) in &line.identities {
                columns.owners.push(line.mpid);
                columns.types.push(kind.as_str());
                columns.values.push(value);
            }
        }
        columns
    }
}

/// Stores profiles as the lines have them, in one transaction. What is stored so already is not touched.
///
/// # Errors
/// [`StoreError`].
pub async fn profiles(db: &Db, controller_id: &ControllerId, lines: &[ProfileLine]) -> Result<(), StoreError> {
    // Within one statement a key can be updated once only: the last line of a profile counts.
    let latest: BTreeMap<Mpid, &ProfileLine> = lines.iter().map(|line| (line.mpid, line)).collect();
    lethe_db::retrying(|| async {
        let tx = db.begin("import_profiles").await?;
        let changed = changed_profiles(&tx, controller_id, &latest).await?;
        let all: Columns<'_> = changed.iter().filter_map(|mpid| latest.get(mpid).copied()).collect();
        if !all.mpids.is_empty() {
            tx.execute(UPSERT_PROFILES, &[controller_id, &all.mpids, &all.attributes, &all.audiences]).await?;
            let identities: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
                [controller_id, &all.mpids, &all.owners, &all.types, &all.values];
            tx.execute(DELETE_GONE_IDENTITIES, &identities).await?;
            tx.execute(INSERT_IDENTITIES, &[controller_id, &all.owners, &all.types, &all.values]).await?;
        }
        tx.commit().await
    })
    .await
    .map_err(StoreError::from)
}

async fn changed_profiles(
    tx: &Tx,
    controller_id: &ControllerId,
    latest: &BTreeMap<Mpid, &ProfileLine>,
) -> Result<BTreeSet<Mpid>, DbError> {
    let all: Columns<'_> = latest.values().copied().collect();
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
        [controller_id, &all.mpids, &all.attributes, &all.audiences, &all.owners, &all.types, &all.values];
    Ok(tx.values(CHANGED_PROFILES, &params).await?.into_iter().collect())
}

/// Adds event batches, in one transaction.
///
/// # Errors
/// [`StoreError`].
pub async fn event_batches(db: &Db, controller_id: &ControllerId, lines: &[EventBatchLine]) -> Result<(), StoreError> {
    lethe_db::retrying(|| async {
        let tx = db.begin("import_event_batches").await?;
        insert_event_batches(&tx, controller_id, lines).await?;
        tx.commit().await
    })
    .await
    .map_err(StoreError::from)
}

async fn insert_event_batches(
    tx: &Tx,
    controller_id: &ControllerId,
    lines: &[EventBatchLine],
) -> Result<Vec<Mpid>, DbError> {
    let mpids: Vec<Mpid> = lines.iter().map(EventBatchLine::mpid).collect();
    let bodies: Vec<&str> = lines.iter().map(|line| line.body.as_str()).collect();
    tx.execute(INSERT_EVENT_BATCHES, &[controller_id, &mpids, &bodies]).await?;
    Ok(mpids)
}

/// Adds event batches of a file, and how far the file is stored with them. Returns how many have no profile.
///
/// # Errors
/// [`ImportError`].
pub async fn event_batches_of_file(
    db: &Db,
    controller_id: &ControllerId,
    lines: &[EventBatchLine],
    end: &LineEnd,
    progress: &mut Progress,
) -> Result<u64, ImportError> {
    let mut left = 5;
    let without_profile = loop {
        match store_with_progress(db, controller_id, lines, end, progress).await {
            Err(error) if error.is_conflict() && left > 0 => left -= 1,
            result => break result?,
        }
    };
    progress.stored(end);
    Ok(without_profile)
}

async fn store_with_progress(
    db: &Db,
    controller_id: &ControllerId,
    lines: &[EventBatchLine],
    end: &LineEnd,
    progress: &Progress,
) -> Result<u64, ImportError> {
    let tx = db.begin("import_event_batches").await?;
    progress.record(&tx, controller_id, end).await?;
    let mpids = insert_event_batches(&tx, controller_id, lines).await?;
    let without: i64 = tx.value(COUNT_WITHOUT_PROFILE, &[controller_id, &mpids]).await?;
    tx.commit().await?;
    Ok(u64::try_from(without).unwrap_or(0))
}
