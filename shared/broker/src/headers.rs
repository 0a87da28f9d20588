//! Headers of messages.

use lapin::types::AMQPValue;

/// The header that says when a message was dead-lettered.
pub const SET_ASIDE_AT: &str = "set-aside-at";
/// In a copy that we keep: the header with the property `user_id` of the original message.
pub const VERIFIED_USER: &str = "verified-user";

/// A header's value, where it is a text or an integer: clients choose the type by their own rules.
pub(super) fn text_of(value: &AMQPValue) -> Option<String> {
    Some(match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok()?.to_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        AMQPValue::ShortShortInt(number) => number.to_string(),
        AMQPValue::ShortShortUInt(number) => number.to_string(),
        AMQPValue::ShortInt(number) => number.to_string(),
        AMQPValue::ShortUInt(number) => number.to_string(),
        AMQPValue::LongInt(number) => number.to_string(),
        AMQPValue::LongUInt(number) => number.to_string(),
        AMQPValue::LongLongInt(number) => number.to_string(),
        AMQPValue::ByteArray(bytes) => std::str::from_utf8(bytes.as_slice()).ok()?.to_owned(),
        _ => return None,
    })
}
