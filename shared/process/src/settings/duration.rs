//! Durations as people write them: `30s`, `48h`, `7d`, `1h30m`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;

/// A duration that was written as text. Never negative, at most 100 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(Duration);

/// The text is not a valid duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected a duration such as 500ms, 30s, 5m, 48h, 7d or 1h30m, at most 100 years, not negative")]
pub struct InvalidDuration;

const UNITS: [(&str, u64); 6] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 604_800_000)];
const LONGEST_MS: u64 = 100 * 366 * 86_400_000;

impl HumanDuration {
    /// As the standard library's type.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }

    /// As the type that calendars calculate with.
    #[must_use]
    pub fn signed(self) -> SignedDuration {
        SignedDuration::try_from(self.0).unwrap_or(SignedDuration::MAX)
    }
}

impl FromStr for HumanDuration {
    type Err = InvalidDuration;
    fn from_str(text: &str) -> Result<Self, InvalidDuration> {
        let mut rest = text.trim();
        let mut total: u64 = 0;
        if rest.is_empty() {
            return Err(InvalidDuration);
        }
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, tail) = rest.split_at(digits);
            let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
            let (unit, tail) = tail.split_at(letters);
            let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(InvalidDuration)?;
            let part = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
            total = part.and_then(|part| total.checked_add(part)).ok_or(InvalidDuration)?;
            rest = tail;
        }
        if total > LONGEST_MS { Err(InvalidDuration) } else { Ok(Self(Duration::from_millis(total))) }
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(LONGEST_MS);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, factor) in UNITS.iter().rev().filter(|(unit, _)| *unit != "w") {
            if rest >= *factor {
                write!(f, "{}{unit}", rest / factor)?;
                rest %= factor;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_written() {
        for (text, ms) in [("0s", 0), ("500ms", 500), ("30s", 30_000), ("1h30m", 5_400_000), ("7d", 604_800_000)] {
            let duration: HumanDuration = text.parse().unwrap();
            assert_eq!(duration.get(), Duration::from_millis(ms));
            assert_eq!(duration.to_string(), text);
        }
        for refused in ["", "-1s", "5", "1.5h", "s", "1 h", "1y", "99999999999999999999s", "40000d"] {
            assert_eq!(refused.parse::<HumanDuration>(), Err(InvalidDuration), "{refused}");
        }
    }
}
