//! Doubting the clock. Everything that cannot be undone depends on PostgreSQL's clock. While it is ahead of the time
//! that has passed on a monotonic clock, nothing of that kind is done.
//!
//! **Invariant** (DESIGN rule 5): while the clock is doubted, nothing is done that cannot be undone.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use lethe_db::leader::{CLOCK_TOLERANCE, Seen};

/// A clock that runs faster than ours by no more than one part in so many is believed, second by second.
const DRIFT: u32 = 100;
/// An agreement is meant for the clock as it was then, and not for what it may have jumped to since.
const AGREEMENT_LASTS: SignedDuration = SignedDuration::from_mins(10);

/// The time since the machine began, suspension included: a laptop that slept has not jumped. Elsewhere than on Linux the time
/// that the process has run. Which of the two is decided once, since they do not begin at the same instant; `None` where the
/// clock cannot be read now.
pub(crate) fn uptime() -> Option<Duration> {
    static PROCESS: std::sync::LazyLock<Option<Instant>> =
        std::sync::LazyLock::new(|| (!std::path::Path::new(UPTIME).exists()).then(Instant::now));
    PROCESS.map_or_else(of_machine, |began| Some(began.elapsed()))
}

const UPTIME: &str = "/proc/uptime";

fn of_machine() -> Option<Duration> {
    read_uptime(&std::fs::read_to_string(UPTIME).ok()?)
}

fn read_uptime(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.split_whitespace().next()?.parse().ok()?).ok()
}

/// What is believed of PostgreSQL's clock.
#[derive(Debug)]
pub(crate) struct Guard {
    /// How long no scheduler may have led before its return needs an operator's word.
    absence: SignedDuration,
    /// The clock that was believed last, and when, by our own.
    believed: Option<(Timestamp, Duration)>,
    agreements: Option<i64>,
    /// How far the clock is ahead, if that is too far.
    ahead: Option<SignedDuration>,
}

impl Guard {
    pub(crate) fn new(absence: SignedDuration) -> Self {
        Self { absence, believed: None, agreements: None, ahead: None }
    }

    /// What PostgreSQL's clock should show at the instant `at` of our own.
    pub(crate) fn expected(&self, at: Duration) -> Option<Timestamp> {
        let (clock, since) = self.believed?;
        clock.checked_add(at.saturating_sub(since)).ok()
    }

    /// So far the clock is ahead, where nothing may be done that cannot be undone.
    pub(crate) fn ahead(&self) -> Option<SignedDuration> {
        self.ahead
    }

    /// Whether the last leader has confirmed the clock that we doubt. We do not lead, so `known` is not our own.
    fn is_proved(&self, seen: &Seen) -> bool {
        let near = |known: Timestamp| seen.wall.duration_since(known).abs() <= CLOCK_TOLERANCE;
        self.ahead.is_some() && seen.epoch.is_none() && seen.known.is_some_and(near)
    }

    /// Judges what PostgreSQL has shown at the instant `at` of our own clock, when the process's own wall clock showed
    /// `witness`.
    pub(crate) fn judge(&mut self, seen: &Seen, witness: Timestamp, at: Duration) {
        let agreed = self.agreements.is_some_and(|known| known != seen.agreements)
            && seen
                .agreed
                .is_some_and(|agreed| (-CLOCK_TOLERANCE..=AGREEMENT_LASTS).contains(&seen.wall.duration_since(agreed)));
        self.agreements = Some(seen.agreements);
        let believed = match (self.expected(at), self.believed) {
            _ if agreed || self.is_proved(seen) => Ok(seen.wall),
            (Some(expected), Some((_, since))) => {
                let ahead = seen.wall.duration_since(expected);
                let faster = SignedDuration::try_from(at.saturating_sub(since) / DRIFT).unwrap_or_default();
                if ahead > CLOCK_TOLERANCE {
                    Err(ahead)
                } else {
                    // A clock that was set back is believed: nothing is done too early by it.
                    Ok(expected.checked_add(ahead.min(faster)).unwrap_or(expected))
                }
            }
            _ => self.first(seen, witness),
        };
        match believed {
            Ok(clock) => (self.believed, self.ahead) = (Some((clock, at)), None),
            Err(ahead) => self.ahead = Some(ahead),
        }
    }

