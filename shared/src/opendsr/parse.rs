//! From the bytes of a body to a valid [`SubjectRequest`], for v1, v2 and v3 (contract 4).
//!
//! Liberal where the meaning is clear (numbers as strings, booleans as strings, unpadded dates, upper-case UUIDs),
//! strict where a guess could name the wrong person. Every problem is collected, so that one answer tells all.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::error::{ApiError, FieldError};
use super::identity::{DeniedValues, Identity, IdentityFormat, IdentityType};
use super::json;
use super::request::{ApiVersion, Regulation, SubjectRequest};
use crate::callback::address::AddressPolicy;
use crate::request::{Mpid, RequestType, SubjectRequestId};

/// The largest body that is read, in bytes.
pub const MAX_BODY: usize = 1 << 20;
/// The largest number of identities and mpids of one request.
pub(crate) const MAX_IDENTITIES: usize = 5_000;
/// The largest number of callback URLs of one request.
pub(crate) const MAX_CALLBACK_URLS: usize = 16;
/// The largest number of characters of a group id.
pub(crate) const MAX_GROUP_ID: usize = 256;

/// What parsing depends on beside the body: configuration, the same in every process.
#[derive(Clone, Debug)]
pub struct Parser {
    /// The keys under `extensions` that are ours.
    pub extension_domains: Vec<String>,
    /// The values that name nobody.
    pub denied: DeniedValues,
    /// Where callbacks may go.
    pub addresses: AddressPolicy,
}

type Object = Map<String, Value>;

impl Parser {
    /// Parses and validates a request. `path_version` is the version that the path states, where there is a path.
    ///
    /// # Errors
    /// 400 with every field that is wrong, 413 for too large a body or too many identities.
    pub fn request(&self, body: &[u8], path_version: Option<ApiVersion>) -> Result<SubjectRequest, ApiError> {
        let object = parse_object(body)?;
        let mut problems = Problems::default();
        let version = version_of(&object, path_version, &mut problems);
        let request = self.fields(&object, version, &mut problems);
        if problems.too_many {
            return Err(ApiError::new(413, format!("a request holds at most {MAX_IDENTITIES} identities")));
        }
        match request {
            Some(request) if problems.errors.is_empty() => Ok(request),
            _ => Err(ApiError::invalid(problems.errors)),
        }
    }

    /// The version in which to answer a body that was refused: what it states, as far as it can be read.
    #[must_use]
    pub fn version_hint(&self, body: &[u8], path_version: Option<ApiVersion>) -> ApiVersion {
        let read = || parse_object(body).map(|object| version_of(&object, None, &mut Problems::default()));
        path_version.unwrap_or_else(|| read().unwrap_or(ApiVersion::V3))
    }

    fn fields(&self, object: &Object, version: ApiVersion, problems: &mut Problems) -> Option<SubjectRequest> {
        let subject_request_id = problems.required(object, "subject_request_id", "a UUID version 4", |value| {
            value.as_str()?.parse::<SubjectRequestId>().ok()
        });
        let kind = "one of erasure, access, portability";
        let subject_request_type = problems
            .required(object, "subject_request_type", kind, |value| value.as_str()?.parse::<RequestType>().ok());
        let submitted_time = problems
            .required(object, "submitted_time", "an RFC 3339 time or an ISO date", |value| read_time(value.as_str()?));
        let regulation = match version {
            ApiVersion::V1 => None,
            ApiVersion::V2 | ApiVersion::V3 => problems.required(object, "regulation", "one of gdpr, ccpa", |value| {
                value.as_str()?.parse::<Regulation>().ok()
            }),
        };
        let group_id = problems.optional(object, "group_id", "a string of at most 256 characters", |value| {
            let text = value.as_str()?;
            (text.chars().count() <= MAX_GROUP_ID && !text.contains('\0')).then(|| text.to_owned())
        });
        let status_callback_urls = self.callback_urls(object, problems);

        let mut named = Named { parser: self, identities: Vec::new(), mpids: Vec::new(), problems };
        match (version, object.get("subject_identities")) {
            (_, None | Some(Value::Null)) => {}
            (ApiVersion::V1 | ApiVersion::V2, Some(value)) => named.list("subject_identities", value, true),
            (ApiVersion::V3, Some(value)) => named.map("subject_identities", value, true),
        }
        let skip_waiting_period = self.extension(object, version, &mut named);
        let (mut identities, mut mpids) = (named.identities, named.mpids);
        identities.sort();
        identities.dedup();
        mpids.sort();
        mpids.dedup();
        if identities.is_empty() && mpids.is_empty() && problems.errors.is_empty() {
            problems.add("subject_identities", "required", "must name at least one identity");
        }
        if version == ApiVersion::V3 && !mpids.is_empty() && !identities.is_empty() {
            problems.add("extensions", "mpid_not_alone", "must not name an mpid beside other identities");
        }
        Some(SubjectRequest {
            api_version: version,
            regulation,
            subject_request_id: subject_request_id?,
            subject_request_type: subject_request_type?,
            submitted_time: submitted_time?,
            identities,
            mpids,
            skip_waiting_period,
            status_callback_urls,
            group_id,
        })
    }

