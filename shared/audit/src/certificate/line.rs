//! What the trail tells of a completed erasure: the line of a set, by the names of its columns.

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Asked, Execution, StoreReceipt};

/// A line of `requests.completed`; what else is in it, reports ask for.
#[derive(Debug, Deserialize)]
pub(super) struct CompletedLine {
    pub(super) subject_request_id: String,
    #[serde(rename = "type")]
    subject_request_type: String,
    regulation: Option<String>,
    api_version: String,
    content_digest: String,
    lane: String,
    batch_id: Option<i64>,
    submitted_time: Timestamp,
    received_at: Timestamp,
    in_progress_at: Option<Timestamp>,
    completed_at: Timestamp,
    profiles: i64,
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

    /// What was asked.
    pub(super) fn asked(&self) -> Asked {
        Asked {
            subject_request_type: self.subject_request_type.clone(),
            regulation: self.regulation.clone(),
            api_version: self.api_version.clone(),
            content_digest: self.content_digest.clone(),
            submitted_time: self.submitted_time,
            received_time: self.received_at,
        }
    }

    /// How it was executed. When the batch was to run is not in the line.
    pub(super) fn execution(&self, scheduled_for: Option<Timestamp>) -> Execution {
        Execution {
            lane: self.lane.clone(),
            batch_id: self.batch_id,
            scheduled_for,
            began_at: self.in_progress_at,
            completed_at: self.completed_at,
            profiles: self.profiles,
        }
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
