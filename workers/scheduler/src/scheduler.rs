//! What the parts of the scheduler share.

use lethe_runtime::service::Service;
use tokio::sync::Notify;

use crate::lead::Lead;
use crate::markers::Markers;
use crate::options::Ready;
use crate::wakes::Wakes;

/// Everything that the parts of the scheduler share.
pub(crate) struct Scheduler {
    pub(crate) service: Service,
    pub(crate) ready: Ready,
    pub(crate) lead: Lead,
    pub(crate) markers: Markers,
    pub(crate) wakes: Wakes,
    /// The next round need not wait: something that it waited for is there.
    pub(crate) hurry: Notify,
}
