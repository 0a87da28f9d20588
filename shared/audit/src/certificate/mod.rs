//! Proof of an erasure: a signed document for each completed one (docs/adr/0012-certificates.md).
//!
//! The document is JSON with four members. `payload` is a text, itself JSON: the [`Statement`]. `signature` is over
//! exactly the bytes of that text. `certificate_chain` is bound to it by its SHA-256 in the statement, and the whole
//! must be written exactly as [`Document::write`] writes it: no byte of the file can change unnoticed.

mod issue;
mod line;
mod verify;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use issue::{IssueError, NoCertificate, issue};
pub use verify::{Refused, Verified, verify};

/// The only kind of statement so far.
pub const FORMAT: &str = "lethe erasure certificate 2";
/// The only algorithm so far: what every receiver of callbacks can check already.
pub const ALGORITHM: &str = "rsa-pkcs1v15-sha256";

/// The file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The statement, as JSON in a text.
    pub payload: String,
    /// [`ALGORITHM`].
    pub algorithm: String,
    /// Over the bytes of `payload`; base64.
    pub signature: String,
    /// X.509, PEM, the signing certificate first.
    pub certificate_chain: String,
}

impl Document {
    /// The bytes of the file.
    #[must_use]
    pub fn write(&self) -> String {
        // Four texts: nothing that JSON could not hold.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}

/// What is certified. Holds no personal data: the identities are there as a keyed digest only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// [`FORMAT`].
    pub format: String,
    /// Who certifies.
    pub processor_domain: String,
    /// Whose request it was.
    pub controller_id: String,
    /// The controller's own id of it.
    pub subject_request_id: String,
    /// What was asked, and when.
    pub request: Asked,
    /// When it was executed, and on how many profiles.
    pub execution: Execution,
    /// What each store did, by name.
    pub stores: Vec<StoreReceipt>,
    /// Where the trail tells of the completion.
    pub audit: AuditPosition,
    /// Of the text `certificate_chain`; hexadecimal.
    pub certificate_chain_sha256: String,
}

/// What was asked, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// `erasure`.
    pub subject_request_type: String,
    /// `gdpr` or `ccpa`; null for version 1.
    pub regulation: Option<String>,
    /// The version in which it was asked.
    pub api_version: String,
    /// Keyed digest of the parsed request; hexadecimal.
    pub content_digest: String,
    /// When the data subject asked the controller.
    pub submitted_time: Timestamp,
    /// When the controller asked the processor.
    pub received_time: Timestamp,
}

/// When it was executed, and on how many profiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Execution {
    /// The kind of batch.
    pub lane: String,
    /// The batch.
    pub batch_id: Option<i64>,
    /// When it was to run.
    pub scheduled_for: Option<Timestamp>,
    /// When it began.
    pub began_at: Option<Timestamp>,
    /// When it was complete.
    pub completed_at: Timestamp,
    /// Profiles that matched.
    pub profiles: i64,
}

/// What a store did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreReceipt {
    /// Its name.
    pub store: String,
    /// What was received up to here was erased.
    pub as_of: Timestamp,
    /// Rows deleted.
    pub rows_deleted: i64,
    /// When the store, asked again, held nothing more of it.
    pub verified_at: Timestamp,
    /// Rows from before `as_of` that were found then.
    pub rows_remaining: i64,
    /// Rows received later, which the request does not cover.
    pub rows_arrived_later: i64,
}

/// A place in the audit trail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditPosition {
    /// The chain: the controller's id.
    pub chain: String,
    /// The place in it.
    pub position: i64,
    /// The digest there; hexadecimal. It pins everything up to here.
    pub digest: String,
    /// The entry at this place, without the other requests that it tells of.
    pub entry: SetEntry,
    /// What the entry tells of this request.
    pub inclusion: Inclusion,
}

/// An entry of the trail that tells of a set of requests, but for its lines: what its digest is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetEntry {
    /// The digest of the place before it; hexadecimal.
    pub previous: String,
    /// The number of the entry.
    pub entry_id: i64,
    /// `requests.completed`.
    pub event: String,
    /// When it was recorded.
    pub recorded_at: Timestamp,
    /// Its details to the byte, as JSON in a text: the names of the columns among them.
    pub details: String,
}

/// That a line is in a set, by a Merkle tree (RFC 9162, section 2.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inclusion {
    /// The line to the byte, as JSON in a text: an array of values.
    pub line: String,
    /// Its place in the set, from 0.
    pub index: u64,
    /// The lines of the set.
    pub size: u64,
    /// The hashes from the line to the root, the nearest first; hexadecimal.
    pub path: Vec<String>,
}
