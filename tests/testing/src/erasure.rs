//! Receipts of erasures.

use crate::world::World;

/// What the built-in store did for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Rows deleted.
    pub deleted: i64,
    /// Rows that came after the start.
    pub arrived: Option<i64>,
    /// The store was asked again and holds nothing.
    pub verified: bool,
    /// The class of its last failure.
    pub failure: Option<String>,
}

/// The receipt of a request.
pub async fn receipt(world: &World, id: &str) -> Option<Receipt> {
    let sql = "SELECT e.rows_deleted, e.rows_arrived, e.verified_at IS NOT NULL, e.failure
                 FROM lethe.erasure_receipts e JOIN lethe.requests r USING (request_key)
                WHERE r.subject_request_id::text = $1";
    let row = world.db.session().await.unwrap().raw().query_opt(sql, &[&id]).await.unwrap()?;
    Some(Receipt { deleted: row.get(0), arrived: row.get(1), verified: row.get(2), failure: row.get(3) })
}

/// Rows deleted over all requests.
pub async fn deleted_in_all(world: &World) -> i64 {
    world.one("SELECT coalesce(sum(rows_deleted), 0)::bigint FROM lethe.erasure_receipts", &[]).await
}
