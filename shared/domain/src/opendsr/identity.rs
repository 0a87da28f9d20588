//! Identities: their types and the formats they come in (contract 4).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::identity_type::{IdentityFormat, IdentityType};
use super::nobody::DeniedValues;
use crate::crypto;

/// One identity of a data subject, in normal form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// What it is.
    pub identity_type: IdentityType,
    /// How `value` is encoded.
    pub format: IdentityFormat,
    /// The normalised value, or the digest of one in lower-case hex.
    pub value: String,
}

/// An identity that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Empty, a placeholder such as `null` or `unknown`, an all-zero id, or on the deny list: it would match strangers.
    #[error("names nobody (empty, a placeholder such as null, all zeros, or on the deny list)")]
    NamesNobody,
    /// The digest has the wrong length or other characters than hexadecimal digits.
    #[error("is not a hexadecimal digest of the stated format")]
    NoDigest,
    /// A NUL character, which no store can hold. The reader of JSON puts one in the place of half a surrogate pair.
    #[error("must not contain the character NUL or half of a surrogate pair")]
    Nul,
    /// A raw e-mail address with characters inside that none has; it would be matched with nobody, and nobody would know.
    #[error("must not contain white space, control or format characters inside an e-mail address")]
    NoAddress,
}

/// The text of an identity's value: customer ids are often numbers, and there is one way to write an integer.
#[must_use]
pub fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) if !number.is_f64() => Some(number.to_string()),
        _ => None,
    }
}

/// Characters that are not seen, or separate: Unicode's categories Cc, Cf, Z. Those of Cf are spelled out, since the
/// standard library does not know them.
fn is_invisible(character: char) -> bool {
    character.is_control()
        || character.is_whitespace()
        || matches!(character,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}')
}

impl Identity {
    /// Brings `value` into normal form and refuses what names nobody.
    ///
    /// # Errors
    /// [`InvalidIdentity`].
    pub fn new(
        identity_type: IdentityType,
        format: IdentityFormat,
        value: &str,
        denied: &DeniedValues,
    ) -> Result<Self, InvalidIdentity> {
        let value = match format.hex_digits() {
            None => identity_type.normalise(value),
            Some(digits) => {
                let digest = value.trim().to_ascii_lowercase();
                if digest.len() != digits || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(InvalidIdentity::NoDigest);
                }
                digest
            }
        };
        if value.contains('\0') {
            return Err(InvalidIdentity::Nul);
        }
        if denied.contains(identity_type, format, &value) {
            return Err(InvalidIdentity::NamesNobody);
        }
        let is_address = identity_type == IdentityType::Email && format == IdentityFormat::Raw;
        if is_address && value.chars().any(is_invisible) {
            return Err(InvalidIdentity::NoAddress);
        }
        Ok(Self { identity_type, format, value })
    }
}

impl Identity {
    /// What it is found by: the key of the digest that it is, or of the SHA-256 of its value, and which of the two it is. Sixteen
    /// bytes of the SHA-256 over its type and that digest in hex, as `lethe.identity_key` has it. `None` for what
    /// [`Self::new`] never makes.
    #[must_use]
    pub fn key(&self) -> Option<(IdentityFormat, Uuid)> {
        let (kind, digest) = match self.format {
            IdentityFormat::Raw => (IdentityFormat::Sha256, Cow::Owned(IdentityFormat::Sha256.encode(&self.value))),
            format => (format, Cow::Borrowed(self.value.as_str())),
        };
        let over = crypto::sha256(format!("{} {digest}", self.identity_type.as_str()).as_bytes());
        Some((kind, Uuid::from_slice(over.get(..16)?).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(format: IdentityFormat, value: &str) -> Result<Identity, InvalidIdentity> {
        Identity::new(IdentityType::Email, format, value, &DeniedValues::new(["test@example.com"]))
    }

    #[test]
    fn mail_is_lower_cased_in_ascii_only() {
        assert_eq!(identity(IdentityFormat::Raw, " ÀDA@Example.COM\n").unwrap().value, "Àda@example.com");
        assert_eq!(IdentityType::Other.normalise("\tMiXed "), "MiXed");
    }

    #[test]
    fn an_address_with_what_cannot_be_seen_is_refused() {
        for odd in [
            "\u{200b}ada@example.com",
            "ada@example.com\u{a0}",
            "a da@example.com",
            "ada\t@example.com",
            "\u{feff}ada@example.com",
            "\u{200f}ada@example.com",
            "ada@example.com\u{2028}",
            "ada\u{7}@example.com",
        ] {
            assert_eq!(identity(IdentityFormat::Raw, odd), Err(InvalidIdentity::NoAddress), "{odd:?}");
        }
        for fine in ["josé@example.com", "jose\u{301}@example.com", " ada@example.com\r\n", "ada@bücher.example"] {
            assert!(identity(IdentityFormat::Raw, fine).is_ok(), "{fine:?}");
        }
        let customer = Identity::new(
            IdentityType::ControllerCustomerId,
            IdentityFormat::Raw,
            "Ada\u{a0}L",
            &DeniedValues::default(),
        );
        assert!(customer.is_ok(), "other types are the controller's own");
    }

    #[test]
    fn digests_have_their_length() {
        assert_eq!(identity(IdentityFormat::Md5, "abc"), Err(InvalidIdentity::NoDigest));
        assert_eq!(identity(IdentityFormat::Sha1, &"z".repeat(40)), Err(InvalidIdentity::NoDigest));
        assert_eq!(identity(IdentityFormat::Md5, &"AB".repeat(16)).unwrap().value, "ab".repeat(16));
    }

    #[test]
    fn digests_are_the_well_known_ones() {
        assert_eq!(IdentityFormat::Md5.encode(""), "d41d8cd98f00b204e9800998ecf8427e");
        assert_eq!(IdentityFormat::Sha1.encode(""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        assert!(IdentityFormat::Sha256.encode("").starts_with("e3b0c44298fc1c14"));
    }

    #[test]
    fn names_and_aliases() {
        assert_eq!(IdentityType::named("roku_publishing_id"), Some(IdentityType::RokuPublisherId));
        assert_eq!(IdentityType::named("phone_number_2"), Some(IdentityType::PhoneNumber2));
        assert_eq!(IdentityType::named("customer_id"), Some(IdentityType::ControllerCustomerId));
        assert_eq!(IdentityType::named("ios_idfv"), Some(IdentityType::IosVendorId));
        assert!(IdentityType::named("google").is_none() && IdentityType::is_foreign("google"));
        assert_eq!(IdentityType::named("Email"), None);
        assert!(IdentityType::RokuPublisherId.is_standard() && !IdentityType::Other.is_standard());
        for &kind in IdentityType::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
