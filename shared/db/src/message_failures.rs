//! Failures of messages, counted: by a keyed digest, since a message holds personal data.

use std::collections::HashMap;

use super::leader::{self, Term};
use super::pool::Session;
use super::{Db, DbError, statements};

statements! {
    KNOWN = "
        SELECT message_digest, last_cause IS NOT NULL AS has_cause FROM lethe.message_failures WHERE message_digest = ANY ($1)";
    COUNT = "
        INSERT INTO lethe.message_failures AS f (message_digest, queue, last_cause)
        SELECT DISTINCT digest, $2, $3 FROM unnest($1::bytea[]) AS digest ORDER BY digest
        ON CONFLICT (message_digest) DO UPDATE
        SET attempts = f.attempts + 1, last_cause = coalesce(excluded.last_cause, f.last_cause),
            last_failed_at = lethe.now()
        RETURNING message_digest, attempts";
    FORGET = "DELETE FROM lethe.message_failures WHERE message_digest = ANY ($1)";
    FORGET_UNSAID = "DELETE FROM lethe.message_failures WHERE message_digest = ANY ($1) AND last_cause IS NULL";
    FORGET_OLD = "
        DELETE FROM lethe.message_failures
         WHERE ctid = ANY (ARRAY (SELECT ctid FROM lethe.message_failures
                                   WHERE last_failed_at <= (SELECT lethe.now()) - make_interval(secs => $1)
                                   ORDER BY last_failed_at LIMIT $2))";
}

/// Attempts by digest.
pub type Attempts = HashMap<Vec<u8>, i32>;

/// Those of these messages that are counted, and whether one failed for a cause that was said: the others were begun and
/// never came to an end, so far.
///
/// # Errors
/// [`DbError`].
pub async fn known(session: &Session, digests: &[Vec<u8>]) -> Result<HashMap<Vec<u8>, bool>, DbError> {
    Ok(session
        .query(KNOWN, &[&digests])
        .await?
        .iter()
        .map(|row| (row.get("message_digest"), row.get("has_cause")))
        .collect())
}

/// Counts one more attempt on each of these; `cause` is a class, where it failed by one.
///
/// # Errors
/// [`DbError`].
pub async fn count(
    session: &Session,
    queue: &str,
    digests: &[Vec<u8>],
    cause: Option<&str>,
) -> Result<Attempts, DbError> {
    let rows = session.query(COUNT, &[&digests, &queue, &cause]).await?;
    Ok(rows.iter().map(|row| (row.get("message_digest"), row.get("attempts"))).collect())
}

/// Forgets messages that were handled or dead-lettered.
///
/// # Errors
/// [`DbError`].
pub async fn forget(session: &Session, digests: &[Vec<u8>]) -> Result<(), DbError> {
    session.execute(FORGET, &[&digests]).await?;
    Ok(())
}

/// Forgets those of these that were only begun: they came to an end, if to none of their own.
///
/// # Errors
/// [`DbError`].
pub async fn forget_begun(session: &Session, digests: &[Vec<u8>]) -> Result<(), DbError> {
    session.execute(FORGET_UNSAID, &[&digests]).await?;
    Ok(())
}

/// Forgets messages that were last seen so long ago that they cannot be queued any more, at most `limit`; returns how many.
///
/// # Errors
/// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
pub async fn forget_old(db: &Db, term: &Term, age: std::time::Duration, limit: i64) -> Result<u64, DbError> {
    let tx = db.begin("forget_message_failures").await?;
    leader::assert_term(&tx, term).await?;
    let forgotten = tx.execute(FORGET_OLD, &[&age.as_secs_f64(), &limit]).await?;
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(forgotten)
}
