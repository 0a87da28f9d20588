//! The trail as JSON Lines, to be kept and verified elsewhere.

use std::borrow::Cow;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::verify::Verifier;
use lethe_db::audit::SealedRow;
use lethe_domain::audit_chain::{Digest, Entry, Head};
use lethe_domain::crypto;

/// A line of an export.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<'a> {
    /// A place of a chain; those of a chain in order.
    #[serde(borrow)]
    Seal(Seal<'a>),
    /// The signed end of a chain.
    Head(SignedHead),
    /// The last line: an export without it was cut short.
    End {
        /// Places before it.
        entries: u64,
        /// Entries that were not sealed yet, and are not in the export.
        unsealed: i64,
    },
}

/// A place of a chain.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seal<'a> {
    /// Empty for the processor's own.
    pub chain: String,
    /// From 1.
    pub position: i64,
    /// Hexadecimal.
    pub digest: String,
    /// Where the sealer signed here: base64.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signature: Option<String>,
    /// When it signed here.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signed_at: Option<Timestamp>,
    /// The number of the entry.
    pub entry_id: i64,
    /// The entry; null where it is gone.
    #[serde(borrow)]
    pub entry: Option<ExportedEntry<'a>>,
}

/// An entry. Its details must stay as they are, to the byte.
#[derive(Debug, Serialize, Deserialize)]
pub struct ExportedEntry<'a> {
    /// Null for the processor's own doing.
    pub controller_id: Option<String>,
    /// The internal key of the request.
    pub request_key: Option<i64>,
    /// What happened.
    pub event: String,
    /// When.
    pub recorded_at: Timestamp,
    /// A JSON object.
    #[serde(borrow)]
    pub details: Cow<'a, RawValue>,
}

/// The signed end of a chain.
#[derive(Debug, Serialize, Deserialize)]
pub struct SignedHead {
    /// Empty for the processor's own.
    pub chain: String,
    /// Of its last place.
    pub position: i64,
    /// Hexadecimal.
    pub digest: String,
    /// Base64.
    pub signature: String,
    /// When it was signed.
    pub signed_at: Timestamp,
}

impl Line<'_> {
    /// The line of a place.
    #[must_use]
    pub fn of_row(row: SealedRow) -> Self {
        let SealedRow { head, signature, entry_id, entry } = row;
        let entry = entry.and_then(|entry| {
            Some(ExportedEntry {
                controller_id: entry.controller_id,
                request_key: entry.request_key,
                event: entry.event,
                recorded_at: entry.recorded_at,
                // PostgreSQL writes jsonb as valid JSON.
                details: Cow::Owned(RawValue::from_string(entry.details).ok()?),
            })
        });
        let signed_at = signature.is_some().then_some(head.signed_at);
        let digest = crypto::hex(&head.digest);
        Line::Seal(Seal { chain: head.chain, position: head.position, digest, signature, signed_at, entry_id, entry })
    }

    /// The line of a signed end.
    #[must_use]
    pub fn of_head(head: Head, signature: String) -> Self {
        let Head { chain, position, digest, signed_at } = head;
        Line::Head(SignedHead { chain, position, digest: crypto::hex(&digest), signature, signed_at })
    }

    /// Hands the line to a verifier; `None` where a digest in it is none.
    pub fn verify(self, verifier: &mut Verifier) -> Option<()> {
        match self {
            Line::Seal(seal) => {
                let signed_at = seal.signed_at.unwrap_or(Timestamp::UNIX_EPOCH);
                let digest = read_digest(&seal.digest)?;
                let head = Head { chain: seal.chain, position: seal.position, digest, signed_at };
                let entry = seal.entry.map(|entry| Entry {
                    entry_id: seal.entry_id,
                    controller_id: entry.controller_id,
                    request_key: entry.request_key,
                    event: entry.event,
                    details: entry.details.get().to_owned(),
                    recorded_at: entry.recorded_at,
                });
                verifier.sealed(&head, seal.entry_id, seal.signature.as_deref(), entry.as_ref());
            }
            Line::Head(SignedHead { chain, position, digest, signature, signed_at }) => {
                verifier.head(Head { chain, position, digest: read_digest(&digest)?, signed_at }, signature);
            }
            Line::End { .. } => {}
        }
        Some(())
    }
}

fn read_digest(hex: &str) -> Option<Digest> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(digest)
}