    fn callback_urls(&self, object: &Object, problems: &mut Problems) -> Vec<String> {
        const FIELD: &str = "status_callback_urls";
        let list = match object.get(FIELD) {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Array(list)) if list.len() <= MAX_CALLBACK_URLS => list,
            Some(_) => {
                problems.add(FIELD, "invalid", "must be a list of at most 16 URLs");
                return Vec::new();
            }
        };
        let mut urls: Vec<String> = Vec::with_capacity(list.len());
        for (index, entry) in list.iter().enumerate() {
            match entry.as_str().map(|text| self.addresses.check(text)) {
                Some(Ok(_)) => {
                    let url = entry.as_str().unwrap_or_default().to_owned();
                    // The same URL twice would only get everything twice.
                    if !urls.contains(&url) {
                        urls.push(url);
                    }
                }
                Some(Err(refusal)) => {
                    problems.add(format!("{FIELD}[{index}]"), "callback_url", &refusal.to_string());
                }
                None => problems.add(format!("{FIELD}[{index}]"), "invalid", "must be a string"),
            }
        }
        urls
    }

    /// Reads our extension into `named`; returns `skip_waiting_period`.
    fn extension(&self, object: &Object, version: ApiVersion, named: &mut Named<'_>) -> bool {
        let extensions = match object.get("extensions") {
            None | Some(Value::Null) => return false,
            Some(Value::Object(extensions)) => extensions,
            Some(_) => {
                named.problems.add("extensions", "invalid", "must be an object");
                return false;
            }
        };
        let mut skip = false;
        for domain in self.extension_domains.iter().filter(|domain| extensions.contains_key(*domain)) {
            let field = format!("extensions.{domain}");
            let Some(Value::Object(ours)) = extensions.get(domain) else {
                named.problems.add(field, "invalid", "must be an object");
                continue;
            };
            if let Some(value) = present(ours, "skip_waiting_period") {
                match read_bool(value) {
                    Some(flag) => skip |= flag,
                    None => named.problems.add(format!("{field}.skip_waiting_period"), "invalid", "must be a boolean"),
                }
            }
            if version == ApiVersion::V3 {
                if let Some(value) = present(ours, "subject_identities") {
                    named.map(&format!("{field}.subject_identities"), value, false);
                }
            } else {
                if let Some(value) = present(ours, "mpids") {
                    named.mpid_list(&format!("{field}.mpids"), value);
                }
                if let Some(value) = present(ours, "identities") {
                    named.list(&format!("{field}.identities"), value, false);
                }
            }
        }
        skip
    }

    /// Parses the body of a cancellation or a status query: `{"subject_request_id":"…"}`.
    ///
    /// # Errors
    /// 400 or 413.
    pub fn subject_request_id(body: &[u8]) -> Result<SubjectRequestId, ApiError> {
        let object = parse_object(body)?;
        let mut problems = Problems::default();
        let id = problems.required(&object, "subject_request_id", "a UUID version 4", |value| {
            value.as_str()?.parse::<SubjectRequestId>().ok()
        });
        id.ok_or_else(|| ApiError::invalid(problems.errors))
    }

    /// Parses the body of a group query: `{"group_id":"…","cursor":"…"}`; the cursor may be absent.
    ///
    /// # Errors
    /// 400 or 413.
    pub fn group_query(body: &[u8]) -> Result<(String, Option<String>), ApiError> {
        let object = parse_object(body)?;
        let mut problems = Problems::default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let group = problems.required(&object, "group_id", "a string", text);
        let cursor = problems.optional(&object, "cursor", "a string", text);
        match group {
            Some(group) if problems.errors.is_empty() => Ok((group, cursor)),
            _ => Err(ApiError::invalid(problems.errors)),
        }
    }
}

