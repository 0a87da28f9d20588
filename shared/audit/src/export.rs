//! The trail as JSON Lines, to be kept and verified elsewhere.

use std::borrow::Cow;
use std::iter::{Enumerate, Peekable};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::verify::{Finding, Problem, Verifier};
use super::{Trust, trail};
use lethe_db::audit::SealedRow;
use lethe_domain::audit_chain::{Digest, Entry, Head, Unfolded, Unfolding};
use lethe_domain::crypto;

/// A line of an export.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line<'a> {
    /// A place of a chain; those of a chain in order.
    #[serde(borrow)]
    Seal(Seal<'a>),
    /// What the set before it tells of one request, in the order of the set: so that nobody has to unfold sets who looks for
    /// a request. It follows from the set, and is in no chain itself.
    Request(RequestLine),
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
    /// Of a set, a JSON array with a line for each request.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub requests: Option<Cow<'a, RawValue>>,
}

/// What a set tells of one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestLine {
    /// Whose.
    pub chain: String,
    /// The place of the set in its chain.
    pub position: i64,
    /// The place of the line in the set, from 0.
    pub line: usize,
    /// What happened to the request, as in `request.received`.
    pub event: String,
    /// When.
    pub recorded_at: Timestamp,
    /// The line by the names of its columns, and what holds for the whole set.
    pub details: Map<String, Value>,
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

/// The lines of the requests of a set on their way.
#[derive(Debug)]
struct Lines {
    chain: String,
    position: i64,
    recorded_at: Timestamp,
    unfolding: Enumerate<Unfolding>,
}

impl Lines {
    fn new(head: &Head, entry: &Entry, unfolding: Unfolding) -> Self {
        let (chain, recorded_at) = (head.chain.clone(), entry.recorded_at);
        Self { chain, position: head.position, recorded_at, unfolding: unfolding.enumerate() }
    }
}

impl Iterator for Lines {
    type Item = RequestLine;

    fn next(&mut self) -> Option<RequestLine> {
        let (line, Unfolded { event, details }) = self.unfolding.next()?;
        let (chain, position, recorded_at) = (self.chain.clone(), self.position, self.recorded_at);
        Some(RequestLine { chain, position, line, event, recorded_at, details })
    }
}

impl Line<'_> {
    /// The line of a place, and those of the requests of its set.
    #[must_use]
    pub fn of_row(row: SealedRow) -> Vec<Self> {
        let SealedRow { head, signature, entry_id, entry } = row;
        // What cannot be read is exported as it is, and found by whoever verifies it.
        let lines = entry.as_ref().and_then(|entry| Some(Lines::new(&head, entry, entry.unfold()?)));
        let requests: Vec<_> = lines.into_iter().flatten().map(Line::Request).collect();
        let raw = |text: String| RawValue::from_string(text).ok().map(Cow::Owned);
        let entry = entry.and_then(|entry| {
            Some(ExportedEntry {
                controller_id: entry.controller_id,
                request_key: entry.request_key,
                event: entry.event,
                recorded_at: entry.recorded_at,
                // What PostgreSQL keeps as JSON is JSON.
                details: raw(entry.details)?,
                requests: entry.requests.and_then(raw),
            })
        });
        let signed_at = signature.is_some().then_some(head.signed_at);
        let digest = crypto::hex(&head.digest);
        let seal = Seal { chain: head.chain, position: head.position, digest, signature, signed_at, entry_id, entry };
        std::iter::once(Line::Seal(seal)).chain(requests).collect()
    }

    /// The line of a signed end.
    #[must_use]
    pub fn of_head(head: Head, signature: String) -> Self {
        let Head { chain, position, digest, signed_at } = head;
        Line::Head(SignedHead { chain, position, digest: crypto::hex(&digest), signature, signed_at })
    }
}

/// Verifies an export line by line.
#[derive(Debug)]
pub struct Reader {
    verifier: Verifier,
    /// The last set, as far as the lines of its requests have not come; `None` where that is not to be known.
    lines: Option<Peekable<Lines>>,
    /// Where the last set stands.
    set: Option<(String, i64, i64)>,
    end: Option<(u64, i64)>,
}

/// Why a line of an export cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadLine {
    /// Not JSON, or not one of these lines.
    #[error("it is not a line of an export")]
    Json(#[from] serde_json::Error),
    /// There is one way to write a line: no other member, none twice, no white space.
    #[error("it is not written as an export is: it was changed")]
    Form,
    /// It comes after the last one.
    #[error("it follows the end of the export")]
    AfterEnd,
    /// A digest is not 64 hexadecimal digits.
    #[error("its digest is not a valid digest")]
    Digest,
}

