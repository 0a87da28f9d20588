//! Lines of an import, read from JSON Lines: liberal where the meaning is clear.

use std::collections::HashSet;
use std::fmt;

use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::rule::{InvalidLine, Rule};
use super::storable;
use lethe_domain::opendsr::identity::text_of;
use lethe_domain::opendsr::json::{self, InvalidJson};
use lethe_domain::opendsr::read_mpid;
use lethe_domain::opendsr::{DeniedValues, Identity, IdentityFormat, IdentityType, InvalidIdentity};
use lethe_domain::request::Mpid;

/// Identities of a line that are not stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// They name nobody: a request by them would match strangers.
    pub nobody: u64,
    /// E-mail addresses with white space, control or format characters inside: no request can name them.
    pub addresses: u64,
    /// Of types that mParticle knows and no request can name, such as `facebook`.
    pub foreign: u64,
}

impl std::ops::AddAssign for LeftOut {
    fn add_assign(&mut self, other: Self) {
        self.nobody += other.nobody;
        self.addresses += other.addresses;
        self.foreign += other.foreign;
    }
}

/// A line of an import of profiles: the whole profile.
#[derive(Debug)]
pub struct ProfileLine {
    pub(super) mpid: Mpid,
    /// Each once, by its type and the normal form of its value.
    pub(super) identities: Vec<(IdentityType, String)>,
    pub(super) attributes: String,
    pub(super) audiences: String,
    /// Identities that are left out.
    pub left_out: LeftOut,
}

/// A line of an import of event batches: the batch itself, verbatim.
#[derive(Debug)]
pub struct EventBatchLine {
    pub(super) mpid: Mpid,
    pub(super) body: String,
}

impl ProfileLine {
    /// Reads `{"mpid":1,"identities":{"email":"…"},"attributes":{…},"audiences":[…]}`. Values of identities may be texts,
    /// integers, or lists of these; null and `[]` are empty.
    ///
    /// # Errors
    /// [`InvalidLine`].
    pub fn parse(line: &str, denied: &DeniedValues) -> Result<Self, InvalidLine> {
        let (mut mpid, mut attributes, mut audiences) = (None, "{}".to_owned(), "[]".to_owned());
        let (mut identities, mut seen) = (Identities::new(denied), HashSet::new());
        for (name, raw) in fields(line)? {
            let is_new = seen.insert(name.clone());
            if !is_new {
                return Err(InvalidLine::field(known(&name), Rule::DuplicateKey));
            }
            let is_empty = matches!(raw.get(), "null") || is_empty_list(raw.get());
            match name.as_str() {
                "mpid" => mpid = Some(mpid_of(line, raw)?),
                _ if is_empty => {}
                "identities" => identities.read(stored(line, "identities", raw)?)?,
                "attributes" => stored(line, "attributes", raw)?.clone_into(&mut attributes),
                "audiences" => stored(line, "audiences", raw)?.clone_into(&mut audiences),
                _ => {}
            }
        }
        let mpid = mpid.ok_or_else(|| InvalidLine::field("mpid", Rule::MissingMpid))?;
        Ok(Self { mpid, identities: identities.taken, attributes, audiences, left_out: identities.left_out })
    }
}

impl EventBatchLine {
    /// Reads an event batch with a top-level `mpid`. Its own `timestamp_unixtime_ms` is the device's; the time of
    /// receipt is that of the import, since an erasure covers what was received before it, whatever a device says.
    ///
    /// # Errors
    /// [`InvalidLine`].
    pub fn parse(line: &str) -> Result<Self, InvalidLine> {
        let mut mpid = None;
        for (name, raw) in fields(line)? {
            if name == "mpid" && mpid.replace(mpid_of(line, raw)?).is_some() {
                return Err(InvalidLine::field("mpid", Rule::DuplicateKey));
            }
        }
        storable::as_json(line).map_err(|(rule, index)| InvalidLine::at(rule, index))?;
        let mpid = mpid.ok_or_else(|| InvalidLine::field("mpid", Rule::MissingMpid))?;
        Ok(Self { mpid, body: line.to_owned() })
    }

