//! Where batches, callbacks and approvals stand (`docs/reference/state-machine.md`).

use serde::{Deserialize, Serialize};

use crate::names::names;

/// Where a batch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchState {
    /// Takes requests.
    Open,
    /// Its tick has come: it takes none, and runs when its time has come.
    Closed,
    /// All of its requests are in slices.
    Released,
    /// All of its slices are done.
    Completed,
}
names!(BatchState, "batch state", Open = "open", Closed = "closed", Released = "released", Completed = "completed");

/// Where a callback stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallbackState {
    /// An earlier one to the same URL has not ended.
    Waiting,
    /// To be sent when it is due.
    Ready,
    /// The receiver has it.
    Delivered,
    /// Given up.
    Exhausted,
}
names!(
    CallbackState,
    "callback state",
    Waiting = "waiting",
    Ready = "ready",
    Delivered = "delivered",
    Exhausted = "exhausted"
);

/// Whether an operator has to agree to an erasure of more profiles than the cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Approval {
    /// It is within the cap.
    NotNeeded,
    /// It waits for an operator.
    Needed,
    /// An operator has agreed.
    Approved,
}
names!(Approval, "approval", NotNeeded = "not_needed", Needed = "needed", Approved = "approved");
