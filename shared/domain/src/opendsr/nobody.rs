//! Values that name nobody: what software writes where it has no value (contract 4). One list for requests and import:
//! a request by such a value would match strangers, so intake refuses it and the import does not index it.
//!
//! **Invariant** (DESIGN rule 11): import and requests have one list of values that name nobody, and one definition of
//! normalisation.

use std::collections::HashSet;
use std::sync::LazyLock;

use super::identity_type::{IdentityFormat, IdentityType};

/// Words that stand for nothing, also in quotes or brackets (`(null)`, `<null>`, `"null"`).
const WORDS: [&str; 33] = [
    "",
    "null",
    "nil",
    "none",
    "undefined",
    "nan",
    "n/a",
    "#n/a",
    "unknown",
    "unidentified",
    "anonymous",
    "anon",
    "guest",
    "true",
    "false",
    "empty",
    "missing",
    "not set",
    "not_set",
    "not provided",
    "not_authenticated",
    "not available",
    "object object",
    "distinct_id",
    "distinctid",
    "device_id",
    "user_id",
    "userid",
    "customer_id",
    "idfa",
    "mpid",
    "id",
    "-1",
];

/// Ids that many devices share, and addresses that forms are filled in with.
const SHARED: [&str; 20] = [
    "00000000-0000-0000-0000-000000000000",
    "00000000-0000-0000-0000-000000000001",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "ffffffffffffffff",
    "ffffffffffffffffffffffffffffffff",
    "00:00:00:00:00:00",
    "02:00:00:00:00:00",
    "ff:ff:ff:ff:ff:ff",
    // The Android id of a whole series of phones, that of emulators, and serial numbers that were never set.
    "9774d56d682e549c",
    "dead00beef",
    "0123456789abcdef",
    "012345678912345",
    "004999010640000",
    "test@test.com",
    "noemail@example.com",
    "noemail@noemail.com",
    "no@email.com",
    "%s",
    "%d",
    "%@",
];

/// Pairs that a value may stand in.
const PAIRS: [(&str, &str); 7] = [("\"", "\""), ("'", "'"), ("`", "`"), ("(", ")"), ("<", ">"), ("[", "]"), ("{", "}")];

/// Marks of templates that were never filled in.
const TEMPLATES: [(&str, &str); 7] =
    [("{{", "}}"), ("${", "}"), ("#{", "}"), ("<%", "%>"), ("[[", "]]"), ("%%", "%%"), ("*|", "|*")];

/// The longest run of zeros whose digests are known.
const ZEROS: usize = 32;

static BUILT_IN: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let mut values = HashSet::new();
    let types = IdentityType::ALL.iter().map(|kind| kind.as_str());
    for word in WORDS.into_iter().chain(types) {
        add(&mut values, word);
        for (open, close) in PAIRS {
            add(&mut values, &format!("{open}{word}{close}"));
        }
        add(&mut values, &format!("{word}@{word}"));
        add(&mut values, &format!("{word}@{word}.com"));
    }
    for value in SHARED {
        add(&mut values, value);
    }
    for count in 1..=ZEROS {
        add(&mut values, &"0".repeat(count));
    }
    values
});

/// A value as it is and as digests, in the spellings that occur.
fn add(values: &mut HashSet<String>, value: &str) {
    let lower = value.to_ascii_lowercase();
    let capital = capitalised(&lower);
    for spelling in [value.to_owned(), value.to_ascii_uppercase(), capital, lower] {
        for &format in IdentityFormat::ALL {
            values.insert(format.encode(&spelling));
        }
    }
}

/// The first letter of each word in upper case: `None`, `(None)`, `[Object Object]`; and `NaN`, which is odd.
fn capitalised(lower: &str) -> String {
    let mut at_start = true;
    let letter = |character: char| {
        let is_letter = character.is_ascii_alphabetic();
        let written = if is_letter && at_start { character.to_ascii_uppercase() } else { character };
        at_start = !is_letter && character != '_';
        written
    };
    lower.chars().map(letter).collect::<String>().replace("Nan", "NaN")
}

/// Values that name nobody, as they are and as digests: those of the built-in list and configured ones.
#[derive(Clone, Debug, Default)]
pub struct DeniedValues {
    configured: HashSet<String>,
}

