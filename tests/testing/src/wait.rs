//! Waiting for a condition: the only place of the tests that lets time pass.

use std::fmt::Debug;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);

/// Limits are written for an idle machine; a busy one may take so many times as long. What is met goes on at once, so this
/// costs time only where a test fails.
const PATIENCE: u32 = 6;

/// What a busy machine may take for what an idle one does within `limit`.
pub const fn patiently(limit: Duration) -> Duration {
    limit.saturating_mul(PATIENCE)
}

/// Waits until `condition` holds; fails the test where it does not within `limit`, [patiently]. Says `what` it waited for.
pub async fn eventually<F: AsyncFnMut() -> bool>(what: &str, limit: Duration, mut condition: F) {
    eventually_some(what, limit, async || condition().await.then_some(())).await;
}

/// Waits until `look` finds something and returns it.
pub async fn eventually_some<T, F: AsyncFnMut() -> Option<T>>(what: &str, limit: Duration, mut look: F) -> T {
    let (started, limit) = (Instant::now(), patiently(limit));
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < limit, "waited {limit:?} in vain until {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `look` gives `wanted`; the failure shows what it gave last.
pub async fn becomes<T: PartialEq + Debug, F: AsyncFnMut() -> T>(what: &str, limit: Duration, wanted: T, mut look: F) {
    let (started, limit) = (Instant::now(), patiently(limit));
    loop {
        let seen = look().await;
        if seen == wanted {
            return;
        }
        assert!(started.elapsed() < limit, "{what}: wanted {wanted:?}, still {seen:?} after {limit:?}");
        tokio::time::sleep(POLL).await;
    }
}

/// Checks that `condition` holds for as long as `span`: for what must *not* happen.
pub async fn stays<F: AsyncFnMut() -> bool>(what: &str, span: Duration, mut condition: F) {
    let started = Instant::now();
    while started.elapsed() < span {
        assert!(condition().await, "{what} held no longer after {:?}", started.elapsed());
        tokio::time::sleep(POLL).await;
    }
}

/// Seconds, shorter to write.
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
