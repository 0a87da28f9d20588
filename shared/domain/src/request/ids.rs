//! Ids as types of their own, so that a batch cannot be passed where a slice is meant.

use std::fmt;
use std::str::FromStr;

use postgres_types::{FromSql, ToSql};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! number_ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSql, FromSql)]
        #[serde(transparent)]
        #[postgres(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )*};
}

number_ids! {
    /// The internal key of a request, in the order of receipt.
    RequestKey;
    /// A batch: all requests of one lane that were scheduled for one tick.
    BatchId;
    /// A slice: a bounded share of a batch, the unit of work and of lease.
    SliceId;
    /// Where callbacks go: controller, scheme, host and port.
    EndpointId;
    /// mParticle id: the 64-bit signed id of a user profile.
    Mpid;
}

/// The id of one callback; the same on every attempt (`X-Lethe-Callback-Id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSql, FromSql)]
#[serde(transparent)]
#[postgres(transparent)]
pub struct CallbackId(pub Uuid);

impl fmt::Display for CallbackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A controller's id: 1 to 64 characters of `A-Z a-z 0-9 _ -` (contract 2).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSql, FromSql)]
#[serde(transparent)]
#[postgres(transparent)]
pub struct ControllerId(String);

/// The text is not a valid controller id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a controller id has 1 to 64 characters from A-Z, a-z, 0-9, _ and -")]
pub struct InvalidControllerId;

impl ControllerId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ControllerId {
    type Err = InvalidControllerId;
    fn from_str(text: &str) -> Result<Self, InvalidControllerId> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidControllerId)
        }
    }
}

impl fmt::Display for ControllerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The id that the controller gave its request: a UUID version 4, unique per controller, written lower-case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSql, FromSql)]
#[serde(transparent)]
#[postgres(transparent)]
pub struct SubjectRequestId(Uuid);

/// The text is not a UUID version 4.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be a UUID version 4")]
pub struct InvalidSubjectRequestId;

impl SubjectRequestId {
    /// A fresh random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl FromStr for SubjectRequestId {
    type Err = InvalidSubjectRequestId;
    fn from_str(text: &str) -> Result<Self, InvalidSubjectRequestId> {
        // `Uuid` also reads braces, URNs and the form without hyphens; OpenDSR knows the hyphenated form only.
        let hyphenated = text.len() == 36;
        match Uuid::parse_str(text) {
            Ok(uuid) if hyphenated && uuid.get_version_num() == 4 => Ok(Self(uuid)),
            _ => Err(InvalidSubjectRequestId),
        }
    }
}

impl fmt::Display for SubjectRequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_ids_are_short_and_plain() {
        assert!("acme-1_X".parse::<ControllerId>().is_ok());
        assert!("a".repeat(64).parse::<ControllerId>().is_ok());
        for refused in ["", "a b", "a.b", "ümlaut", &"a".repeat(65)] {
            assert_eq!(refused.parse::<ControllerId>(), Err(InvalidControllerId), "{refused}");
        }
    }

    #[test]
    fn subject_request_ids_are_version_four_and_lower_case() {
        let id: SubjectRequestId = "A7551968-D5D6-44B2-9831-815AC9017798".parse().unwrap();
        assert_eq!(id.to_string(), "a7551968-d5d6-44b2-9831-815ac9017798");
        let version_one = "a7551968-d5d6-11b2-9831-815ac9017798";
        for refused in ["", "x", version_one, "a7551968d5d644b29831815ac9017798"] {
            assert!(refused.parse::<SubjectRequestId>().is_err(), "{refused}");
        }
    }
}