    /// Whose it is.
    pub(super) const fn mpid(&self) -> Mpid {
        self.mpid
    }
}

/// The name of a field as it may be shown: others are the sender's own words.
fn known(name: &str) -> &'static str {
    ["mpid", "identities", "attributes", "audiences"].into_iter().find(|known| *known == name).unwrap_or("")
}

fn is_empty_list(raw: &str) -> bool {
    raw.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).is_some_and(|within| within.trim().is_empty())
}

fn mpid_of(line: &str, raw: &RawValue) -> Result<Mpid, InvalidLine> {
    let value = serde_json::from_str::<Value>(raw.get()).ok();
    let invalid = || InvalidLine { column: Some(place(line, raw) + 1), ..InvalidLine::field("mpid", Rule::Mpid) };
    value.as_ref().and_then(read_mpid).ok_or_else(invalid)
}

/// The index at which the text of a field begins: it is a part of the line, so the difference of their addresses tells.
fn place(line: &str, raw: &RawValue) -> usize {
    (raw.get().as_ptr() as usize).saturating_sub(line.as_ptr() as usize)
}

/// The text of a field that is stored as jsonb.
fn stored<'a>(line: &str, field: &'static str, raw: &'a RawValue) -> Result<&'a str, InvalidLine> {
    storable::as_jsonb(raw.get()).map(|()| raw.get()).map_err(|(rule, index)| InvalidLine {
        column: Some(place(line, raw) + index + 1),
        ..InvalidLine::field(field, rule)
    })
}

/// The fields of a line in their order, each with its text. A key that cannot be read keeps its own spelling.
fn fields(line: &str) -> Result<Vec<(String, &RawValue)>, InvalidLine> {
    if let Some(index) = line.find('\r') {
        return Err(InvalidLine::at(Rule::CarriageReturn, index));
    }
    match line.trim_start().as_bytes().first() {
        Some(b'{') => {}
        Some(b'[') => return Err(InvalidLine::line(Rule::Array)),
        _ => return Err(InvalidLine::line(Rule::NotObject)),
    }
    let malformed = |error: &serde_json::Error| InvalidLine::at(Rule::Malformed, error.column().saturating_sub(1));
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let fields = deserializer.deserialize_map(Fields).map_err(|error| malformed(&error))?;
    deserializer.end().map_err(|error| malformed(&error))?;
    let decoded = |raw: &RawValue| serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned());
    Ok(fields.into_iter().map(|(key, value)| (decoded(key), value)).collect())
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = Vec<(&'de RawValue, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = entries.next_entry()? {
            fields.push(field);
        }
        Ok(fields)
    }
}

/// Collects the identities of a line.
struct Identities<'a> {
    denied: &'a DeniedValues,
    taken: Vec<(IdentityType, String)>,
    /// Two spellings of one value are one identity.
    seen: HashSet<Identity>,
    left_out: LeftOut,
}

impl<'a> Identities<'a> {
    fn new(denied: &'a DeniedValues) -> Self {
        Self { denied, taken: Vec::new(), seen: HashSet::new(), left_out: LeftOut::default() }
    }

