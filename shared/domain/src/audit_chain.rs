//! What is chained and signed, byte by byte. Simple enough to be recomputed with a shell.

use std::collections::{BTreeSet, VecDeque};

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
        self.digest_by(self.set(), previous, position)
    }

    /// What the digest covers of its lines; `None` where it is not a set.
    #[must_use]
    pub fn set(&self) -> Option<Set> {
        let requests = self.requests.as_deref()?;
        Some(match lines_of(requests) {
            Some(lines) => Set { length: lines.len(), root: merkle::root(&leaves(&lines)) },
            // Nothing that we write: covered as it is, and in no other way than a set of lines.
            None => Set { length: 0, root: merkle::leaf(requests.as_bytes()) },
        })
    }

    /// The same where of its lines only the root is known.
    #[must_use]
    pub fn digest_by(&self, set: Option<Set>, previous: &Digest, position: i64) -> Digest {
        let request = self.request_key.map_or_else(|| "-".to_owned(), |key| key.to_string());
        let lines = set.map_or_else(String::new, |Set { length, root }| format!("\n{length} {}", crypto::hex(&root)));
        let text = format!(
            "{}\n{}\n{position}\n{}\n{request}\n{}\n{}\n{}{lines}",
            crypto::hex(previous),
            self.chain(),
            self.entry_id,
            self.event,
            self.recorded_at.as_microsecond(),
            self.details,
        );
        crypto::sha256(text.as_bytes())
    }

    /// The lines of a set, unfolded one by one; empty where it is not a set, `None` where it is not one that we write.
    #[must_use]
    pub fn unfold(&self) -> Option<Unfolding> {
        let Some(requests) = self.requests.as_deref() else { return Some(Unfolding::default()) };
        let lines = lines_of(requests).filter(|lines| lines.len() <= MOST_LINES)?;
        let columns = Columns::read(&self.details)?;
        let event = self.event.strip_prefix("requests.")?;
        // What does not fit shows before the first line is taken.
        lines.iter().all(|line| columns.fields(line.get()).is_some()).then_some(())?;
        let lines = lines.iter().map(|line| line.get().to_owned()).collect();
        Some(Unfolding { event: format!("request.{event}"), columns, lines })
    }
}

/// Lines of a set at most.
const MOST_LINES: usize = 2_000;

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

/// The lines of a set on their way.
#[derive(Clone, Debug, Default)]
pub struct Unfolding {
    event: String,
    columns: Columns,
    lines: VecDeque<String>,
}

impl Iterator for Unfolding {
    type Item = Unfolded;

    fn next(&mut self) -> Option<Unfolded> {
        let details = self.columns.fields(&self.lines.pop_front()?)?;
        Some(Unfolded { event: self.event.clone(), details })
    }
}

/// The texts of the lines of a set; `None` where it is not written as PostgreSQL writes an array of them.
#[must_use]
pub fn lines_of(requests: &str) -> Option<Vec<&RawValue>> {
    let lines: Vec<&RawValue> = serde_json::from_str(requests).ok()?;
    let texts: Vec<&str> = lines.iter().map(|line| line.get()).collect();
    (format!("[{}]", texts.join(", ")) == requests).then_some(lines)
}

/// The hashes of lines.
#[must_use]
pub fn leaves(lines: &[&RawValue]) -> Vec<Digest> {
    lines.iter().map(|line| merkle::leaf(line.get().as_bytes())).collect()
}

/// What the details of a set say: the names of the values of a line, and what holds for all of them.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Columns {
    columns: Vec<String>,
    #[serde(flatten)]
    of_all: Map<String, Value>,
}

impl Columns {
    /// `None` where they are not what we write: no name stands twice.
    #[must_use]
    pub fn read(details: &str) -> Option<Self> {
        let read: Self = serde_json::from_str(details).ok()?;
        let names: BTreeSet<&String> = read.columns.iter().chain(read.of_all.keys()).collect();
        (names.len() == read.columns.len() + read.of_all.len()).then_some(read)
    }

    /// A line by these names, with what holds for all; `None` where it does not fit.
    #[must_use]
    pub fn fields(&self, line: &str) -> Option<Map<String, Value>> {
        let values: Vec<Value> = serde_json::from_str(line).ok()?;
        if self.columns.len() != values.len() {
            return None;
        }
        let mut fields = self.of_all.clone();
        fields.extend(self.columns.iter().cloned().zip(values));
        Some(fields)
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
            r#"[["a", 1],["b", 2]]"#,
            "[]",
            "{}",
            r#"{"a": 1}"#,
        ];
        assert_ne!(set(r#"{"a": 1}"#).digest(&GENESIS, 1), set(r#"[{"a": 1}]"#).digest(&GENESIS, 1));
        for other in others {
            assert_ne!(set(other).digest(&GENESIS, 1), entry.digest(&GENESIS, 1), "{other}");
        }
        // Without its lines it is another entry, whatever its details say.
        let mut without = entry.clone();
        without.requests = None;
        assert_ne!(without.digest(&GENESIS, 1), entry.digest(&GENESIS, 1));
    }

    #[test]
    fn a_set_unfolds_into_what_it_tells_of_each_request_or_not_at_all() {
        let unfolded: Vec<Unfolded> = set(r#"[["a", 1], ["b", null]]"#).unfold().unwrap().collect();
        let details: Vec<Value> = unfolded.iter().map(|one| one.details.clone().into()).collect();
        let wanted = [
            serde_json::json!({"slice_id": 5, "subject_request_id": "a", "n": 1}),
            serde_json::json!({"slice_id": 5, "subject_request_id": "b", "n": null}),
        ];
        assert_eq!(details, wanted);
        assert!(unfolded.iter().all(|one| one.event == "request.released"));
        let many = format!("[{}]", vec![r#"["a", 1]"#; 2_001].join(", "));
        for unlike in [r#"[["a", 1], ["a"]]"#, r#"[["a", 1, 2]]"#, "{}", r#"["a"]"#, r#"[["a", 1],["b", 1]]"#, &many] {
            assert!(set(unlike).unfold().is_none(), "{unlike}");
        }
        for details in [r#"{"columns":["n","n"]}"#, r#"{"slice_id":1,"columns":["slice_id","n"]}"#, "{}"] {
            let entry = Entry { details: details.to_owned(), ..set(r#"[["a", 1]]"#) };
            assert!(entry.unfold().is_none(), "{details}");
        }
        let single = Entry { requests: None, ..set("") };
        assert_eq!(single.unfold().unwrap().count(), 0);
    }
}
