//! What is chained and signed, byte by byte. Simple enough to be recomputed with a shell.

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

pub use crate::crypto::Digest;
use crate::{crypto, merkle};

/// The chain of what the processor does for no controller in particular.
pub const PROCESSOR: &str = "";

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
    /// What happened, as in `controller.added`; `requests.received` where it tells of a set of requests.
    pub event: String,
    /// A JSON object, as PostgreSQL writes it: on one line.
    pub details: String,
    /// A JSON array with a line for each request of a set: the values of what `columns` in the details names.
    pub requests: Option<String>,
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
    /// 1970, details; and for a set one more: the number of its lines, a space, and their [root](merkle::root) in
    /// hexadecimal.
    #[must_use]
    pub fn digest(&self, previous: &Digest, position: i64) -> Digest {
        let set = self.requests.as_deref().map(|requests| match lines_of(requests) {
            Some(lines) => Set { length: lines.len(), root: merkle::root(&leaves(&lines)) },
            // Nothing that we write. As one line it is covered all the same.
            None => Set { length: 1, root: merkle::leaf(requests.as_bytes()) },
        });
        self.digest_by(set, previous, position)
    }

    /// The same where of its lines only the root is known.
    #[must_use]
    pub fn digest_by(&self, set: Option<Set>, previous: &Digest, position: i64) -> Digest {
        let request = self.request_key.map_or_else(|| "-".to_owned(), |key| key.to_string());
        let mut text = format!(
            "{}\n{}\n{position}\n{}\n{request}\n{}\n{}\n{}",
            crypto::hex(previous),
            self.chain(),
            self.entry_id,
            self.event,
            self.recorded_at.as_microsecond(),
            self.details,
        );
        if let Some(Set { length, root }) = set {
            text.push_str(&format!("\n{length} {}", crypto::hex(&root)));
        }
        crypto::sha256(text.as_bytes())
    }

    /// The lines of a set, unfolded; empty for any other entry, and where they are not what we write.
    #[must_use]
    pub fn unfold(&self) -> Vec<Unfolded> {
        let lines = self.requests.as_deref().and_then(lines_of).unwrap_or_default();
        let unfolded = lines.iter().map(|line| {
            let details = fields(&self.details, line.get())?;
            Some(Unfolded { event: self.event.replacen("requests.", "request.", 1), details })
        });
        unfolded.collect::<Option<_>>().unwrap_or_default()
    }
}

/// The lines of a set, as far as the digest of its entry covers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set {
    /// How many there are.
    pub length: usize,
    /// Over the texts of the lines ([`merkle::root`]).
    pub root: Digest,
}

/// What a set tells of one of its requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Unfolded {
    /// What happened to it, as in `request.received`.
    pub event: String,
    /// The values of its line by the names of the columns, and what holds for all of the set.
    pub details: Map<String, Value>,
}

/// The texts of the lines of a set.
#[must_use]
pub fn lines_of(requests: &str) -> Option<Vec<&RawValue>> {
    serde_json::from_str(requests).ok()
}

/// The hashes of lines.
#[must_use]
pub fn leaves(lines: &[&RawValue]) -> Vec<Digest> {
    lines.iter().map(|line| merkle::leaf(line.get().as_bytes())).collect()
}

/// A line of a set by the names of its columns, with what the details of the set say of all; `None` where they do not fit.
#[must_use]
pub fn fields(details: &str, line: &str) -> Option<Map<String, Value>> {
    #[derive(Deserialize)]
    struct Head {
        columns: Vec<String>,
        #[serde(flatten)]
        of_all: Map<String, Value>,
    }
    let Head { columns, of_all: mut fields } = serde_json::from_str(details).ok()?;
    let values: Vec<Value> = serde_json::from_str(line).ok()?;
    if columns.len() != values.len() {
        return None;
    }
    fields.extend(columns.into_iter().zip(values));
    Some(fields)
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
            requests: None,
            recorded_at: "2026-11-20T10:00:00.000001Z".parse().unwrap(),
        };
        // printf '%s\nacme\n1\n7\n3\nrequest.received\n1795168800000001\n{"type": "erasure"}' "$(printf '0%.0s' {1..64})" | sha256sum
        let known = "0000000000000000000000000000000000000000000000000000000000000000\nacme\n1\n7\n3\nrequest.received\n1795168800000001\n{\"type\": \"erasure\"}";
        let digest = entry.digest(&GENESIS, 1);
        assert_eq!(digest, crypto::sha256(known.as_bytes()));
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

    fn set(requests: &str) -> Entry {
        Entry {
            entry_id: 8,
            controller_id: Some("acme".to_owned()),
            request_key: None,
            event: "requests.released".to_owned(),
            details: r#"{"slice_id":5,"columns":["subject_request_id","n"]}"#.to_owned(),
            requests: Some(requests.to_owned()),
            recorded_at: "2026-11-20T10:00:00.000001Z".parse().unwrap(),
        }
    }

    #[test]
    fn the_digest_of_a_set_is_over_the_number_and_the_root_of_its_lines() {
        let entry = set(r#"[["a", 1], ["b", 2]]"#);
        let lines: [&[u8]; 2] = [br#"["a", 1]"#, br#"["b", 2]"#];
        let root = merkle::root(&lines.map(merkle::leaf));
        let known = format!(
            "{}\nacme\n1\n8\n-\nrequests.released\n1795168800000001\n{}\n2 {}",
            "0".repeat(64),
            entry.details,
            crypto::hex(&root)
        );
        assert_eq!(entry.digest(&GENESIS, 1), crypto::sha256(known.as_bytes()));
        let others = [
            r#"[["a", 1]]"#,
            r#"[["b", 2], ["a", 1]]"#,
            r#"[["a", 1], ["b", 2], ["b", 2]]"#,
            r#"[["a", 1], ["b", 3]]"#,
            r#"[["a", 1], ["b",2]]"#,
            "[]",
            "{}",
            r#"{"a": 1}"#,
        ];
        for other in others {
            assert_ne!(set(other).digest(&GENESIS, 1), entry.digest(&GENESIS, 1), "{other}");
        }
        // A set is no entry without one, whatever its details say.
        let mut without = entry.clone();
        without.requests = None;
        assert_ne!(without.digest(&GENESIS, 1), entry.digest(&GENESIS, 1));
    }

    #[test]
    fn a_set_unfolds_into_what_it_tells_of_each_request() {
        let unfolded = set(r#"[["a", 1], ["b", null]]"#).unfold();
        let details: Vec<Value> = unfolded.iter().map(|one| one.details.clone().into()).collect();
        let wanted = [
            serde_json::json!({"slice_id": 5, "subject_request_id": "a", "n": 1}),
            serde_json::json!({"slice_id": 5, "subject_request_id": "b", "n": null}),
        ];
        assert_eq!(details, wanted);
        assert!(unfolded.iter().all(|one| one.event == "request.released"));
        for unlike in [r#"[["a"]]"#, r#"[["a", 1, 2]]"#, "{}", r#"["a"]"#] {
            assert_eq!(set(unlike).unfold(), [], "{unlike}");
        }
    }
}
