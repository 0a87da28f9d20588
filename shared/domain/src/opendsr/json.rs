//! JSON as OpenDSR needs it: a duplicate key is an error (two readers would see two different requests).

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Parses one JSON document. Integers keep all 64 bits; a byte order mark in front is left out. Numbers out of range and
/// halves of surrogate pairs are not an error here: the fields that are read refuse them, in others they do not matter.
///
/// # Errors
/// What is wrong and where (line and column), never a value of the document.
pub fn parse(bytes: &[u8]) -> Result<Value, InvalidJson> {
    if is_utf16(bytes) {
        return Err(InvalidJson::Utf16);
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| InvalidJson::NotUtf8 { position: error.valid_up_to() })?;
    match parse_strictly(text) {
        Err(InvalidJson::Malformed { .. }) => parse_strictly(&readable(text)),
        result => result,
    }
}

fn parse_strictly(text: &str) -> Result<Value, InvalidJson> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict.deserialize(&mut deserializer).map_err(|error| InvalidJson::of(&error))?;
    deserializer.end().map_err(|error| InvalidJson::of(&error))?;
    Ok(value)
}

/// What some programs put in front of UTF-8. RFC 8259 lets a reader ignore it.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Whether bytes are UTF-16, with a byte order mark or without one: JSON begins with two characters of ASCII.
#[must_use]
pub fn is_utf16(bytes: &[u8]) -> bool {
    matches!(bytes, [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 1..=0x7f, ..] | [1..=0x7f, 0, ..])
}

/// The same text with what JSON allows and Rust cannot hold in other words of the same length, so that places stay: a
/// number beyond all floats becomes a large one, half of a surrogate pair becomes U+0000. No field of ours takes either.
fn readable(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let (length, replacement) = match (in_string, first) {
            (true, '\\') => escape(rest),
            (false, '-' | '0'..='9') => number(rest),
            _ => {
                in_string ^= first == '"';
                (first.len_utf8(), None)
            }
        };
        let (piece, left) = rest.split_at(length);
        match replacement {
            Some(replacement) => written.extend([replacement, &" ".repeat(length - replacement.len())]),
            None => written.push_str(piece),
        }
        rest = left;
    }
    written
}

/// The length of the escape at the start of `text`, and what to write in its place.
fn escape(text: &str) -> (usize, Option<&'static str>) {
    match unit(text) {
        Some(0xd800..=0xdbff) if text.get(6..).and_then(unit).is_some_and(|low| (0xdc00..=0xdfff).contains(&low)) => {
            (12, None)
        }
        Some(0xd800..=0xdfff) => (6, Some("\\u0000")),
        Some(_) => (6, None),
        None => (1 + text.chars().nth(1).map_or(0, char::len_utf8), None),
    }
}

/// The UTF-16 unit of `\uXXXX` at the start of `text`.
#[must_use]
pub fn unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    let is_hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hexadecimal.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

fn number(text: &str) -> (usize, Option<&'static str>) {
    let is_part = |character: char| character.is_ascii_digit() || matches!(character, '+' | '-' | '.' | 'e' | 'E');
    let length = text.find(|character| !is_part(character)).unwrap_or(text.len());
    let is_out_of_range = text[..length].parse::<f64>().is_ok_and(f64::is_infinite);
    // The shortest number out of range is as long as this one.
    (length, is_out_of_range.then_some("9e300"))
}

/// Why a body is not a JSON document that we take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidJson {
    /// The bytes are UTF-16.
    #[error("the body is UTF-16; send it as UTF-8")]
    Utf16,
    /// The bytes are not UTF-8.
    #[error("the body is not UTF-8 (byte {position})")]
    NotUtf8 {
        /// Index of the first offending byte.
        position: usize,
    },
    /// A key stands twice in one object.
    #[error("a key appears twice in one object (line {line}, column {column})")]
    DuplicateKey {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// Not well-formed, or nested deeper than 128 levels.
    #[error("the body is not well-formed JSON (line {line}, column {column})")]
    Malformed {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
}

const DUPLICATE: &str = "duplicate key";

impl InvalidJson {
    fn of(error: &serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        // The message of serde_json may quote the document; only our own marker is read from it.
        if error.is_data() && error.to_string().starts_with(DUPLICATE) {
            Self::DuplicateKey { line, column }
        } else {
            Self::Malformed { line, column }
        }
    }
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(DUPLICATE));
            }
            object.insert(key, entries.next_value_seed(Strict)?);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_duplicate_key_is_refused_at_any_depth() {
        let nested = br#"{"a":[{"b":1,"c":{"b":2}},{"d":1,"d":2}]}"#;
        assert!(matches!(parse(nested), Err(InvalidJson::DuplicateKey { line: 1, .. })));
        assert!(parse(br#"{"a":[{"b":1},{"b":2}]}"#).is_ok());
    }

    #[test]
    fn integers_keep_all_bits() {
        let value = parse(b"[-3718039598335680576,9007199254740993,18446744073709551615]").unwrap();
        assert_eq!(value.to_string(), "[-3718039598335680576,9007199254740993,18446744073709551615]");
    }

    #[test]
    fn trouble_is_named_without_the_value() {
        assert_eq!(parse(b"{\"a\":\xff}"), Err(InvalidJson::NotUtf8 { position: 5 }));
        let message = parse(br#"{"email":"ada@example.com" x}"#).unwrap_err().to_string();
        assert!(message.contains("column") && !message.contains("ada"), "{message}");
        assert!(parse(b"{} {}").is_err());
        assert!(parse("[".repeat(100_000).as_bytes()).is_err(), "deep nesting ends in an error, not in the stack");
    }

    #[test]
    fn a_byte_order_mark_is_left_out_and_utf16_is_named() {
        assert_eq!(parse(b"\xef\xbb\xbf{\"a\":1}").unwrap().to_string(), r#"{"a":1}"#);
        for text in [&b"\xff\xfe{\0}\0"[..], b"\xfe\xff\0{\0}", b"{\0}\0", b"\0{\0}"] {
            assert_eq!(parse(text), Err(InvalidJson::Utf16));
        }
    }

    #[test]
    fn what_rust_cannot_hold_spoils_nothing_else() {
        let value =
            parse(br#"{"a":[1e400,-12e+999,1E400],"b":"x\ud83d\u0041\ude00","c":"\ud83d\ude00 1e400","\ud800":2}"#);
        let value = value.unwrap();
        assert_eq!(value["a"].as_array().map(Vec::len), Some(3));
        assert_eq!((&value["b"], &value["c"]), (&"x\0A\0".into(), &"😀 1e400".into()));
        assert_eq!(parse(b"[1e400,x]"), Err(InvalidJson::Malformed { line: 1, column: 8 }), "places stay");
        assert!(parse(br#"{"a":1e400e1}"#).is_err() && parse(br#"{"a":"\ud83"}"#).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_made_readable_keeps_its_length(text in r#"["\\\\ud83e0-9é.+{}, -]{0,60}"#) {
            prop_assert_eq!(readable(&text).len(), text.len());
        }
    }
}
