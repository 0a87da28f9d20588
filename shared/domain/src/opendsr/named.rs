//! Whom a request names: the identities and mpids of all three shapes (contract 4).

use serde_json::Value;

use super::identity::{Identity, text_of};
use super::identity_type::{IdentityFormat, IdentityType};
use super::nobody::DeniedValues;
use super::read::{Problems, is_empty, present, read_mpid};
use crate::request::Mpid;

/// The largest number of identities and mpids of one request.
pub(crate) const MAX_IDENTITIES: usize = 5_000;

/// Collects whom a request names.
pub(super) struct Named<'a> {
    pub(super) denied: &'a DeniedValues,
    pub(super) identities: Vec<Identity>,
    pub(super) mpids: Vec<Mpid>,
    pub(super) problems: &'a mut Problems,
}

impl Named<'_> {
    /// Whether one more fits; too many is an error of its own (413).
    fn has_room(&mut self) -> bool {
        let room = self.identities.len() + self.mpids.len() < MAX_IDENTITIES;
        self.problems.too_many |= !room;
        room
    }

    /// The shape of v1 and v2: a list of `identity_type`, `identity_value`, `identity_format`.
    pub(super) fn list(&mut self, field: &str, value: &Value, standard: bool) {
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
    pub(super) fn map(&mut self, field: &str, value: &Value, standard: bool) {
        if is_empty(value) {
            return;
        }
        let Some(map) = value.as_object() else {
            return self.problems.add(field, "invalid", "must be an object of identity types with value and encoding");
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

    pub(super) fn mpid_list(&mut self, field: &str, value: &Value) {
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
            let names = IdentityType::names(standard);
            let rule = if standard {
                format!(
                    "names an identity type that is not in OpenDSR, which has {names} (others belong in the extension)"
                )
            } else {
                format!("names an unknown identity type; the known ones are {names}")
            };
            return self.problems.add(field, "identity_type", &rule);
        };
        let Some(text) = value.and_then(text_of) else {
            return self.problems.add(format!("{field}.{value_field}"), "required", "is required: a string");
        };
        match Identity::new(identity_type, format, &text, self.denied) {
            Ok(identity) => self.identities.push(identity),
            Err(refusal) => self.problems.add(format!("{field}.{value_field}"), "identity_value", &refusal.to_string()),
        }
    }
}
