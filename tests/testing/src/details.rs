//! What is personal in requests, as tests ask for it.

use crate::world::World;

/// The profiles of requests, one in a row, each with its source: a table to select from.
pub const MPIDS: &str = "
    (SELECT r.request_key, r.subject_request_id, r.controller_id, m.mpid, m.source
       FROM lethe.requests r
       JOIN lethe.request_details d ON d.week = r.details_week AND d.request_key = r.request_key
      CROSS JOIN LATERAL (SELECT unnest(d.named) AS mpid, 'named' AS source
                          UNION ALL SELECT unnest(d.at_receipt), 'receipt'
                          UNION ALL SELECT unnest(d.at_release), 'release') m)";

/// Whether the details of a request are there.
pub async fn has_details(world: &World, id: &str) -> bool {
    let sql = "SELECT EXISTS (SELECT FROM lethe.requests r
                                JOIN lethe.request_details d ON d.week = r.details_week AND d.request_key = r.request_key
                               WHERE r.subject_request_id::text = $1)";
    world.one(sql, &[&id]).await
}
