//! Migrations: `lethe migrate` runs them under an advisory lock, while workers keep running; they only check the version.
//!
//! A migration is a transaction and must not hold a lock for long: it waits at most two seconds for one, so that the
//! workers' statements do not queue up behind it, and is then tried again. What takes long (an index on a table that is
//! written to, the rewriting of rows) is a [`Step`] after the migrations.
//!
//! **Invariant** (DESIGN rule 14): one process migrates at a time, and workers only check the version.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use super::pool::Session;
use super::{Db, DbError};

mod embedded {
    refinery::embed_migrations!("schema/migrations");
}

/// The schema version that workers must have been built for, at least, to work with the schema of this release. Raise it
/// when a migration removes or changes what workers of earlier releases use, or lets a column hold a name (a status, a
/// stage, an algorithm) that they do not know.
pub const OLDEST_WORKERS: i32 = 29;

/// What the migrations of this release leave to be done, in this order.
const STEPS: &[Step] = &[
    // By which the certificate of an erasure finds its completion.
    Step::Index {
        schema: "lethe",
        name: "audit_entries_of_slice",
        definition: "ON lethe.audit_entries (slice_id) WHERE event = 'requests.completed'",
    },
    // The partitions from before V0026.
    Step::Rows {
        statement: "
            SELECT lethe.vacuum_soon(i.inhrelid::regclass)
              FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
             WHERE i.inhparent IN ('subject_data.profiles'::regclass, 'subject_data.profile_identities'::regclass,
                                   'subject_data.event_batches'::regclass)
               AND NOT coalesce(c.reloptions @> ARRAY['autovacuum_vacuum_scale_factor=0.001'], false)
             LIMIT 50",
    },
];

/// Held while migrating, so that several deployments at once do it one after the other. Asked for again and again: whoever
/// waited for it within a statement would hold a snapshot, which an index that is built concurrently waits for.
const LOCK: &str = "SELECT pg_try_advisory_lock(5499812870)";
const UNLOCK: &str = "SELECT pg_advisory_unlock(5499812870)";
/// How often a migration is tried whose locks are held by others, and the pause after each time.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_secs(1);
/// The pause while another one migrates.
const LOCKED: Duration = Duration::from_millis(200);

/// Work that runs beside the workers, outside of any transaction of ours. It is asked for on every `lethe migrate`, and
/// each must be harmless when it is done already.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// An index, built without a lock on writers. One that an interrupted attempt has left invalid is built anew.
    Index {
        /// The schema it is in, with its table.
        schema: &'static str,
        /// Its name.
        name: &'static str,
        /// What follows the name in `CREATE INDEX`: `ON lethe.requests (batch_id)`.
        definition: &'static str,
    },
    /// A statement that changes the next rows of many, in transactions of their own, until it finds none.
    Rows {
        /// Changes at most some thousand rows.
        statement: &'static str,
    },
}

/// The version that this code was built for.
#[must_use]
pub fn needed_version() -> i32 {
    embedded::migrations::runner().get_migrations().iter().map(refinery::Migration::version).max().unwrap_or(0)
}

/// Brings the schema to the version that this code needs; returns the names of the migrations that were run.
///
/// # Errors
/// [`DbError::SchemaOfLaterRelease`]: nothing was touched. [`DbError::Migration`], [`DbError::SchemaInUse`] where others
/// keep hold of what a migration has to change, and [`DbError`] where the server is away: what was done stays done, and the
/// next call goes on from there.
pub async fn migrate(db: &Db) -> Result<Vec<String>, DbError> {
    let mut session = db.session().await?;
    session.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0").await?;
    // Otherwise a user called `lethe` has the schema of that name in front, and the second run looks for the history there.
    session.batch_execute("SET search_path = public").await?;
    while !session.value(LOCK, &[]).await? {
        tokio::time::sleep(LOCKED).await;
    }
    let outcome = migrate_locked(&mut session, STEPS).await;
    session.batch_execute(UNLOCK).await?;
    session.batch_execute("RESET statement_timeout; RESET lock_timeout; RESET search_path").await?;
    outcome
}

