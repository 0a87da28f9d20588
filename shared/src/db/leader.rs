//! Leadership of the scheduler: a lease with an epoch that only grows (DESIGN rule 4).

use std::time::Duration;

use uuid::Uuid;

use super::pool::Session;
use super::{Db, DbError, Tx, statements};

statements! {
    /// Renews the lease of its holder, or takes an expired one over under the next epoch.
    ACQUIRE = "
        UPDATE lethe.leaders
           SET epoch = CASE WHEN holder = $1 AND expires_at > lethe.now() THEN epoch ELSE epoch + 1 END,
               holder = $1, expires_at = lethe.now() + make_interval(secs => $2)
         WHERE name = 'scheduler' AND (holder = $1 OR expires_at <= lethe.now())
        RETURNING epoch";
    RESIGN = "
        UPDATE lethe.leaders SET expires_at = '-infinity', holder = NULL
         WHERE name = 'scheduler' AND holder = $1";
    ASSERT = "SELECT lethe.assert_leader('scheduler', $1)";
}

/// Becomes or stays the leader for `lease`; the epoch, or `None` where another one leads.
///
/// # Errors
/// [`DbError`].
pub async fn acquire(db: &Db, holder: Uuid, lease: Duration) -> Result<Option<i64>, DbError> {
    let session = db.session().await?;
    let row = session.query_opt(ACQUIRE, &[&holder, &lease.as_secs_f64()]).await?;
    Ok(row.map(|row| row.get(0)))
}

/// Gives the leadership up, so that another one can lead at once.
///
/// # Errors
/// [`DbError`].
pub async fn resign(session: &Session, holder: Uuid) -> Result<(), DbError> {
    session.execute(RESIGN, &[&holder]).await?;
    Ok(())
}

/// Fails unless `epoch` is the current one, and keeps it current until the transaction ends.
///
/// # Errors
/// [`DbError::LeadershipLost`].
pub async fn assert(tx: &Tx, epoch: i64) -> Result<(), DbError> {
    match tx.query(ASSERT, &[&epoch]).await {
        Err(error) if error.code().is_some_and(|code| code.code() == "LT001") => Err(DbError::LeadershipLost),
        other => other.map(drop),
    }
}