    fn read(&mut self, raw: &str) -> Result<(), InvalidLine> {
        let broken = |rule| InvalidLine::field("identities", rule);
        let Value::Object(map) = json::parse(raw.as_bytes()).map_err(|error| broken(rule_of(&error)))? else {
            return Err(broken(Rule::Identities));
        };
        for (name, value) in &map {
            let values = match value {
                Value::Array(list) => list.iter().collect(),
                value => vec![value],
            };
            let values = values.into_iter().filter(|value| !value.is_null());
            match IdentityType::named(name) {
                Some(kind) => values.into_iter().try_for_each(|value| self.add(kind, value))?,
                None if IdentityType::is_foreign(name) => self.left_out.foreign += values.count() as u64,
                None => return Err(broken(Rule::IdentityType)),
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: IdentityType, value: &Value) -> Result<(), InvalidLine> {
        let broken = |rule| InvalidLine::field(format!("identities.{kind}"), rule);
        let text = text_of(value).ok_or_else(|| broken(Rule::IdentityValue))?;
        match Identity::new(kind, IdentityFormat::Raw, &text, self.denied) {
            Ok(identity) => {
                if self.seen.insert(identity) {
                    self.taken.push((kind, text));
                }
            }
            Err(InvalidIdentity::Nul) => return Err(broken(Rule::Nul)),
            Err(InvalidIdentity::NoAddress) => self.left_out.addresses += 1,
            Err(InvalidIdentity::NamesNobody | InvalidIdentity::NoDigest) => self.left_out.nobody += 1,
        }
        Ok(())
    }
}

const fn rule_of(error: &InvalidJson) -> Rule {
    match error {
        InvalidJson::DuplicateKey { .. } => Rule::DuplicateKey,
        InvalidJson::NotUtf8 { .. } | InvalidJson::Utf16 | InvalidJson::Malformed { .. } => Rule::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn profile(line: &str) -> Result<ProfileLine, InvalidLine> {
        ProfileLine::parse(line, &DeniedValues::default())
    }

    fn refusal(line: &str) -> (String, Rule) {
        let invalid = profile(line).unwrap_err();
        (invalid.field.into_owned(), invalid.rule)
    }

    #[test]
    fn profiles_are_read_as_real_systems_export_them() {
        let identities = |line: &str| -> Vec<(String, String)> {
            let taken = profile(line).unwrap().identities;
            taken.into_iter().map(|(kind, value)| (kind.to_string(), value)).collect()
        };
        let pair = |kind: &str, value: &str| (kind.to_owned(), value.to_owned());
        let text = r#"{"mpid":"-3718039598335680576","identities":{"email":"ada@example.com"}}"#;
        assert_eq!(profile(text).unwrap().mpid, Mpid(-3_718_039_598_335_680_576));
        assert_eq!(
            identities(
                r#"{"mpid":1,"identities":{"customer_id":48151623,"ios_idfv":"V","email":["b@x.example","a@x.example",null]}}"#
            ),
            [
                pair("controller_customer_id", "48151623"),
                pair("email", "b@x.example"),
                pair("email", "a@x.example"),
                pair("ios_vendor_id", "V"),
            ]
        );
        assert_eq!(identities(r#"{"mpid":1,"identities":{"email":["A@x.example"," a@X.example"]}}"#).len(), 1);
        for empty in ["null", "[]", "[ ]", "{}"] {
            let line = format!(r#"{{"mpid":1,"identities":{empty},"attributes":{empty},"audiences":{empty}}}"#);
            let read = profile(&line).unwrap();
            assert_eq!((read.attributes.as_str(), read.identities.len()), ("{}", 0));
        }
    }

    #[test]
    fn what_names_nobody_and_what_no_request_can_name_is_left_out_and_counted() {
        let line = r#"{"mpid":-5,"identities":{"email":["a@example.com","b @example.com"],"android_id":"","other":null,
            "other2":["unknown",[],"x"],"google":"1","facebook":null},"attributes":{"a":1}}"#;
        assert_eq!(refusal(line), ("identities.other2".to_owned(), Rule::IdentityValue));
        let parsed = profile(&line.replace("[],", "")).unwrap();
        assert_eq!((parsed.mpid, parsed.identities.len()), (Mpid(-5), 2));
        assert_eq!(parsed.left_out, LeftOut { nobody: 2, addresses: 1, foreign: 1 });
        assert_eq!((parsed.attributes.as_str(), parsed.audiences.as_str()), (r#"{"a":1}"#, "[]"));
    }

    #[test]
    fn a_profile_that_cannot_be_taken_is_named_by_field_and_rule() {
        for (line, field, rule) in [
            (r#"{"mpid":1,"identities":{"shoe_size":"44"}}"#, "identities", Rule::IdentityType),
            (r#"{"mpid":1,"identities":{"email":"a@x","email":"b@x"}}"#, "identities", Rule::DuplicateKey),
            (r#"{"mpid":1,"mpid":2}"#, "mpid", Rule::DuplicateKey),
            (r#"{"mpid":1,"secret":2,"secret":3}"#, "", Rule::DuplicateKey),
            (r#"{"mpid":1,"attributes":{"a":{"b":1,"b":2}}}"#, "attributes", Rule::DuplicateKey),
            (r#"{"mpid":1.107E3}"#, "mpid", Rule::Mpid),
            (r#"{"mpid":14728704475373871040}"#, "mpid", Rule::Mpid),
            (r#"{"mpid":null}"#, "mpid", Rule::Mpid),
            (r#"{"identities":{}}"#, "mpid", Rule::MissingMpid),
            (r#"{"mpid":1,"identities":"x"}"#, "identities", Rule::Identities),
            (r#"{"mpid":1,"identities":{"email":{}}}"#, "identities.email", Rule::IdentityValue),
            (r#"{"mpid":1,"identities":{"other":4.8E7}}"#, "identities.other", Rule::IdentityValue),
            (r#"{"mpid":1,"identities":{"other":"a\u0000"}}"#, "identities", Rule::Nul),
            (r#"{"mpid":1,"attributes":{"a":"\ud83d"}}"#, "attributes", Rule::LoneSurrogate),
            (r#"{"mpid":1,"audiences":[1e200000]}"#, "audiences", Rule::NumberRange),
            ("[]", "", Rule::Array),
            ("7", "", Rule::NotObject),
            (r#"{"mpid":1} x"#, "", Rule::Malformed),
            ("{\"mpid\":1,\r\"x\":1}", "", Rule::CarriageReturn),
        ] {
            assert_eq!(refusal(line), (field.to_owned(), rule), "{line}");
        }
        assert_eq!(profile(r#"{"mpid":1.107E3}"#).unwrap_err().column, Some(9));
        let invalid = profile(r#"{"mpid":1012,"attributes":{"bio":"before\u0000after"}}"#).unwrap_err();
        assert_eq!(
            invalid.to_string(),
            "attributes holds the character U+0000, which PostgreSQL cannot store (column 41)"
        );
    }

    #[test]
    fn event_batches_stay_verbatim() {
        let line = r#"{"mpid": "9007199254740993",  "timestamp_unixtime_ms":1400000000000, "x":"\u00e4\\n"}"#;
        let parsed = EventBatchLine::parse(line).unwrap();
        assert_eq!((parsed.mpid, parsed.body.as_str()), (Mpid(9_007_199_254_740_993), line));
        for fine in [r#"{"mpid":1,"a":"x\u0000","b":"\ud83d","n":1e9999999,"\udc00":0}"#, r#"{"mpid":1,"a":1,"a":2}"#] {
            assert_eq!(EventBatchLine::parse(fine).unwrap().body, fine);
        }
        let deep = format!(r#"{{"mpid":7,"x":{}{}}}"#, "[".repeat(20_000), "]".repeat(20_000));
        for (bad, rule) in [
            (r#"{"x":1}"#, Rule::MissingMpid),
            ("[1]", Rule::Array),
            (r#"{"mpid":1,"mpid":1}"#, Rule::DuplicateKey),
            ("{\"mpid\":7,\r\"n\":3}", Rule::CarriageReturn),
            (&deep, Rule::TooDeep),
        ] {
            assert_eq!(EventBatchLine::parse(bad).unwrap_err().rule, rule, "{bad:.40}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(text in r#"[\\{}\\[\\]",:0-9eE+.a-f\\\\u é-]{0,60}"#, field in 0..4_usize) {
            let field = ["mpid", "identities", "attributes", "audiences"][field];
            for line in [format!(r#"{{"mpid":1,"{field}":{text}}}"#), format!(r#"{{"mpid":1,"{field}":["{text}"]}}"#), text] {
                let _ = profile(&line);
                let _ = EventBatchLine::parse(&line);
            }
        }
    }
}
