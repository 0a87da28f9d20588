//! Waiting between attempts: the one place that names the crate `backoff` (see `deny.toml` for why it stays).
//!
//! **Invariant** (DESIGN rule 16): randomness is passed in.

use std::time::Duration;

use ::backoff::ExponentialBackoff;
use ::backoff::backoff::Backoff as _;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;

/// Exponential backoff between two bounds. A valid value: `0 < first <= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffPolicy {
    first: Duration,
    max: Duration,
}

/// The bounds are invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the first retry must come after more than zero seconds, and no later than the longest wait")]
pub struct InvalidBackoff;

impl BackoffPolicy {
    /// Between attempts to reach a server that is away.
    pub const RECONNECT: Self = Self { first: Duration::from_millis(100), max: Duration::from_secs(5) };

    /// Waits `first` after the first failure, doubles, and never waits longer than `max`.
    ///
    /// # Errors
    /// [`InvalidBackoff`] unless `0 < first <= max`.
    pub fn new(first: Duration, max: Duration) -> Result<Self, InvalidBackoff> {
        if first.is_zero() || first > max { Err(InvalidBackoff) } else { Ok(Self { first, max }) }
    }

    /// How long to wait after failure number `failures` (from 1). `random` in `0.0..1.0` is the jitter: the result
    /// lies between half of the exponential step and the whole of it, and never below `first` / 2.
    #[must_use]
    pub fn delay(&self, failures: u32, random: f64) -> Duration {
        let mut steps = ExponentialBackoff {
            initial_interval: self.first,
            current_interval: self.first,
            max_interval: self.max,
            multiplier: 2.0,
            randomization_factor: 0.0,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        let mut step = self.first;
        for _ in 0..failures.max(1) {
            step = steps.next_backoff().unwrap_or(self.max);
            if step >= self.max {
                break;
            }
        }
        step.min(self.max).mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// As [`Self::delay`], but not before the `Retry-After` that the other side asked for; that wish is clamped to `max`.
    #[must_use]
    pub fn delay_after(&self, failures: u32, random: f64, retry_after: Option<Duration>) -> Duration {
        let own = self.delay(failures, random);
        retry_after.map_or(own, |wish| own.max(wish.min(self.max)))
    }
}

/// The value of a `Retry-After` header (RFC 9110, 10.2.3): seconds, or a date in any of the three forms that a recipient
/// has to read, which is measured from `now`. `None` where it is neither; a date in the past is zero.
#[must_use]
pub fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More than fits is as long as can be; whoever asks clamps it.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let old_form = |format| {
        Some(strtime::parse(format, value).ok()?.to_datetime().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp())
    };
    let date = DateTimeParser::new()
        .parse_timestamp(value)
        .ok()
        .or_else(|| old_form("%A, %d-%b-%y %H:%M:%S GMT"))
        .or_else(|| old_form("%a %b %e %H:%M:%S %Y"))?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or(Duration::ZERO))
}

/// A random number in `0.0..1.0` for jitter.
#[must_use]
pub fn jitter() -> f64 {
    // Without randomness there is no jitter, and nothing worse.
    crate::crypto::random::<4>().map_or(0.5, |bytes| f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds_are_validated() {
        let second = Duration::from_secs(1);
        assert!(BackoffPolicy::new(second, second).is_ok());
        assert_eq!(BackoffPolicy::new(Duration::ZERO, second), Err(InvalidBackoff));
        assert_eq!(BackoffPolicy::new(second * 2, second), Err(InvalidBackoff));
    }

    #[test]
    fn it_doubles() {
        let policy = BackoffPolicy::new(Duration::from_secs(30), Duration::from_hours(6)).unwrap();
        let delays: Vec<u64> = (1..=4).map(|failures| policy.delay(failures, 1.0).as_secs()).collect();
        assert_eq!(delays, [30, 60, 120, 240]);
        assert_eq!(policy.delay(1_000_000, 1.0), Duration::from_hours(6));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now: Timestamp = "1994-11-06T08:49:00Z".parse().unwrap();
        assert_eq!(parse_retry_after("120", now), Some(Duration::from_mins(2)));
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(37)));
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(parse_retry_after("Sunday, 06-Nov-94 08:49:37 GMT", now), Some(Duration::from_secs(37)));
        assert_eq!(parse_retry_after("Sun Nov  6 08:49:37 1994", now), Some(Duration::from_secs(37)));
        assert_eq!(parse_retry_after("99999999999999999999", now), Some(Duration::from_secs(u64::MAX)));
        assert_eq!(parse_retry_after("", now), None);
        assert_eq!(parse_retry_after("-1", now), None);
        assert_eq!(parse_retry_after("soon", now), None);
    }

    proptest! {
        #[test]
        fn delays_stay_in_bounds(
            first in 1_u64..100_000, factor in 1_u64..10_000, failures in 0_u32..10_000, random in -1.0..2.0_f64,
            wish in prop::option::of(0_u64..u64::MAX),
        ) {
            let policy = BackoffPolicy::new(Duration::from_millis(first), Duration::from_millis(first * factor)).unwrap();
            let delay = policy.delay_after(failures, random, wish.map(Duration::from_secs));
            prop_assert!(delay >= policy.first / 2);
            prop_assert!(delay <= policy.max);
            let wished = Duration::from_secs(wish.unwrap_or(0)).min(policy.max);
            prop_assert!(delay >= wished);
            prop_assert!(policy.delay(failures.max(1), 1.0) <= policy.delay(failures.max(1) + 1, 1.0));
        }
    }
}
