//! Migrations: `lethe migrate` runs them under an advisory lock, workers only check the version.

use super::{Db, DbError};

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// Held while migrating, so that several deployments at once do it one after the other.
const LOCK: &str = "SELECT pg_advisory_lock(5499812870)";
const UNLOCK: &str = "SELECT pg_advisory_unlock(5499812870)";

/// The version that this code needs.
#[must_use]
pub fn needed_version() -> i32 {
    embedded::migrations::runner().get_migrations().iter().map(refinery::Migration::version).max().unwrap_or(0)
}

/// Brings the schema to the version that this code needs; returns the names of the migrations that were run.
///
/// # Errors
/// [`DbError::Migration`], and [`DbError`] where the server is away.
pub async fn migrate(db: &Db) -> Result<Vec<String>, DbError> {
    let mut session = db.session().await?;
    session.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0").await?;
    // Otherwise a user called `lethe` has the schema of that name in front, and the second run looks for the history there.
    session.batch_execute("SET search_path = public").await?;
    session.batch_execute(LOCK).await?;
    let outcome = embedded::migrations::runner().run_async(session.client()).await;
    session.batch_execute(UNLOCK).await?;
    session.batch_execute("RESET statement_timeout; RESET lock_timeout; RESET search_path").await?;
    Ok(outcome?.applied_migrations().iter().map(ToString::to_string).collect())
}

/// Checks that the schema is the one that this code needs. A newer one is refused as well: columns may be gone.
///
/// # Errors
/// [`DbError::SchemaVersion`].
pub async fn check_version(db: &Db) -> Result<(), DbError> {
    let session = db.session().await?;
    let found = if session.value("SELECT to_regclass('public.refinery_schema_history') IS NOT NULL", &[]).await? {
        session.value("SELECT coalesce(max(version), 0)::int FROM public.refinery_schema_history", &[]).await?
    } else {
        0
    };
    let needed = needed_version();
    if found == needed { Ok(()) } else { Err(DbError::SchemaVersion { found, needed }) }
}
