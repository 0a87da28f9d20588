//! The state machine of a request (contract 5, `docs/state-machine.md`).

use serde::{Deserialize, Serialize};

/// What a data subject asks for (OpenDSR `subject_request_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestType {
    /// Erase me.
    Erasure,
    /// Show me my data.
    Access,
    /// Give me my data to take along.
    Portability,
}

/// Where a request stands (OpenDSR `request_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestStatus {
    /// Received; can be cancelled.
    Pending,
    /// Being carried out; cannot be cancelled any more.
    InProgress,
    /// Done.
    Completed,
    /// Withdrawn by the controller in time; nothing was done.
    Cancelled,
}

/// The text names no such thing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown {kind}")]
pub struct UnknownName {
    kind: &'static str,
}

impl UnknownName {
    pub(crate) const fn new(kind: &'static str) -> Self {
        Self { kind }
    }
}

macro_rules! names {
    ($type:ident, $kind:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the wire and in the database.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::request::status::UnknownName;
            fn from_str(text: &str) -> Result<Self, $crate::request::status::UnknownName> {
                match text { $($name => Ok(Self::$variant),)+ _ => Err($crate::request::status::UnknownName::new($kind)) }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use names;

names!(RequestType, "request type", Erasure = "erasure", Access = "access", Portability = "portability");
names!(
    RequestStatus,
    "request status",
    Pending = "pending",
    InProgress = "in_progress",
    Completed = "completed",
    Cancelled = "cancelled"
);

impl RequestStatus {
    /// The place of this status in the life of a request, from 0; callbacks are delivered in this order.
    #[must_use]
    pub const fn sequence(self) -> i16 {
        match self {
            Self::Pending => 0,
            Self::InProgress | Self::Cancelled => 1,
            Self::Completed => 2,
        }
    }
}

/// What can happen to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its batch runs.
    Release,
    /// The controller withdraws it.
    Cancel,
    /// All that it asked for is done.
    Complete,
}

/// A change of status that took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The status before.
    pub from: RequestStatus,
    /// The status after.
    pub to: RequestStatus,
}

/// This event cannot happen in this status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} is impossible once a request is {status}")]
pub struct IllegalTransition {
    /// The status that the request has.
    pub status: RequestStatus,
    /// What was tried.
    pub event: Event,
}

/// The whole state machine: every transition that is not named here does not exist.
///
/// # Errors
/// [`IllegalTransition`] for each other pair.
pub const fn apply(status: RequestStatus, event: Event) -> Result<Transition, IllegalTransition> {
    use RequestStatus::{Cancelled, Completed, InProgress, Pending};
    let to = match (status, event) {
        (Pending, Event::Release) => InProgress,
        (Pending, Event::Cancel) => Cancelled,
        (InProgress, Event::Complete) => Completed,
        _ => return Err(IllegalTransition { status, event }),
    };
    Ok(Transition { from: status, to })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_decided() {
        use RequestStatus::{Cancelled, Completed, InProgress, Pending};
        let legal = [
            (Pending, Event::Release, InProgress),
            (Pending, Event::Cancel, Cancelled),
            (InProgress, Event::Complete, Completed),
        ];
        for &status in RequestStatus::ALL {
            for event in [Event::Release, Event::Cancel, Event::Complete] {
                let expected = legal.iter().find(|(from, on, _)| *from == status && *on == event);
                match (expected, apply(status, event)) {
                    (Some(&(from, _, to)), Ok(transition)) => assert_eq!(transition, Transition { from, to }),
                    (None, Err(refused)) => assert_eq!(refused, IllegalTransition { status, event }),
                    (expected, got) => panic!("{status} on {event:?}: expected {expected:?}, got {got:?}"),
                }
            }
        }
    }

    #[test]
    fn names_read_back() {
        for &status in RequestStatus::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
            assert_eq!(serde_json::to_string(&status).unwrap(), format!("\"{status}\""));
        }
        assert!("Pending".parse::<RequestStatus>().is_err());
    }

    #[test]
    fn each_transition_goes_one_step_on() {
        for &status in RequestStatus::ALL {
            for event in [Event::Release, Event::Cancel, Event::Complete] {
                if let Ok(done) = apply(status, event) {
                    assert_eq!(done.to.sequence(), done.from.sequence() + 1);
                }
            }
        }
    }
}
