//! What a request's row shows of its result.

use lethe_domain::result_link::StoredResult;
use tokio_postgres::Row;

/// The columns `result_id`, `token_salt` and `lines`, if there is a result.
pub(super) fn read(row: &Row) -> Option<StoredResult> {
    let result_id = row.get::<_, Option<uuid::Uuid>>("result_id")?;
    Some(StoredResult { result_id, token_salt: row.get("token_salt"), lines: row.get("lines") })
}
