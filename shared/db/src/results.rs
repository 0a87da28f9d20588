//! Result files: their records, and their expiry.

use jiff::Timestamp;
use jiff::civil::Date;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::leader::{self, Term};
use super::pool::{Column, Session};
use super::slices::{self, Claimed, Finished};
use super::{Db, DbError, statements};
use lethe_domain::request::{ControllerId, RequestKey, RequestType, SubjectRequestId};

statements! {
    INSERT = "
        INSERT INTO lethe.results (result_id, request_key, token_salt, token_sha256, object_path, media_type, size_bytes,
                                   lines, wrapped_key, expiry_day, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";
    /// The wrapped key goes in the transaction that says so; bytes and the day's key follow.
    EXPIRE = "
        UPDATE lethe.results SET expired_at = lethe.now(), wrapped_key = NULL
         WHERE result_id = ANY (ARRAY (
            SELECT result_id FROM lethe.results WHERE expired_at IS NULL AND expires_at <= (SELECT lethe.now())
             ORDER BY expires_at LIMIT $1))
        RETURNING result_id";
    /// Expired results whose bytes are still to be deleted, and were not tried in vain just now.
    EXPIRED_OBJECTS = "
        SELECT result_id, object_path FROM lethe.results
         WHERE expired_at IS NOT NULL AND object_path IS NOT NULL AND delete_after <= (SELECT lethe.now())
         ORDER BY delete_after LIMIT $1";
    FORGET_OBJECTS = "
        UPDATE lethe.results SET object_path = NULL WHERE result_id = ANY ($1) AND expired_at IS NOT NULL";
    /// From half a minute to six hours.
    TRY_AGAIN = "
        UPDATE lethe.results
           SET delete_tries = delete_tries + 1,
               delete_after = lethe.now() + least(interval '30 s' * power(2, least(delete_tries, 10)), interval '6 h')
         WHERE result_id = ANY ($1)";
    FIND_RESULT = "
        SELECT result_id, controller_id, subject_request_id, request_type, object_path, media_type, size_bytes,
               wrapped_key, expiry_day, expired
          FROM lethe.find_result($1)";
    RECORD_DOWNLOAD = "SELECT lethe.record_download($1, $2, $3, $4)";
    /// With the clock that it was read from.
    TODAY = "SELECT (lethe.now() AT TIME ZONE 'UTC')::date AS today, lethe.wall_clock()";
}

/// An object that could not be deleted is tried again after this at most.
pub const LONGEST_WAIT: std::time::Duration = std::time::Duration::from_hours(6);

/// The record of a result file.
#[derive(Clone, Debug)]
pub struct NewResult {
    /// Fresh for each file.
    pub result_id: Uuid,
    /// Whose result it is.
    pub request_key: RequestKey,
    /// What the token is made with, beside the id.
    pub token_salt: Vec<u8>,
    /// All that the database knows of the token.
    pub token_sha256: Vec<u8>,
    /// Where the bytes lie; `None` where nothing matched.
    pub object_path: Option<String>,
    /// `text/plain; charset=utf-8` or `application/zip`.
    pub media_type: &'static str,
    /// Bytes of the file as it is downloaded.
    pub size_bytes: i64,
    /// `results_count`.
    pub lines: i64,
    /// The key of the file, wrapped by the key of its day of expiry.
    pub wrapped_key: Option<Vec<u8>>,
    /// The day of expiry, UTC.
    pub expiry_day: Date,
    /// When the link ends.
    pub expires_at: Timestamp,
}

/// Records a result and completes its request, in one transaction under the lease.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn complete(db: &Db, claimed: &Claimed, result: &NewResult) -> Result<Finished, DbError> {
    super::retrying(|| async {
        let tx = db.begin("complete_compilation").await?;
        slices::hold(&tx, claimed).await?;
        tx.execute(
            INSERT,
            &[
                &result.result_id,
                &result.request_key,
                &result.token_salt,
                &result.token_sha256,
                &result.object_path,
                &result.media_type,
                &result.size_bytes,
                &result.lines,
                &result.wrapped_key,
                &result.expiry_day,
                &result.expires_at,
            ],
        )
        .await?;
        let finished = slices::finish_compilation(&tx, claimed, result.request_key).await?;
        lethe_process::fault::point("finish.before_commit");
        tx.commit().await?;
        Ok(finished)
    })
    .await
}