fn parse_object(body: &[u8]) -> Result<Object, ApiError> {
    if body.len() > MAX_BODY {
        return Err(ApiError::new(413, "the body is larger than 1 MiB; split the request"));
    }
    match json::parse(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::new(400, "the body must be a JSON object")),
        Err(error) => Err(ApiError::new(400, error.to_string())),
    }
}

/// The version by `api_version`, and where that is absent by the path or the shape.
fn version_of(object: &Object, path: Option<ApiVersion>, problems: &mut Problems) -> ApiVersion {
    let stated = problems.optional(object, "api_version", "1.0, 2.0 or 3.0", |value| match value {
        Value::String(text) => text.parse::<ApiVersion>().ok(),
        Value::Number(number) => number.to_string().parse().ok(),
        _ => None,
    });
    if let (Some(stated), Some(path)) = (stated, path)
        && stated != path
    {
        problems.add("api_version", "contradiction", "contradicts the version in the path");
    }
    path.or(stated).unwrap_or_else(|| match object.get("subject_identities") {
        Some(Value::Object(_)) => ApiVersion::V3,
        _ if object.contains_key("regulation") => ApiVersion::V2,
        _ => ApiVersion::V1,
    })
}

fn present<'a>(object: &'a Object, field: &str) -> Option<&'a Value> {
    object.get(field).filter(|value| !value.is_null())
}

fn read_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

