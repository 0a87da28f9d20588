//! From the bytes of a body to a valid [`SubjectRequest`], for v1, v2 and v3 (contract 4).
//!
//! Liberal where the meaning is clear (numbers as strings, booleans as strings, unpadded dates, upper-case UUIDs),
//! strict where a guess could name the wrong person. Every problem is collected, so that one answer tells all.

use serde_json::Value;

use super::error::ApiError;
use super::json;
use super::named::{MAX_IDENTITIES, Named};
use super::nobody::DeniedValues;
use super::read::{Object, Problems, object_or_absent, present, read_skip, read_time, version_of};
use super::request::{ApiVersion, Regulation, SubjectRequest};
use crate::opendsr::callback_url::AddressPolicy;
use crate::request::{RequestType, SubjectRequestId};

/// The largest body that is read, in bytes.
pub const MAX_BODY: usize = 1 << 20;
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
            return Err(ApiError::new(413, format!("a request may name at most {MAX_IDENTITIES} identities")));
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
        let submitted_time = problems.required(
            object,
            "submitted_time",
            "an RFC 3339 time or an ISO date, in the years 1 to 9999",
            |value| read_time(value.as_str()?),
        );
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

        let mut named = Named { denied: &self.denied, identities: Vec::new(), mpids: Vec::new(), problems };
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
            problems.add("extensions", "mpid_not_alone", "must not name an mpid together with other identities");
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
                // No URL has one; the reader of JSON puts it in the place of what it cannot read.
                Some(_) if entry.as_str().is_some_and(|text| text.contains('\0')) => {
                    problems.add(format!("{FIELD}[{index}]"), "callback_url", "must not contain the character NUL");
                }
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

    /// Reads our extension into `named`; returns `skip_waiting_period`, which clients of version 3 also put beside it.
    fn extension(&self, object: &Object, version: ApiVersion, named: &mut Named<'_>) -> bool {
        let mut skip = version == ApiVersion::V3 && read_skip(object, "", named.problems);
        let Some(extensions) = object_or_absent(object, "extensions", "extensions", named.problems) else {
            return skip;
        };
        for domain in self.extension_domains.iter().filter(|domain| extensions.contains_key(*domain)) {
            let field = format!("extensions.{domain}");
            let Some(ours) = object_or_absent(extensions, domain, &field, named.problems) else { continue };
            skip |= read_skip(ours, &format!("{field}."), named.problems);
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

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
