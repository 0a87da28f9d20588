//! What the trail tells of a completed erasure: the line of a set, by the names of its columns.

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::StoreReceipt;

/// A line of `requests.completed`; what else is in it, reports ask for.
#[derive(Debug, Deserialize)]
pub(super) struct CompletedLine {
    pub(super) subject_request_id: String,
    #[serde(rename = "type")]
    pub(super) subject_request_type: String,
    pub(super) content_digest: String,
    pub(super) received_at: Timestamp,
    pub(super) completed_at: Timestamp,
    pub(super) profiles: i64,
    stores: Vec<Receipt>,
}

#[derive(Debug, Deserialize)]
struct Receipt {
    store: String,
    as_of: Timestamp,
    rows_deleted: i64,
    rows_arrived: Option<i64>,
    verified_at: Timestamp,
}

impl CompletedLine {
    /// `None` where a field is missing, or is something else.
    pub(super) fn read(fields: Map<String, Value>) -> Option<Self> {
        serde_json::from_value(Value::Object(fields)).ok()
    }

    /// What each store did. A request is completed only when every store, asked again, has held nothing more of it.
    pub(super) fn stores(&self) -> Vec<StoreReceipt> {
        let stores = self.stores.iter().map(|receipt| StoreReceipt {
            store: receipt.store.clone(),
            as_of: receipt.as_of,
            rows_deleted: receipt.rows_deleted,
            verified_at: receipt.verified_at,
            rows_remaining: 0,
            rows_arrived_later: receipt.rows_arrived.unwrap_or(0),
        });
        stores.collect()
    }
}
