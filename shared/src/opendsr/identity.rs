//! Identities: their types, the formats they come in, and the values that name nobody (contract 4).

use std::collections::HashSet;

use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};

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
    /// The type of that name, aliases included (`roku_publishing_id`, and `other1` of published examples).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "roku_publishing_id" => Some(Self::RokuPublisherId),
            "other1" => Some(Self::Other),
            _ => name.parse().ok(),
        }
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
    /// Empty, `null`, an all-zero id, or on the deny list: it would match strangers.
    #[error("names nobody (empty, null, all zeros, or on the deny list)")]
    NamesNobody,
    /// The digest has the wrong length or other characters than hexadecimal digits.
    #[error("is no hexadecimal digest of the stated format")]
    NoDigest,
    /// A NUL character, which no store can hold.
    #[error("must not contain the character NUL")]
    Nul,
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
        if denied.contains(format, &value) {
            return Err(InvalidIdentity::NamesNobody);
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

/// Values that name nobody, as they are and as digests.
#[derive(Clone, Debug)]
pub struct DeniedValues {
    values: HashSet<String>,
}

/// What is denied everywhere: written by software that had no value.
const NOBODY: [&str; 8] = [
    "",
    "null",
    "nil",
    "none",
    "undefined",
    "nan",
    "00000000-0000-0000-0000-000000000000",
    "00000000000000000000000000000000",
];

impl DeniedValues {
    /// The values that are denied everywhere, and `configured` ones beside them (`LETHE_DENIED_IDENTITIES`).
    pub fn new<'a>(configured: impl IntoIterator<Item = &'a str>) -> Self {
        let mut values = HashSet::new();
        let trimmed = configured.into_iter().map(str::trim).filter(|value| !value.is_empty());
        for value in NOBODY.into_iter().chain(trimmed) {
            for spelling in [value.to_owned(), value.to_ascii_lowercase(), value.to_ascii_uppercase()] {
                for &format in IdentityFormat::ALL {
                    values.insert(format.encode(&spelling));
                }
            }
        }
        Self { values }
    }

    fn contains(&self, format: IdentityFormat, value: &str) -> bool {
        let blank = format == IdentityFormat::Raw
            && (value.bytes().all(|byte| byte == b'0' || byte == b'-') || value.trim().is_empty());
        blank || self.values.contains(value) || self.values.contains(&value.to_ascii_lowercase())
    }
}

impl Default for DeniedValues {
    fn default() -> Self {
        Self::new([])
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
    fn who_names_nobody_is_refused_in_every_format() {
        for nobody in ["", "null", "NULL", "00000000-0000-0000-0000-000000000000", "test@example.com", "0", "\u{a0}"] {
            assert_eq!(identity(IdentityFormat::Raw, nobody), Err(InvalidIdentity::NamesNobody), "{nobody}");
        }
        for nobody in ["", "null", "00000000-0000-0000-0000-000000000000", "test@example.com"] {
            for &format in &IdentityFormat::ALL[1..] {
                let digest = format.encode(nobody);
                assert_eq!(identity(format, &digest), Err(InvalidIdentity::NamesNobody), "{nobody} {format}");
                assert_eq!(identity(format, &digest.to_uppercase()), Err(InvalidIdentity::NamesNobody));
            }
        }
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
        assert_eq!(IdentityType::named("Email"), None);
        assert!(IdentityType::RokuPublisherId.is_standard() && !IdentityType::Other.is_standard());
        for &kind in IdentityType::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
