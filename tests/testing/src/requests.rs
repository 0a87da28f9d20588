//! Bodies of requests, and the published examples.

use serde_json::{Value, json};

/// A version 3 request under construction.
#[must_use]
#[derive(Clone, Debug)]
pub struct Request {
    /// A fresh `subject_request_id`.
    pub id: String,
    body: Value,
}

impl Request {
    /// `kind` is `erasure`, `access` or `portability`.
    pub fn new(kind: &str) -> Self {
        let id = uuid::Uuid::new_v4().to_string();
        let body = json!({
            "regulation": "gdpr",
            "subject_request_id": id,
            "subject_request_type": kind,
            "submitted_time": "2026-11-20T10:00:00Z",
            "subject_identities": {},
            "api_version": "3.0",
            "status_callback_urls": [],
        });
        Self { id, body }
    }

    /// An erasure of whoever has this e-mail address.
    pub fn erasure(email: &str) -> Self {
        Self::new("erasure").identity("email", email)
    }

    /// A copy of what is held of whoever has this e-mail address.
    pub fn access(email: &str) -> Self {
        Self::new("access").identity("email", email)
    }

    /// With a raw identity.
    pub fn identity(self, kind: &str, value: &str) -> Self {
        self.encoded(kind, value, "raw")
    }

    /// With an identity in a format.
    pub fn encoded(mut self, kind: &str, value: &str, encoding: &str) -> Self {
        self.body["subject_identities"][kind] = json!({"value": value, "encoding": encoding});
        self
    }

    /// With a profile named by its id, which excludes identities.
    pub fn mpid(mut self, mpid: i64) -> Self {
        let value = json!({"value": mpid.to_string(), "encoding": "raw"});
        self.body["extensions"]["opendsr.mparticle.com"]["subject_identities"]["mpid"] = value;
        self
    }

    /// Without the waiting period.
    pub fn expedited(mut self) -> Self {
        self.body["extensions"]["opendsr.mparticle.com"]["skip_waiting_period"] = json!(true);
        self
    }

    /// With one more URL for callbacks.
    pub fn callback(mut self, url: &str) -> Self {
        self.body["status_callback_urls"].as_array_mut().unwrap().push(json!(url));
        self
    }

    /// In a group.
    pub fn group(mut self, group: &str) -> Self {
        self.body["group_id"] = json!(group);
        self
    }

    /// With any field set.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.body[field] = value;
        self
    }

    /// As sent.
    pub fn bytes(&self) -> Vec<u8> {
        self.body.to_string().into_bytes()
    }
}

impl From<&Request> for Vec<u8> {
    fn from(request: &Request) -> Self {
        request.bytes()
    }
}

/// A file below `fixtures`.
pub fn fixture(path: &str) -> Vec<u8> {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path);
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A published example under an id of its own, so that several can be sent to one controller.
pub fn renamed(path: &str) -> (String, Vec<u8>) {
    let mut body: Value = serde_json::from_slice(&fixture(path)).unwrap();
    let id = uuid::Uuid::new_v4().to_string();
    body["subject_request_id"] = json!(id);
    (id, body.to_string().into_bytes())
}
