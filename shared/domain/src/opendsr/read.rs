//! Reading single fields of a body: liberal where the meaning is clear (contract 4).

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::error::FieldError;
use super::request::ApiVersion;
use crate::request::Mpid;

pub(crate) type Object = Map<String, Value>;

/// The version by `api_version`, and where that is absent by the path or the shape.
pub(crate) fn version_of(object: &Object, path: Option<ApiVersion>, problems: &mut Problems) -> ApiVersion {
    let by_shape = match object.get("subject_identities") {
        Some(Value::Object(_)) => ApiVersion::V3,
        _ if object.contains_key("regulation") => ApiVersion::V2,
        _ => ApiVersion::V1,
    };
    // Only one version is right here; to name the others would lead astray.
    let rule = path.unwrap_or(by_shape).as_str();
    let is_blank = |value: &Value| value.as_str().is_some_and(|text| text.trim().is_empty());
    let given = object.get("api_version").filter(|value| !is_blank(value));
    let stated = problems.read(given, "api_version", rule, |value| {
        let text = match value {
            Value::String(text) => text.trim().to_owned(),
            Value::Number(number) => number.to_string(),
            _ => return None,
        };
        // The draft of OpenGDPR that some clients were written to.
        let is_draft = text == "0.1" && path.is_none_or(|path| path == ApiVersion::V1);
        if is_draft { Some(ApiVersion::V1) } else { text.parse().ok() }
    });
    if let (Some(stated), Some(path)) = (stated, path)
        && stated != path
    {
        problems.add("api_version", "contradiction", "contradicts the version in the path");
    }
    path.or(stated).unwrap_or(by_shape)
}

pub(crate) fn present<'a>(object: &'a Object, field: &str) -> Option<&'a Value> {
    object.get(field).filter(|value| !value.is_null())
}

/// Whether a field is empty where an object is expected. Languages that have one type for both write an empty object as
/// an empty list.
pub(crate) fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

/// The object in a field; `path` names it in the error where it is something else.
pub(crate) fn object_or_absent<'a>(
    object: &'a Object,
    field: &str,
    path: &str,
    problems: &mut Problems,
) -> Option<&'a Object> {
    let value = object.get(field).filter(|value| !is_empty(value))?;
    if value.as_object().is_none() {
        problems.add(path, "invalid", "must be an object");
    }
    value.as_object()
}

/// `skip_waiting_period` of an object; `prefix` stands before its name in an error.
pub(crate) fn read_skip(object: &Object, prefix: &str, problems: &mut Problems) -> bool {
    let Some(value) = present(object, "skip_waiting_period") else { return false };
    let flag = read_bool(value);
    if flag.is_none() {
        problems.add(format!("{prefix}skip_waiting_period"), "invalid", "must be a boolean");
    }
    flag.unwrap_or(false)
}

fn read_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

#[must_use]
pub fn read_mpid(value: &Value) -> Option<Mpid> {
    match value {
        Value::Number(number) => number.as_i64().map(Mpid),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// RFC 3339; without a zone UTC; or a date, whose month and day may lack the leading zero, as midnight UTC. To the
/// microsecond, and within the years that PostgreSQL and every client can write.
pub(crate) fn read_time(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    let instant = read_rfc3339(text).or_else(|| read_zoneless(text)).or_else(|| read_date(text))?;
    let year = instant.to_zoned(TimeZone::UTC).year();
    (1..=9999).contains(&year).then(|| Timestamp::from_microsecond(instant.as_microsecond()).ok()).flatten()
}

/// With a zone that is less than a day away, as RFC 3339 has it.
fn read_rfc3339(text: &str) -> Option<Timestamp> {
    let instant = text.parse::<Timestamp>().ok()?;
    let hours = text.get(10..)?.rsplit_once(['+', '-']).and_then(|(_, offset)| offset.get(..2)?.parse::<u8>().ok());
    hours.is_none_or(|hours| hours < 24).then_some(instant)
}

/// A date and a time of day, and nothing that could be a zone: one that cannot be read is not UTC.
fn read_zoneless(text: &str) -> Option<Timestamp> {
    let (date, time) = text.split_once(['T', 't', ' '])?;
    let is_plain = |text: &str, others: &[u8]| text.bytes().all(|byte| byte.is_ascii_digit() || others.contains(&byte));
    if !is_plain(date, b"-") || !is_plain(time, b":.,") {
        return None;
    }
    Some(text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

fn read_date(text: &str) -> Option<Timestamp> {
    let mut parts = text.split('-');
    let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
    let two_digits = |part: &str| (1..=2).contains(&part.len()).then(|| part.parse().ok()).flatten();
    if parts.next().is_some() || year.len() != 4 {
        return None;
    }
    let date = Date::new(year.parse().ok()?, two_digits(month)?, two_digits(day)?).ok()?;
    Some(date.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

/// What is wrong with a request, field by field.
#[derive(Default)]
pub(crate) struct Problems {
    pub(crate) errors: Vec<FieldError>,
    pub(crate) too_many: bool,
}

/// More errors than these tell nobody more.
const MAX_ERRORS: usize = 20;

impl Problems {
    pub(crate) fn add(&mut self, field: impl Into<String>, reason: &'static str, rule: &str) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(FieldError::new(field, reason, rule));
        }
    }

    pub(crate) fn required<T>(
        &mut self,
        object: &Object,
        field: &'static str,
        rule: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        if present(object, field).is_none() {
            self.add(field, "required", &format!("is required: {rule}"));
            return None;
        }
        self.optional(object, field, rule, read)
    }

    pub(crate) fn optional<T>(
        &mut self,
        object: &Object,
        field: &'static str,
        rule: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        self.read(object.get(field), field, rule, read)
    }

    /// The same for a field that was looked up already.
    pub(crate) fn read<T>(
        &mut self,
        value: Option<&Value>,
        field: &'static str,
        rule: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = value.filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.add(field, "invalid", &format!("must be {rule}"));
        }
        read
    }
}
