//! What is one and the same for all processes of an installation.

use super::pool::Session;
use super::sealed::sealing_context;
use super::{Db, DbError, statements};
use lethe_domain::crypto::Keys;

statements! {
    RECORD = "INSERT INTO lethe.installation (master_key_fingerprint) VALUES ($1) ON CONFLICT DO NOTHING";
    FIND = "SELECT master_key_fingerprint FROM lethe.installation";
    /// Something that was sealed before there was a record of the key.
    ANY_SEALED = "
        SELECT r.controller_id, r.subject_request_id, d.sealed_request
          FROM lethe.request_details d JOIN lethe.requests r ON r.request_key = d.request_key LIMIT 1";
}

/// Checks that the database is used with this master key. The first who asks decides, unless something was sealed already.
///
/// # Errors
/// [`DbError::OtherMasterKey`] where it is another one; [`DbError::NoMasterKey`] where none is known and this process,
/// which sees no requests of its own accord, may not decide.
pub async fn check_master_key(db: &Db, keys: &Keys) -> Result<(), DbError> {
    let session = db.session().await?;
    if let Some(known) = compare(&session, keys).await? {
        return known;
    }
    if !session.value::<bool>("SELECT has_table_privilege('lethe.installation', 'INSERT')", &[]).await? {
        return Err(DbError::NoMasterKey);
    }
    if let Some(row) = session.query_opt(ANY_SEALED, &[]).await? {
        let controller_id = row.get("controller_id");
        let opened = keys
            .requests()
            .open(&sealing_context(&controller_id, row.get("subject_request_id")), row.get("sealed_request"));
        opened.map_err(|_| DbError::OtherMasterKey)?;
    }
    session.execute(RECORD, &[&keys.fingerprint()]).await?;
    compare(&session, keys).await?.unwrap_or(Err(DbError::NoMasterKey))
}

/// Compares, and decides nothing.
///
/// # Errors
/// [`DbError::OtherMasterKey`], and [`DbError::NoMasterKey`] where none is known yet.
pub async fn compare_master_key(db: &Db, keys: &Keys) -> Result<(), DbError> {
    compare(&db.session().await?, keys).await?.unwrap_or(Err(DbError::NoMasterKey))
}

async fn compare(session: &Session, keys: &Keys) -> Result<Option<Result<(), DbError>>, DbError> {
    let found = session.query_opt(FIND, &[]).await?;
    let is_ours = found.map(|row| row.get::<_, &[u8]>("master_key_fingerprint") == keys.fingerprint());
    Ok(is_ours.map(|is_ours| if is_ours { Ok(()) } else { Err(DbError::OtherMasterKey) }))
}
