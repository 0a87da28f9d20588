//! What a subject request is, apart from how it is written on the wire and where it is kept: ids, status, calendar.
//! Pure: nothing here does I/O or reads a clock.

pub mod calendar;
pub mod ids;
pub mod stage;
pub mod states;
pub mod status;

pub use calendar::{Calendar, Lane, Schedule, Slot};
pub use ids::{BatchId, CallbackId, ControllerId, EndpointId, Mpid, RequestKey, SliceId, SubjectRequestId};
pub use stage::Stage;
pub use states::{Approval, BatchState, CallbackState};
pub use status::{RequestStatus, RequestType};