    /// The first look of a process, which cannot know how much time has passed. What the last leader believed is recent, or
    /// the own wall clock bears the database out, for an absence of some hours.
    fn first(&self, seen: &Seen, witness: Timestamp) -> Result<Timestamp, SignedDuration> {
        let gap = seen.known.map_or(SignedDuration::ZERO, |known| seen.wall.duration_since(known));
        let borne_out = seen.wall.duration_since(witness).abs() <= CLOCK_TOLERANCE && gap <= self.absence;
        if gap <= CLOCK_TOLERANCE || borne_out { Ok(seen.wall) } else { Err(gap) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: i64 = 1_800_000_000;
    const DAY: i64 = 86_400;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(NOON + second).unwrap()
    }

    fn seen(wall: i64, known: Option<i64>) -> Seen {
        Seen { epoch: Some(1), known: known.map(at), agreements: 0, agreed: None, wall: at(wall) }
    }

    struct Watch(Guard, i64);

    impl Watch {
        fn begin() -> Self {
            let mut watch = Self(Guard::new(SignedDuration::from_hours(24)), 0);
            assert!(watch.look(0, 0), "the first clock of all is believed");
            watch
        }

        /// After some seconds by our own clock PostgreSQL's shows `wall`; whether that is believed.
        fn look(&mut self, after: i64, wall: i64) -> bool {
            self.1 += after;
            let seen = seen(wall, None);
            self.0.judge(&seen, at(wall), Duration::from_secs(u64::try_from(self.1).unwrap()));
            self.0.ahead().is_none()
        }
    }

    #[test]
    fn a_clock_that_goes_with_the_time_is_believed_and_one_that_jumps_is_not_until_it_is_back() {
        let mut watch = Watch::begin();
        assert!(watch.look(5, 5) && watch.look(3_600, 3_605) && watch.look(5, 3_640), "half a minute is not a jump");
        assert!(!watch.look(5, 3_645 + 30 * DAY));
        assert_eq!(watch.0.ahead().unwrap().as_hours(), 30 * 24);
        assert!(!watch.look(600, 4_245 + 30 * DAY), "it does not become right by waiting");
        assert!(watch.look(5, 4_250), "it is back");
    }

    #[test]
    fn small_jumps_do_not_add_up() {
        let mut watch = Watch::begin();
        assert!(watch.look(5, 55), "50 s ahead");
        assert!(!watch.look(5, 110), "100 s ahead");
        assert!(watch.look(7_200, 7_260), "a minute has been made up for by a clock that is a bit fast");
        assert!(watch.look(5, 7_315));
    }

    #[test]
    fn a_clock_that_is_set_back_is_believed() {
        let mut watch = Watch::begin();
        assert!(watch.look(5, -DAY) && watch.look(5, 5 - DAY));
        assert!(!watch.look(5, 15), "a day ahead again");
    }

    #[test]
    fn an_operator_agrees_to_the_clock_as_it_is() {
        let mut watch = Watch::begin();
        assert!(!watch.look(5, DAY));
        let agreement = |wall: i64, agreed: i64| Seen { agreements: 1, agreed: Some(at(agreed)), ..seen(wall, None) };
        let mut late = Watch::begin();
        assert!(!late.look(5, DAY));
        late.0.judge(&agreement(40 * DAY, DAY), at(40 * DAY), Duration::from_secs(10));
        assert!(late.0.ahead().is_some(), "it has jumped once more since");
        watch.0.judge(&agreement(DAY + 5, DAY), at(DAY), Duration::from_secs(10));
        assert!(watch.0.ahead().is_none());
        assert_eq!(watch.0.expected(Duration::from_secs(15)), Some(at(DAY + 10)));
    }

    #[test]
    fn a_standby_believes_again_what_the_leader_has_proved() {
        let mut watch = Watch::begin();
        assert!(!watch.look(5, DAY), "by our own clock it has jumped");
        let mut led_by_another = |wall: i64, known: i64, after: u64| {
            let seen = Seen { epoch: None, ..seen(wall, Some(known)) };
            watch.0.judge(&seen, at(wall), Duration::from_secs(after));
            watch.0.ahead().is_none()
        };
        assert!(!led_by_another(DAY + 5, 0, 10), "the leader does not believe it either");
        assert!(led_by_another(DAY + 10, DAY + 8, 15));
        assert!(led_by_another(DAY + 15, DAY + 13, 20));
        let mut leading = Watch::begin();
        assert!(!leading.look(5, DAY));
        leading.0.judge(&seen(DAY + 5, Some(DAY + 5)), at(DAY), Duration::from_secs(10));
        assert!(leading.0.ahead().is_some(), "who leads proves nothing to itself");
    }

    #[test]
    fn the_time_that_the_machine_runs_is_read_or_not_known() {
        assert_eq!(read_uptime("12.50 40.00\n"), Some(Duration::from_millis(12_500)));
        assert!(["", "\n", "x 1", "-1 2", "nan 1"].iter().all(|text| read_uptime(text).is_none()));
        assert!(uptime() <= uptime());
    }

    #[test]
    fn a_new_leader_is_not_fooled() {
        let judged = |wall: i64, known: i64, witness: i64| {
            let mut guard = Guard::new(SignedDuration::from_hours(24));
            guard.judge(&seen(wall, Some(known)), at(witness), Duration::from_secs(9));
            guard.ahead().is_none()
        };
        assert!(judged(20, 0, 5_000), "the last leader was here just now");
        assert!(judged(7_200, 0, 7_210), "two hours without a scheduler, and our own clock says so too");
        assert!(!judged(7_200, 0, 0), "our own clock knows nothing of these two hours");
        assert!(!judged(30 * DAY, 0, 30 * DAY), "both clocks may be of the same machine");
        let mut guard = Guard::new(SignedDuration::from_hours(24));
        guard.judge(&seen(30 * DAY, Some(0)), at(600), Duration::from_secs(1));
        assert!(guard.ahead().is_some() && guard.expected(Duration::from_secs(1)).is_none());
        guard.judge(&seen(605, Some(0)), at(605), Duration::from_secs(6));
        assert!(guard.ahead().is_none(), "it is back");
    }
}
