//! An attempt to deliver a callback.

use std::time::Duration;

/// What came of an attempt.
#[derive(Clone, Debug)]
pub struct DeliveryAttempt {
    /// How long it took.
    pub duration: Duration,
    /// The status of the answer, where there was one.
    pub status_code: Option<u16>,
    /// Why it failed; `None` for a delivered one.
    pub error_class: Option<&'static str>,
    /// What exactly failed, where the class does not tell: printable ASCII, nothing personal.
    pub reason: Option<String>,
    /// The endpoint itself is in trouble, not only this callback: it counts for the breaker.
    pub endpoint_trouble: bool,
    /// What the answer asked for.
    pub retry_after: Option<Duration>,
}

impl DeliveryAttempt {
    /// Nothing was sent, for a reason of ours.
    #[must_use]
    pub const fn not_sent(class: &'static str) -> Self {
        Self::failed(class, false)
    }

    /// No answer came, for a reason of the given class.
    #[must_use]
    pub const fn failed(class: &'static str, endpoint_trouble: bool) -> Self {
        Self {
            duration: Duration::ZERO,
            status_code: None,
            error_class: Some(class),
            reason: None,
            endpoint_trouble,
            retry_after: None,
        }
    }
}
