//! A parsed subject request, the same for all three versions.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use crate::names::{names, stored_as_text};
use crate::request::{Lane, Mpid, RequestType, SubjectRequestId};

/// The version of the API that a request speaks, and is answered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ApiVersion {
    /// OpenGDPR 1.0.
    #[serde(rename = "1.0")]
    V1,
    /// OpenDSR 2.0.
    #[serde(rename = "2.0")]
    V2,
    /// The 3.0 form that clients use today.
    #[serde(rename = "3.0")]
    V3,
}

impl ApiVersion {
    /// Every version.
    pub const ALL: &'static [Self] = &[Self::V1, Self::V2, Self::V3];

    /// As in `api_version`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "1.0",
            Self::V2 => "2.0",
            Self::V3 => "3.0",
        }
    }

    /// The first segment of the path: `v1`, `v2`, `v3`.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::V3 => "v3",
        }
    }

    /// The header that names the processor.
    #[must_use]
    pub const fn domain_header(self) -> &'static str {
        match self {
            Self::V1 => "X-OpenGDPR-Processor-Domain",
            Self::V2 | Self::V3 => "X-OpenDSR-Processor-Domain",
        }
    }

    /// The header that carries the signature.
    #[must_use]
    pub const fn signature_header(self) -> &'static str {
        match self {
            Self::V1 => "X-OpenGDPR-Signature",
            Self::V2 | Self::V3 => "X-OpenDSR-Signature",
        }
    }
}

impl FromStr for ApiVersion {
    type Err = UnsupportedVersion;
    /// Reads the major version: `3`, `3.0` and `3.1` are all version 3.
    fn from_str(text: &str) -> Result<Self, UnsupportedVersion> {
        match text.trim().split('.').next() {
            Some("1") => Ok(Self::V1),
            Some("2") => Ok(Self::V2),
            Some("3") => Ok(Self::V3),
            _ => Err(UnsupportedVersion),
        }
    }
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

stored_as_text!(ApiVersion);

/// The text does not name a version that we speak.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be 1.0, 2.0 or 3.0")]
pub struct UnsupportedVersion;

/// The law under which a request is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Regulation {
    /// General Data Protection Regulation.
    Gdpr,
    /// California Consumer Privacy Act.
    Ccpa,
}
names!(Regulation, "regulation", Gdpr = "gdpr", Ccpa = "ccpa");

/// A valid subject request. Its serialised form is what is sealed at rest and what the content digest is taken of:
/// fields may be added to it, never renamed or reordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubjectRequest {
    /// The version in which it was made.
    pub api_version: ApiVersion,
    /// From version 2.
    pub regulation: Option<Regulation>,
    /// Unique per controller.
    pub subject_request_id: SubjectRequestId,
    /// What is asked for.
    pub subject_request_type: RequestType,
    /// When the data subject asked the controller.
    pub submitted_time: Timestamp,
    /// Sorted, each once.
    pub identities: Vec<Identity>,
    /// The profiles that the request names itself; sorted, each once.
    pub mpids: Vec<Mpid>,
    /// Erase at the next tick of the expedited schedule.
    pub skip_waiting_period: bool,
    /// Where changes of status are reported, in the order given.
    pub status_callback_urls: Vec<String>,
    /// The controller's own name for several requests that belong together.
    pub group_id: Option<String>,
}

impl SubjectRequest {
    /// The lane in which it waits.
    #[must_use]
    pub const fn lane(&self) -> Lane {
        Lane::of(self.subject_request_type, self.skip_waiting_period)
    }
}
