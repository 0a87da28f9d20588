//! What is chained and signed, byte by byte. Simple enough to be recomputed with a shell.

use jiff::Timestamp;

use crate::crypto;

/// The chain of what the processor does for no controller in particular.
pub const PROCESSOR: &str = "";

/// SHA-256.
pub type Digest = [u8; 32];

/// What stands in the place of a digest before the first entry.
pub const GENESIS: Digest = [0; 32];

/// An entry of the trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number; not its place in the chain.
    pub entry_id: i64,
    /// Whose; `None` for the processor's own doing.
    pub controller_id: Option<String>,
    /// The internal key of the request that it tells of.
    pub request_key: Option<i64>,
    /// What happened, as in `request.received`.
    pub event: String,
    /// A JSON object, as PostgreSQL writes it: on one line.
    pub details: String,
    /// When it happened.
    pub recorded_at: Timestamp,
}

impl Entry {
    /// The chain that it belongs to.
    #[must_use]
    pub fn chain(&self) -> &str {
        self.controller_id.as_deref().unwrap_or(PROCESSOR)
    }

    /// Its digest at a place in its chain: SHA-256 over these lines, joined by line feeds: the previous digest in
    /// hexadecimal, chain, position, number of the entry, key of the request or `-`, event, time in microseconds since
    /// 1970, details.
    #[must_use]
    pub fn digest(&self, previous: &Digest, position: i64) -> Digest {
        let request = self.request_key.map_or_else(|| "-".to_owned(), |key| key.to_string());
        let text = format!(
            "{}\n{}\n{position}\n{}\n{request}\n{}\n{}\n{}",
            crypto::hex(previous),
            self.chain(),
            self.entry_id,
            self.event,
            self.recorded_at.as_microsecond(),
            self.details,
        );
        digest_of(text.as_bytes())
    }
}

/// How far a chain goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Which chain.
    pub chain: String,
    /// Of its last entry.
    pub position: i64,
    /// Of its last entry.
    pub digest: Digest,
    /// When it was signed.
    pub signed_at: Timestamp,
}

impl Head {
    /// What is signed: these lines, joined by line feeds: `lethe audit head`, chain, position, digest in hexadecimal,
    /// time in microseconds since 1970.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        let (digest, at) = (crypto::hex(&self.digest), self.signed_at.as_microsecond());
        format!("lethe audit head\n{}\n{}\n{digest}\n{at}", self.chain, self.position).into_bytes()
    }
}

/// SHA-256 as an array.
#[must_use]
pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    let mut digest = GENESIS;
    digest.copy_from_slice(&crypto::sha256(bytes));
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_over_every_field_and_over_what_came_before() {
        let entry = Entry {
            entry_id: 7,
            controller_id: Some("acme".to_owned()),
            request_key: Some(3),
            event: "request.received".to_owned(),
            details: r#"{"type": "erasure"}"#.to_owned(),
            recorded_at: "2026-11-20T10:00:00.000001Z".parse().unwrap(),
        };
        // printf '%s\nacme\n1\n7\n3\nrequest.received\n1795168800000001\n{"type": "erasure"}' "$(printf '0%.0s' {1..64})" | sha256sum
        let known = "0000000000000000000000000000000000000000000000000000000000000000\nacme\n1\n7\n3\nrequest.received\n1795168800000001\n{\"type\": \"erasure\"}";
        let digest = entry.digest(&GENESIS, 1);
        assert_eq!(digest, digest_of(known.as_bytes()));
        let changes: [fn(&mut Entry); 6] = [
            |one| one.entry_id = 8,
            |one| one.controller_id = None,
            |one| one.request_key = None,
            |one| one.event = "request.cancelled".to_owned(),
            |one| one.details = "{}".to_owned(),
            |one| one.recorded_at = "2026-11-20T10:00:00Z".parse().unwrap(),
        ];
        for change in changes {
            let mut other = entry.clone();
            change(&mut other);
            assert_ne!(other.digest(&GENESIS, 1), digest, "{other:?}");
        }
        assert_ne!(entry.digest(&GENESIS, 2), digest);
        assert_ne!(entry.digest(&digest, 1), digest);
    }
}
