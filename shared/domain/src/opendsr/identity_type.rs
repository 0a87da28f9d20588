//! The types of identities, and the formats they come in (contract 4).

use serde::{Deserialize, Serialize};

use md5::{Digest, Md5};

use crate::crypto;
use crate::names::names;

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
    pub(crate) const fn hex_digits(self) -> Option<usize> {
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