async fn migrate_locked(session: &mut Session, steps: &[Step]) -> Result<Vec<String>, DbError> {
    let mut applied = Vec::new();
    session.batch_execute("SET lock_timeout = '2s'").await?;
    for left in (0..TRIES).rev() {
        match run_migrations(session, &mut applied).await {
            Ok(()) => break,
            Err(error) if is_in_the_way_of_others(&error) && left > 0 => tokio::time::sleep(PAUSE).await,
            Err(error) if is_in_the_way_of_others(&error) => return Err(DbError::SchemaInUse),
            Err(error) => return Err(error),
        }
    }
    session.batch_execute("SET lock_timeout = 0").await?;
    run_steps(session, steps).await?;
    Ok(applied)
}

/// Adds the names of those that were run to `applied`, also where a later one failed.
async fn run_migrations(session: &mut Session, applied: &mut Vec<String>) -> Result<(), DbError> {
    let (found, needed) = (found_version(session).await?, needed_version());
    if found > needed {
        return Err(DbError::SchemaOfLaterRelease { found, needed });
    }
    // Before the migrations, so that workers that cannot go on with what they bring do not start meanwhile; and after them,
    // since the table may be new.
    tell_workers(session).await?;
    let outcome = embedded::migrations::runner().run_async(session.client()).await;
    let report = outcome.as_ref().ok().or_else(|| outcome.as_ref().err()?.report());
    applied.extend(report.into_iter().flat_map(|report| report.applied_migrations().iter().map(ToString::to_string)));
    outcome?;
    tell_workers(session).await
}

/// Writes down which workers can work with the schema. It only ever rises: what a release has removed does not come back.
async fn tell_workers(session: &Session) -> Result<(), DbError> {
    if !session.value("SELECT to_regclass('lethe.schema_support') IS NOT NULL", &[]).await? {
        return Ok(());
    }
    let support = "INSERT INTO lethe.schema_support (oldest_workers) VALUES ($1)
                   ON CONFLICT (only_row) DO UPDATE SET oldest_workers = excluded.oldest_workers
                    WHERE schema_support.oldest_workers < excluded.oldest_workers";
    session.execute(support, &[&OLDEST_WORKERS]).await.map(drop)
}

/// The version of the schema; 0 for none.
async fn found_version(session: &Session) -> Result<i32, DbError> {
    if session.value("SELECT to_regclass('public.refinery_schema_history') IS NOT NULL", &[]).await? {
        session.value("SELECT coalesce(max(version), 0)::int FROM public.refinery_schema_history", &[]).await
    } else {
        Ok(0)
    }
}

/// Runs steps in their order, each to its end.
///
/// # Errors
/// [`DbError`]; the step can be run again.
pub async fn run_steps(session: &Session, steps: &[Step]) -> Result<(), DbError> {
    for step in steps {
        match step {
            Step::Index { schema, name, definition } => {
                let state = "SELECT i.indisvalid FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
                              WHERE c.relnamespace = $1::text::regnamespace AND c.relname = $2";
                let is_valid: Option<bool> =
                    session.query_opt(state, &[schema, name]).await?.map(|row| row.get("indisvalid"));
                if is_valid == Some(false) {
                    session.batch_execute(&format!("DROP INDEX CONCURRENTLY {schema}.{name}")).await?;
                }
                if is_valid != Some(true) {
                    session.batch_execute(&format!("CREATE INDEX CONCURRENTLY {name} {definition}")).await?;
                }
            }
            Step::Rows { statement } => while session.execute(statement, &[]).await? > 0 {},
        }
    }
    Ok(())
}

fn is_in_the_way_of_others(error: &DbError) -> bool {
    error.code().is_some_and(|code| [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED].contains(code))
}

/// Checks that this code can work with the schema: it is the one that the code was built for, or a later one that still
/// holds all that the code uses.
///
/// # Errors
/// [`DbError::SchemaVersion`], [`DbError::SchemaTooNew`].
pub async fn check_version(db: &Db) -> Result<(), DbError> {
    let session = db.session().await?;
    let (found, needed) = (found_version(&session).await?, needed_version());
    if found < needed {
        return Err(DbError::SchemaVersion { found, needed });
    }
    if found == needed {
        return Ok(());
    }
    let support = session.query_opt("SELECT oldest_workers FROM lethe.schema_support", &[]).await?;
    // Without a row the release that migrates has not said yet what it needs.
    let oldest = support.map_or(found, |row| row.get("oldest_workers"));
    if oldest > needed { Err(DbError::SchemaTooNew { found, needed, oldest }) } else { Ok(()) }
}
