//! Identities: their types and the formats they come in (contract 4).

use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::nobody::DeniedValues;
use crate::crypto;
use crate::request::status::names;

/// What kind of identity a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is the identity type of OpenDSR of the same name")]
pub enum IdentityType {
    ControllerCustomerId,
    Email,
    AndroidAdvertisingId,
    AndroidId,
    FireAdvertisingId,
    IosAdvertisingId,
    IosVendorId,
    MicrosoftAdvertisingId,
    MicrosoftPublisherId,
    RokuAdvertisingId,
    RokuPublisherId,
    Other,
    Other2,
    Other3,
    Other4,
    Other5,
    Other6,
    Other7,
    Other8,
    Other9,
    Other10,
    MobileNumber,
    #[serde(rename = "phone_number_2")]
    PhoneNumber2,
    #[serde(rename = "phone_number_3")]
    PhoneNumber3,
}
names!(
    IdentityType,
    "identity type",
    ControllerCustomerId = "controller_customer_id",
    Email = "email",
    AndroidAdvertisingId = "android_advertising_id",
    AndroidId = "android_id",
    FireAdvertisingId = "fire_advertising_id",
    IosAdvertisingId = "ios_advertising_id",
    IosVendorId = "ios_vendor_id",
    MicrosoftAdvertisingId = "microsoft_advertising_id",
    MicrosoftPublisherId = "microsoft_publisher_id",
    RokuAdvertisingId = "roku_advertising_id",
    RokuPublisherId = "roku_publisher_id",
    Other = "other",
    Other2 = "other2",
    Other3 = "other3",
    Other4 = "other4",
    Other5 = "other5",
    Other6 = "other6",
    Other7 = "other7",
    Other8 = "other8",
    Other9 = "other9",
    Other10 = "other10",
    MobileNumber = "mobile_number",
    PhoneNumber2 = "phone_number_2",
    PhoneNumber3 = "phone_number_3"
);

impl IdentityType {
    /// The type of that name, aliases included: `roku_publishing_id`, `other1` of published examples, and the names that
    /// mParticle itself gives to these types. One rule for requests and import.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "customer_id" | "customerid" => Self::ControllerCustomerId,
            "android_aaid" | "google_aaid" => Self::AndroidAdvertisingId,
            "android_uuid" => Self::AndroidId,
            "fire_aid" => Self::FireAdvertisingId,
            "ios_idfa" => Self::IosAdvertisingId,
            "ios_idfv" => Self::IosVendorId,
            "microsoft_aid" => Self::MicrosoftAdvertisingId,
            "roku_aid" => Self::RokuAdvertisingId,
            "roku_publishing_id" => Self::RokuPublisherId,
            "other1" => Self::Other,
            _ => return name.parse().ok(),
        })
    }

    /// Whether mParticle has identities of that name that no request can name: profiles bring them along.
    #[must_use]
    pub fn is_foreign(name: &str) -> bool {
        const FOREIGN: [&str; 9] = [
            "alias",
            "device_application_stamp",
            "facebook",
            "facebook_custom_audience_id",
            "google",
            "microsoft",
            "push_token",
            "twitter",
            "yahoo",
        ];
        FOREIGN.contains(&name)
    }

    /// The names of all types, for messages; only those of OpenDSR itself where `standard`.
    #[must_use]
    pub fn names(standard: bool) -> String {
        let names: Vec<&str> =
            Self::ALL.iter().filter(|kind| !standard || kind.is_standard()).map(|kind| kind.as_str()).collect();
        names.join(", ")
    }

    /// Whether the type may stand in `subject_identities` itself, or in the extension only.
    #[must_use]
    pub fn is_standard(self) -> bool {
        self <= Self::RokuPublisherId
    }

    /// A raw value in its normal form: ASCII white space trimmed; e-mail lower-cased as well, ASCII only.
    /// The database has the same definition (`lethe.normalise_identity`); a test holds the two together.
    #[must_use]
    pub fn normalise(self, value: &str) -> String {
        let trimmed = value.trim_matches([' ', '\t', '\n', '\r', '\u{c}', '\u{b}']);
        if self == Self::Email { trimmed.to_ascii_lowercase() } else { trimmed.to_owned() }
    }
}

/// How a value is encoded (`identity_format` of v1 and v2, `encoding` of v3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentityFormat {
    /// As it is.
    Raw,
    /// SHA-256 of the normalised value, hex.
    Sha256,
    /// SHA-1 of the normalised value, hex.
    Sha1,
    /// MD5 of the normalised value, hex.
    Md5,
}
names!(IdentityFormat, "identity format", Raw = "raw", Sha256 = "sha256", Sha1 = "sha1", Md5 = "md5");

impl IdentityFormat {
    /// The number of hexadecimal digits of a digest; `None` for raw.
    #[must_use]
    pub const fn hex_digits(self) -> Option<usize> {
        match self {
            Self::Raw => None,
            Self::Sha256 => Some(64),
            Self::Sha1 => Some(40),
            Self::Md5 => Some(32),
        }
    }

    /// `normal` in this format.
    #[must_use]
    pub fn encode(self, normal: &str) -> String {
        match self {
            Self::Raw => normal.to_owned(),
            Self::Sha256 => crypto::hex(&crypto::sha256(normal.as_bytes())),
            Self::Sha1 => crypto::hex(&crypto::sha1(normal.as_bytes())),
            Self::Md5 => crypto::hex(&Md5::digest(normal.as_bytes())),
        }
    }
}

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
    /// What it is found by: the digest that it is, or the SHA-256 of its value. `None` for what [`Self::new`] never makes.
    #[must_use]
    pub fn digest(&self) -> Option<Vec<u8>> {
        if self.format == IdentityFormat::Raw {
            return Some(crypto::sha256(self.value.as_bytes()));
        }
        let digits = self.value.as_bytes().chunks(2);
        digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
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