/// Ends the links whose lifetime is over, at most `limit`; returns how many.
///
/// # Errors
/// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
pub async fn expire(db: &Db, term: &Term, limit: i64) -> Result<usize, DbError> {
    let tx = db.begin("expire_results").await?;
    leader::assert_term(&tx, term).await?;
    let expired = tx.query(EXPIRE, &[&limit]).await?.len();
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(expired)
}

/// Expired results whose bytes are still there, and whose turn it is.
///
/// # Errors
/// [`DbError`].
pub async fn expired_objects(session: &Session, limit: i64) -> Result<Vec<(Uuid, String)>, DbError> {
    Ok(session
        .query(EXPIRED_OBJECTS, &[&limit])
        .await?
        .iter()
        .map(|row| (row.get("result_id"), row.get("object_path")))
        .collect())
}

/// Records of which expired results the bytes are gone, and which are to be tried again later.
///
/// # Errors
/// [`DbError`].
pub async fn record_deletions(session: &Session, gone: &[Uuid], failed: &[Uuid]) -> Result<(), DbError> {
    session.execute(FORGET_OBJECTS, &[&gone]).await?;
    session.execute(TRY_AGAIN, &[&failed]).await?;
    Ok(())
}

/// The day, UTC, by the database's clock, where that is believed: the keys of the days before it are to be destroyed.
///
/// # Errors
/// [`DbError::ClockAhead`].
pub async fn today(session: &Session, term: &Term) -> Result<Date, DbError> {
    let row = session.query_one(TODAY, &[]).await?;
    term.check(row.get("wall_clock"))?;
    Ok(row.get("today"))
}

/// A result as a download finds it by the digest of its token.
#[derive(Clone, Debug)]
pub struct Downloadable {
    /// What the wrapped key is bound to.
    pub result_id: Uuid,
    /// Whose result it is.
    pub controller_id: ControllerId,
    /// The request that it answers.
    pub subject_request_id: SubjectRequestId,
    /// Access or portability.
    pub request_type: RequestType,
    /// Where the bytes lie; `None` where nothing matched, and after the expiry.
    pub object_path: Option<String>,
    /// `text/plain; charset=utf-8` or `application/zip`.
    pub media_type: String,
    /// Bytes of the file as it is downloaded.
    pub size_bytes: u64,
    /// The key of the file, wrapped by the key of its day of expiry; `None` after the expiry.
    pub wrapped_key: Option<Vec<u8>>,
    /// The day of expiry, UTC.
    pub expiry_day: Date,
    /// The lifetime of the link is over.
    pub expired: bool,
}

/// The result that a token opens.
///
/// # Errors
/// [`DbError`].
pub async fn find(session: &Session, token_sha256: &[u8]) -> Result<Option<Downloadable>, DbError> {
    let Some(row) = session.query_opt(FIND_RESULT, &[&token_sha256]).await? else { return Ok(None) };
    let unexpected = || DbError::Unexpected { place: "results" };
    Ok(Some(Downloadable {
        result_id: row.get("result_id"),
        controller_id: row.get("controller_id"),
        subject_request_id: row.get("subject_request_id"),
        request_type: row.column("request_type")?,
        object_path: row.get("object_path"),
        media_type: row.get("media_type"),
        size_bytes: u64::try_from(row.get::<_, i64>("size_bytes")).map_err(|_| unexpected())?,
        wrapped_key: row.get("wrapped_key"),
        expiry_day: row.get("expiry_day"),
        expired: row.get("expired"),
    }))
}

/// Downloads of one result, or of ranges of it, that the audit trail takes at most.
pub(crate) const MOST_DOWNLOADS: i32 = 10_000;

/// Enters a download in the audit trail: the bytes that are about to be sent, both ends included. `false` where the result
/// was downloaded ten thousand times already; then nothing is recorded, and nothing must be sent.
///
/// # Errors
/// [`DbError`].
pub async fn record_download(session: &Session, token_sha256: &[u8], bytes: (u64, u64)) -> Result<bool, DbError> {
    let end = |byte| i64::try_from(byte).unwrap_or(i64::MAX);
    let params: [&(dyn ToSql + Sync); 4] = [&token_sha256, &end(bytes.0), &end(bytes.1), &MOST_DOWNLOADS];
    Ok(session.query_opt(RECORD_DOWNLOAD, &params).await?.is_some())
}
