//! The state machine of a request (contract 5, `docs/reference/state-machine.md`).
//!
//! **Invariant** (DESIGN rule 1): a request moves along [`RequestStatus::comes_from`] and no other way; the database has a
//! guard that says the same.

use serde::{Deserialize, Serialize};

use crate::names::names;

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
    /// The whole state machine: each status comes from one other and no request is born in any but the first. The database
    /// has a guard that says the same (`LT002`); a test holds the two together.
    #[must_use]
    pub const fn comes_from(self) -> Option<Self> {
        match self {
            Self::Pending => None,
            Self::InProgress | Self::Cancelled => Some(Self::Pending),
            Self::Completed => Some(Self::InProgress),
        }
    }

    /// The place of this status in the life of a request, from 0; callbacks are delivered in this order.
    #[must_use]
    pub const fn sequence(self) -> i16 {
        match self.comes_from() {
            None => 0,
            Some(before) => before.sequence() + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for &status in RequestStatus::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
            assert_eq!(serde_json::to_string(&status).unwrap(), format!("\"{status}\""));
        }
        assert!("Pending".parse::<RequestStatus>().is_err());
    }

    #[test]
    fn callbacks_come_in_the_order_of_the_statuses() {
        use RequestStatus::{Cancelled, Completed, InProgress, Pending};
        assert_eq!([Pending, InProgress, Completed, Cancelled].map(RequestStatus::sequence), [0, 1, 2, 1]);
    }
}