fn read_mpid(value: &Value) -> Option<Mpid> {
    match value {
        Value::Number(number) => number.as_i64().map(Mpid),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// RFC 3339, or a date, whose month and day may lack the leading zero, as midnight UTC. To the microsecond.
fn read_time(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    let instant = text.parse::<Timestamp>().ok().or_else(|| {
        let mut parts = text.split('-');
        let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
        let two_digits = |part: &str| (1..=2).contains(&part.len()).then(|| part.parse().ok()).flatten();
        if parts.next().is_some() || year.len() != 4 {
            return None;
        }
        let date = Date::new(year.parse().ok()?, two_digits(month)?, two_digits(day)?).ok()?;
        date.to_zoned(TimeZone::UTC).ok().map(|midnight| midnight.timestamp())
    })?;
    Timestamp::from_microsecond(instant.as_microsecond()).ok()
}

#[derive(Default)]
struct Problems {
    errors: Vec<FieldError>,
    too_many: bool,
}

/// More errors than these tell nobody more.
const MAX_ERRORS: usize = 20;

impl Problems {
    fn add(&mut self, field: impl Into<String>, reason: &'static str, rule: &str) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(FieldError::new(field, reason, rule));
        }
    }

    fn required<T>(
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

    fn optional<T>(
        &mut self,
        object: &Object,
        field: &'static str,
        rule: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = present(object, field)?;
        let read = read(value);
        if read.is_none() {
            self.add(field, "invalid", &format!("must be {rule}"));
        }
        read
    }
}

/// Collects whom a request names.
struct Named<'a> {
    parser: &'a Parser,
    identities: Vec<Identity>,
    mpids: Vec<Mpid>,
    problems: &'a mut Problems,
}

impl Named<'_> {
    /// Whether one more fits; too many is an error of its own (413).
    fn has_room(&mut self) -> bool {
        let room = self.identities.len() + self.mpids.len() < MAX_IDENTITIES;
        self.problems.too_many |= !room;
        room
    }

    /// The shape of v1 and v2: a list of `identity_type`, `identity_value`, `identity_format`.
    fn list(&mut self, field: &str, value: &Value, standard: bool) {
        let Some(list) = value.as_array() else {
            return self.problems.add(field, "invalid", "must be a list of identities");
        };
        for (index, entry) in list.iter().enumerate() {
            if !self.has_room() {
                return;
            }
            let field = format!("{field}[{index}]");
            let Some(entry) = entry.as_object() else {
                self.problems.add(field, "invalid", "must be an object");
                continue;
            };
            let Some(name) = entry.get("identity_type").and_then(Value::as_str) else {
                self.problems.add(
                    format!("{field}.identity_type"),
                    "required",
                    "is required: the name of an identity type",
                );
                continue;
            };
            let format = present(entry, "identity_format");
            self.identity(&field, "identity_value", name, entry.get("identity_value"), format, standard);
        }
    }

    /// The shape of v3: an object from identity type to `value` and `encoding`.
    fn map(&mut self, field: &str, value: &Value, standard: bool) {
        let Some(map) = value.as_object() else {
            return self.problems.add(field, "invalid", "must be an object from identity type to value and encoding");
        };
        for (name, entry) in map {
            if !self.has_room() {
                return;
            }
            // The key is the controller's text; only names that we know are repeated in an error.
            let known = IdentityType::named(name).is_some() || name == "mpid";
            let field = if known { format!("{field}.{name}") } else { field.to_owned() };
            let Some(entry) = entry.as_object() else {
                self.problems.add(field, "invalid", "must map an identity type to an object with value and encoding");
                continue;
            };
            let format = present(entry, "encoding");
            self.identity(&field, "value", name, entry.get("value"), format, standard);
        }
    }

    fn mpid_list(&mut self, field: &str, value: &Value) {
        let Some(list) = value.as_array() else {
            return self.problems.add(field, "invalid", "must be a list of 64-bit integers");
        };
        for (index, entry) in list.iter().enumerate() {
            if !self.has_room() {
                return;
            }
            match read_mpid(entry) {
                Some(mpid) => self.mpids.push(mpid),
                None => self.problems.add(format!("{field}[{index}]"), "invalid", "must be a 64-bit signed integer"),
            }
        }
    }

    fn identity(
        &mut self,
        field: &str,
        value_field: &str,
        name: &str,
        value: Option<&Value>,
        format: Option<&Value>,
        standard: bool,
    ) {
        let format = match format.map(|format| format.as_str().and_then(|text| text.parse::<IdentityFormat>().ok())) {
            None => IdentityFormat::Raw,
            Some(Some(format)) => format,
            Some(None) => {
                return self.problems.add(field, "format", "has an encoding other than raw, sha256, sha1, md5");
            }
        };
        if name == "mpid" && !standard {
            match value.and_then(read_mpid) {
                Some(mpid) if format == IdentityFormat::Raw => self.mpids.push(mpid),
                _ => self.problems.add(field, "invalid", "must be a 64-bit signed integer in the encoding raw"),
            }
            return;
        }
        let Some(identity_type) = IdentityType::named(name).filter(|kind| !standard || kind.is_standard()) else {
            let rule = if standard {
                "names an identity type that OpenDSR does not know (others belong into the extension)"
            } else {
                "names an unknown identity type"
            };
            return self.problems.add(field, "identity_type", rule);
        };
        let text = match value {
            Some(Value::String(text)) => text.clone(),
            // Customer ids are often numbers; there is one way to write an integer.
            Some(Value::Number(number)) if !number.is_f64() => number.to_string(),
            _ => return self.problems.add(format!("{field}.{value_field}"), "required", "is required: a string"),
        };
        match Identity::new(identity_type, format, &text, &self.parser.denied) {
            Ok(identity) => self.identities.push(identity),
            Err(refusal) => self.problems.add(format!("{field}.{value_field}"), "identity_value", &refusal.to_string()),
        }
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