impl DeniedValues {
    /// The values that are denied everywhere, and `configured` ones beside them (`LETHE_DENIED_IDENTITIES`).
    pub fn new<'a>(configured: impl IntoIterator<Item = &'a str>) -> Self {
        let mut values = HashSet::new();
        for value in configured.into_iter().map(str::trim).filter(|value| !value.is_empty()) {
            add(&mut values, value);
        }
        Self { configured: values }
    }

    /// Whether a value in normal form, or a digest in lower case, names nobody.
    pub(super) fn contains(&self, kind: IdentityType, format: IdentityFormat, value: &str) -> bool {
        let lower = value.to_ascii_lowercase();
        let listed = |value: &str| BUILT_IN.contains(value) || self.configured.contains(value);
        listed(value) || listed(&lower) || (format == IdentityFormat::Raw && is_placeholder(kind, &lower))
    }
}

/// Whether a raw value has the form of a placeholder. `value` is in lower case.
fn is_placeholder(kind: IdentityType, value: &str) -> bool {
    let mut inner = value.trim();
    if TEMPLATES.iter().any(|(open, close)| is_between(inner, open, close).is_some()) {
        return true;
    }
    loop {
        // Zeros and punctuation, whatever their number.
        if inner.bytes().all(|byte| byte == b'0' || byte.is_ascii_punctuation()) || BUILT_IN.contains(inner) {
            return true;
        }
        match PAIRS.iter().find_map(|(open, close)| is_between(inner, open, close)) {
            Some(within) => inner = within.trim(),
            None => break,
        }
    }
    kind == IdentityType::Email && is_empty_address(inner)
}

/// What stands between two marks.
fn is_between<'a>(value: &'a str, open: &str, close: &str) -> Option<&'a str> {
    value.strip_prefix(open)?.strip_suffix(close)
}

/// `null@null`, `none@undefined.org`: both sides stand for nothing.
fn is_empty_address(value: &str) -> bool {
    let Some((local, domain)) = value.split_once('@') else { return false };
    let host = domain.split('.').next().unwrap_or(domain);
    WORDS.contains(&local) && WORDS.contains(&host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::opendsr::{Identity, InvalidIdentity};

    fn identity(kind: IdentityType, format: IdentityFormat, value: &str) -> Result<Identity, InvalidIdentity> {
        Identity::new(kind, format, value, &DeniedValues::new(["Shared@Example.com"]))
    }

    /// What was seen in real data: shared by strangers.
    fn seen() -> Vec<String> {
        serde_json::from_str(include_str!("../../../../tests/fixtures/nobody.json")).unwrap()
    }

    #[test]
    fn who_names_nobody_is_refused_whatever_the_type() {
        let more = [
            "",
            " ",
            "\u{a0}",
            "NULL",
            "0",
            "None",
            "NaN",
            "(not set)",
            "\"(null)\"",
            "-",
            "?",
            "${email}",
            "none@undefined.org",
            "<%= email %>",
            "SHARED@example.COM",
            "00:00:00:00:00:00",
            "Unknown",
        ];
        let seen = seen();
        for nobody in seen.iter().map(String::as_str).chain(more) {
            for kind in [IdentityType::Email, IdentityType::AndroidId, IdentityType::ControllerCustomerId] {
                if nobody == "none@undefined.org" && kind != IdentityType::Email {
                    continue;
                }
                let refused = identity(kind, IdentityFormat::Raw, nobody);
                assert_eq!(refused, Err(InvalidIdentity::NamesNobody), "{kind} {nobody:?}");
            }
        }
    }

    #[test]
    fn who_names_nobody_is_refused_as_a_digest_too() {
        // A template has no list of its values.
        let seen = seen();
        let known = seen.iter().map(String::as_str).filter(|value| *value != "{{user.email}}");
        for nobody in known.chain(["", "null", "None", "NaN", "Unknown", "(None)", "shared@example.com"]) {
            for &format in &IdentityFormat::ALL[1..] {
                let digest = format.encode(&IdentityType::Email.normalise(nobody));
                for spelling in [digest.clone(), digest.to_uppercase()] {
                    let refused = identity(IdentityType::Email, format, &spelling);
                    assert_eq!(refused, Err(InvalidIdentity::NamesNobody), "{nobody:?} {format}");
                }
            }
        }
    }

    #[test]
    fn who_is_somebody_is_not_refused() {
        let somebody = [
            "ada@example.com",
            "1",
            "10",
            "100",
            "c-0",
            "null@example.com",
            "unknown@company.example",
            "guest7",
            "Nullmann",
            "truelove",
            "38400000-8cf0-11bd-b23e-10b96e40000d",
            "a1b2c3d4e5f60718",
            "O'Neill",
            "<ada@example.com>",
            "x@0.example",
            "idris",
            "00012",
            "😀",
        ];
        for somebody in somebody {
            for kind in [IdentityType::Email, IdentityType::Other] {
                assert!(identity(kind, IdentityFormat::Raw, somebody).is_ok(), "{kind} {somebody}");
            }
        }
    }
}
