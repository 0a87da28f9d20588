//! JSON as OpenDSR needs it: a duplicate key is an error (two readers would see two different requests).

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Parses one JSON document. Integers keep all 64 bits.
///
/// # Errors
/// What is wrong and where (line and column), never a value of the document.
pub fn parse(bytes: &[u8]) -> Result<Value, InvalidJson> {
    let text = std::str::from_utf8(bytes).map_err(|error| InvalidJson::NotUtf8 { position: error.valid_up_to() })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict.deserialize(&mut deserializer).map_err(|error| InvalidJson::of(&error))?;
    deserializer.end().map_err(|error| InvalidJson::of(&error))?;
    Ok(value)
}

/// Why a body is no JSON document that we take.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidJson {
    /// The bytes are no UTF-8.
    #[error("the body is not UTF-8 (byte {position})")]
    NotUtf8 {
        /// Index of the first offending byte.
        position: usize,
    },
    /// A key stands twice in one object.
    #[error("a key stands twice in one object (line {line}, column {column})")]
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

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
