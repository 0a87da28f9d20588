//! What is one and the same for all processes of an installation.

use super::{Db, DbError, statements};
use crate::crypto::Keys;

statements! {
    RECORD = "INSERT INTO lethe.installation (master_key_fingerprint) VALUES ($1) ON CONFLICT DO NOTHING";
    FIND = "SELECT master_key_fingerprint FROM lethe.installation";
}

/// Checks that the database is used with this master key; the first who asks decides.
///
/// # Errors
/// [`DbError::OtherMasterKey`] where it is another one.
pub async fn check_master_key(db: &Db, keys: &Keys) -> Result<(), DbError> {
    let session = db.session().await?;
    let found = session.query_opt(FIND, &[]).await?;
    let found = match found {
        Some(row) => row,
        None => {
            session.execute(RECORD, &[&keys.fingerprint()]).await?;
            session.query_one(FIND, &[]).await?
        }
    };
    if found.get::<_, &[u8]>(0) == keys.fingerprint() { Ok(()) } else { Err(DbError::OtherMasterKey) }
}
