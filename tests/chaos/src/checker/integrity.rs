//! Guarantee 2: no row refers to one that is not there. The database does not check these itself (ADR 0023).

use super::{Evidence, Violation};

/// Table and column, and the table in which the column is the key.
const REFERENCES: [(&str, &str, &str); 9] = [
    ("requests", "controller_id", "controllers"),
    ("requests", "batch_id", "batches"),
    ("requests", "slice_id", "slices"),
    ("requests", "lane", "lanes"),
    ("request_details", "request_key", "requests"),
    ("results", "request_key", "requests"),
    ("callbacks", "request_key", "requests"),
    ("callbacks", "endpoint_id", "endpoints"),
    ("callback_attempts", "callback_id", "callbacks"),
];

/// What is referred to, and which rows refer to one that is there and belongs to somebody or something else: numbers are
/// given again where the commit that took them was lost.
const STRANGERS: [(&str, &str); 4] = [
    (
        "callbacks name an endpoint that is not their controller's",
        "lethe.callbacks c JOIN lethe.requests r USING (request_key) JOIN lethe.endpoints e USING (endpoint_id)
          WHERE e.controller_id <> r.controller_id",
    ),
    (
        "requests name a batch that is not of their lane",
        "lethe.requests r JOIN lethe.batches b USING (batch_id) WHERE b.lane <> r.lane",
    ),
    (
        "requests have not ended, and their details are gone",
        "lethe.requests r
          WHERE r.status IN ('pending', 'in_progress')
            AND NOT EXISTS (SELECT FROM lethe.request_details d
                             WHERE d.week = r.details_week AND d.request_key = r.request_key
                               AND d.controller_id = r.controller_id)",
    ),
    (
        "receipts are of a request that is not of their slice",
        "lethe.erasure_receipts e
          WHERE NOT EXISTS (SELECT FROM lethe.requests r
                             WHERE r.request_key = e.request_key AND r.slice_id = e.slice_id)",
    ),
];

pub(super) async fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (table, column, parent) in REFERENCES {
        let sql = format!(
            "SELECT count(*) FROM lethe.{table} c
              WHERE c.{column} IS NOT NULL AND NOT EXISTS (SELECT FROM lethe.{parent} p WHERE p.{column} = c.{column})"
        );
        let count = evidence.world.count(&sql).await;
        if count > 0 {
            violations
                .push(Violation::of(2, format!("{count} rows of {table} name a {column} that is not in {parent}")));
        }
    }
    for (what, rows) in STRANGERS {
        let count = evidence.world.count(&format!("SELECT count(*) FROM {rows}")).await;
        if count > 0 {
            violations.push(Violation::of(2, format!("{count} {what}")));
        }
    }
    violations
}
