//! From a [`SubjectRequest`] back to the wire format of its version: what a controller would send.

use serde_json::{Map, Value, json};

use super::request::{ApiVersion, SubjectRequest};
use crate::opendsr::Identity;

impl SubjectRequest {
    /// The request as a body of its version; what OpenDSR itself has no room for goes under `extension_domain`.
    #[must_use]
    pub fn to_wire(&self, extension_domain: &str) -> Value {
        let (standard, extended): (Vec<&Identity>, Vec<&Identity>) =
            self.identities.iter().partition(|identity| identity.identity_type.is_standard());
        let mut extension = Map::new();
        if self.skip_waiting_period {
            extension.insert("skip_waiting_period".to_owned(), json!(true));
        }
        let identities = if self.api_version == ApiVersion::V3 {
            let mut extended = map(&extended);
            if let Some(mpid) = self.mpids.first() {
                extended.insert("mpid".to_owned(), json!({"value": mpid.to_string(), "encoding": "raw"}));
            }
            if !extended.is_empty() {
                extension.insert("subject_identities".to_owned(), Value::Object(extended));
            }
            Value::Object(map(&standard))
        } else {
            if !self.mpids.is_empty() {
                extension.insert("mpids".to_owned(), json!(self.mpids));
            }
            if !extended.is_empty() {
                extension.insert("identities".to_owned(), list(&extended));
            }
            list(&standard)
        };
        let mut body = json!({
            "subject_request_id": self.subject_request_id,
            "subject_request_type": self.subject_request_type,
            "submitted_time": self.submitted_time,
            "api_version": self.api_version,
            "subject_identities": identities,
            "status_callback_urls": self.status_callback_urls,
            "group_id": self.group_id,
        });
        if let Some(regulation) = self.regulation {
            body["regulation"] = json!(regulation);
        }
        if !extension.is_empty() {
            body["extensions"] = json!({ extension_domain: extension });
        }
        body
    }
}

fn list(identities: &[&Identity]) -> Value {
    let entry = |identity: &&Identity| {
        json!({
            "identity_type": identity.identity_type,
            "identity_value": identity.value,
            "identity_format": identity.format,
        })
    };
    identities.iter().map(entry).collect()
}

fn map(identities: &[&Identity]) -> Map<String, Value> {
    let entry = |identity: &&Identity| {
        let value = json!({"value": identity.value, "encoding": identity.format});
        (identity.identity_type.to_string(), value)
    };
    identities.iter().map(entry).collect()
}