/// Why an export is not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incomplete {
    /// The last line is missing.
    #[error("the export was cut short: its last line is missing")]
    CutShort,
    /// The last line counts otherwise.
    #[error("the export has {found} entries, but its last line counts {counted}")]
    Miscounted {
        /// Those that are there.
        found: u64,
        /// Those that the last line counts.
        counted: u64,
    },
}

impl Reader {
    /// Accepts the signatures of these.
    #[must_use]
    pub fn new(trust: Trust) -> Self {
        Self { verifier: Verifier::new(trust), lines: None, set: None, end: None }
    }

    /// The next line, without the line feed at its end.
    ///
    /// # Errors
    /// [`BadLine`].
    pub fn line(&mut self, text: &str) -> Result<(), BadLine> {
        if self.end.is_some() {
            return Err(BadLine::AfterEnd);
        }
        let line: Line<'_> = serde_json::from_str(text)?;
        if serde_json::to_string(&line)? != text {
            return Err(BadLine::Form);
        }
        if let Line::Request(line) = line {
            if self.lines.as_mut().is_some_and(|lines| lines.next().as_ref() != Some(&line)) {
                self.lines_differ();
            } else if self.set.is_none() {
                self.verifier.found(&line.chain, Some(line.position), None, Problem::Unfolded);
            }
            return Ok(());
        }
        if self.lines.as_mut().is_some_and(|lines| lines.peek().is_some()) {
            self.lines_differ();
        }
        match line {
            Line::Request(_) => {}
            Line::Seal(seal) => self.seal(seal)?,
            Line::Head(SignedHead { chain, position, digest, signature, signed_at }) => {
                in_microseconds(signed_at)?;
                let digest = read_digest(&digest).ok_or(BadLine::Digest)?;
                self.verifier.head(Head { chain, position, digest, signed_at }, signature);
                (self.lines, self.set) = (None, None);
            }
            Line::End { entries, unsealed } => self.end = Some((entries, unsealed)),
        }
        Ok(())
    }

    fn seal(&mut self, seal: Seal<'_>) -> Result<(), BadLine> {
        let times = [seal.signed_at, seal.entry.as_ref().map(|entry| entry.recorded_at)];
        times.into_iter().flatten().try_for_each(in_microseconds)?;
        let signed_at = seal.signed_at.unwrap_or(Timestamp::UNIX_EPOCH);
        let digest = read_digest(&seal.digest).ok_or(BadLine::Digest)?;
        let head = Head { chain: seal.chain, position: seal.position, digest, signed_at };
        let entry = seal.entry.map(|entry| Entry {
            entry_id: seal.entry_id,
            controller_id: entry.controller_id,
            request_key: entry.request_key,
            event: entry.event,
            details: entry.details.get().to_owned(),
            requests: entry.requests.map(|requests| requests.get().to_owned()),
            recorded_at: entry.recorded_at,
        });
        let unfolding = self.verifier.sealed(&head, seal.entry_id, seal.signature.as_deref(), entry.as_ref());
        self.lines = entry.zip(unfolding).map(|(entry, unfolding)| Lines::new(&head, &entry, unfolding).peekable());
        self.set = Some((head.chain, head.position, seal.entry_id));
        Ok(())
    }

    fn lines_differ(&mut self) {
        self.lines = None;
        if let Some((chain, position, entry_id)) = &self.set {
            self.verifier.found(chain, Some(*position), Some(*entry_id), Problem::Unfolded);
        }
    }

    /// What the export comes to.
    ///
    /// # Errors
    /// [`Incomplete`].
    pub fn finish(self) -> Result<trail::Report, Incomplete> {
        let (counted, unsealed) = self.end.ok_or(Incomplete::CutShort)?;
        let (chains, found) = (self.verifier.chains(), self.verifier.entries());
        if counted != found {
            return Err(Incomplete::Miscounted { found, counted });
        }
        let findings: Vec<Finding> = self.verifier.finish();
        Ok(trail::Report { chains, entries: found, unsealed, findings })
    }
}

/// Digests and signatures know microseconds: what is finer would not be covered.
fn in_microseconds(time: Timestamp) -> Result<(), BadLine> {
    if time.subsec_nanosecond() % 1_000 == 0 { Ok(()) } else { Err(BadLine::Form) }
}

/// A digest in hexadecimal.
pub(crate) fn read_digest(hex: &str) -> Option<Digest> {
    let mut digest = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(digest)
}
