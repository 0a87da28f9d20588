//! Waiting for servers that are unavailable.

use lethe_domain::backoff::{BackoffPolicy, jitter};

/// Waits between attempts to reach a server: 100 ms to 5 s. Ends never; the caller stops it at shutdown.
#[derive(Debug)]
pub struct Reconnect {
    policy: BackoffPolicy,
    failures: u32,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { policy: BackoffPolicy::RECONNECT, failures: 0 }
    }
}

impl Reconnect {
    /// Waits a little longer than the last time.
    pub async fn wait(&mut self) {
        self.failures = self.failures.saturating_add(1);
        tokio::time::sleep(self.policy.delay(self.failures, jitter())).await;
    }

    /// Whether nothing has failed yet: the time to say that something does.
    #[must_use]
    pub const fn is_first(&self) -> bool {
        self.failures == 0
    }
}
