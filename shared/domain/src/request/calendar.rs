//! The calendar: when a request that is received now will run, and when it is expected to be completed (contract 5).
//!
//! A request is scheduled for the first tick of its lane *after* its receipt. The tick, the time at which the batch of
//! that tick runs and the expected time of completion are fixed at receipt and never move forward (ADR 0002).

use std::fmt;
use std::str::FromStr;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::status::RequestType;
use crate::names::names;

/// Which schedule a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Weekly erasure batches, which run one waiting period after they close.
    Erasure,
    /// Erasures that skip the waiting period, and those that an operator approved.
    Expedited,
    /// Access and portability.
    Access,
}
names!(Lane, "lane", Erasure = "erasure", Expedited = "expedited", Access = "access");

impl Lane {
    /// The lane of a request as it is received.
    #[must_use]
    pub const fn of(request_type: RequestType, skip_waiting_period: bool) -> Self {
        match (request_type, skip_waiting_period) {
            (RequestType::Erasure, false) => Self::Erasure,
            (RequestType::Erasure, true) => Self::Expedited,
            (RequestType::Access | RequestType::Portability, _) => Self::Access,
        }
    }

    /// The lane of a request that an operator approved.
    #[must_use]
    pub const fn once_approved(request_type: RequestType) -> Self {
        Self::of(request_type, true)
    }
}

/// A cron expression in UTC: five fields, or six with seconds first. Weekday 0 and 7 are Sunday, 1 is Monday.
#[derive(Clone, Debug)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

/// The text is not a valid cron expression, or one that never fires.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{reason}; expected a cron expression of five fields (minute hour day month weekday), or six with seconds first"
)]
pub struct InvalidSchedule {
    reason: String,
}

impl Schedule {
    /// The first tick strictly after `instant`.
    ///
    /// # Errors
    /// [`CalendarExhausted`] when no further tick exists within the range of time stamps.
    pub(crate) fn next_after(&self, instant: Timestamp) -> Result<Timestamp, CalendarExhausted> {
        self.cron
            .find_next_occurrence(&instant.to_zoned(TimeZone::UTC), false)
            .map(|tick| tick.timestamp())
            .map_err(|_| CalendarExhausted { schedule: self.text.clone() })
    }
}

impl FromStr for Schedule {
    type Err = InvalidSchedule;
    fn from_str(text: &str) -> Result<Self, InvalidSchedule> {
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let invalid = |reason: String| InvalidSchedule { reason };
        let cron = parser.parse(text).map_err(|error| invalid(error.to_string()))?;
        let schedule = Self { text: text.to_owned(), cron };
        // "30 February" parses; a calendar with it would take requests in and never run them.
        schedule.next_after(Timestamp::UNIX_EPOCH).map_err(|_| invalid("this date never comes".to_owned()))?;
        Ok(schedule)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// A schedule has no further tick.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the schedule `{schedule}` has no further tick")]
pub struct CalendarExhausted {
    schedule: String,
}

/// The calendar in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Calendar {
    /// When an erasure batch closes.
    pub erasure: Schedule,
    /// When erasures that skip the waiting period run.
    pub expedited: Schedule,
    /// When access and portability batches run.
    pub access: Schedule,
    /// From the closing of an erasure batch to its execution.
    pub waiting_period: SignedDuration,
    /// Added to the time at which a batch runs for the expected time of completion.
    pub completion_margin: SignedDuration,
}

/// What a request is scheduled for at receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// When its batch closes.
    pub tick_at: Timestamp,
    /// When its batch runs.
    pub runs_at: Timestamp,
    /// `expected_completion_time` of OpenDSR.
    pub expected_completion_time: Timestamp,
}

impl Calendar {
    /// The schedule of a lane.
    #[must_use]
    pub const fn schedule(&self, lane: Lane) -> &Schedule {
        match lane {
            Lane::Erasure => &self.erasure,
            Lane::Expedited => &self.expedited,
            Lane::Access => &self.access,
        }
    }

    /// What a request of `lane` that is received at `received_at` is scheduled for. A request received at the very
    /// instant of a tick is scheduled for the next one: a batch holds what was received *before* its tick.
    ///
    /// # Errors
    /// [`CalendarExhausted`] when the schedule has no further tick.
    pub fn slot(&self, lane: Lane, received_at: Timestamp) -> Result<Slot, CalendarExhausted> {
        let schedule = self.schedule(lane);
        let tick_at = schedule.next_after(received_at)?;
        let wait = if lane == Lane::Erasure { self.waiting_period } else { SignedDuration::ZERO };
        let exhausted = |_| CalendarExhausted { schedule: schedule.to_string() };
        let runs_at = tick_at.checked_add(wait).map_err(exhausted)?;
        let expected_completion_time = runs_at.checked_add(self.completion_margin).map_err(exhausted)?;
        Ok(Slot { tick_at, runs_at, expected_completion_time })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn calendar() -> Calendar {
        Calendar {
            erasure: "30 12 * * MON".parse().unwrap(),
            expedited: "30 12 * * *".parse().unwrap(),
            access: "5 0 * * MON,THU".parse().unwrap(),
            waiting_period: SignedDuration::from_hours(7 * 24),
            completion_margin: SignedDuration::from_hours(48),
        }
    }

    fn tick(lane: Lane, received_at: &str) -> String {
        calendar().slot(lane, received_at.parse().unwrap()).unwrap().tick_at.to_string()
    }

    #[test]
    fn an_erasure_waits_for_monday_and_a_week() {
        let slot = calendar().slot(Lane::Erasure, "2026-11-22T09:00:00Z".parse().unwrap()).unwrap();
        assert_eq!(slot.tick_at.to_string(), "2026-11-23T12:30:00Z");
        assert_eq!(slot.runs_at.to_string(), "2026-11-30T12:30:00Z");
        assert_eq!(slot.expected_completion_time.to_string(), "2026-12-02T12:30:00Z");
    }

    #[test]
    fn the_very_instant_of_a_tick_belongs_to_the_next_batch() {
        assert_eq!(tick(Lane::Erasure, "2026-11-23T12:29:59.999999Z"), "2026-11-23T12:30:00Z");
        assert_eq!(tick(Lane::Erasure, "2026-11-23T12:30:00Z"), "2026-11-30T12:30:00Z");
        assert_eq!(tick(Lane::Erasure, "2026-11-23T12:30:00.000001Z"), "2026-11-30T12:30:00Z");
    }

    #[test]
    fn year_ends_and_leap_days() {
        assert_eq!(tick(Lane::Erasure, "2026-12-28T12:30:00Z"), "2027-01-04T12:30:00Z");
        assert_eq!(tick(Lane::Access, "2026-12-31T23:59:59Z"), "2027-01-04T00:05:00Z");
        assert_eq!(tick(Lane::Access, "2024-02-29T00:04:59Z"), "2024-02-29T00:05:00Z");
        assert_eq!(tick(Lane::Expedited, "2024-02-28T13:00:00Z"), "2024-02-29T12:30:00Z");
        assert_eq!(tick(Lane::Expedited, "2100-02-28T13:00:00Z"), "2100-03-01T12:30:00Z");
    }

    #[test]
    fn access_runs_twice_a_week_without_waiting() {
        let slot = calendar().slot(Lane::Access, "2026-11-22T09:00:00Z".parse().unwrap()).unwrap();
        assert_eq!(slot.tick_at.to_string(), "2026-11-23T00:05:00Z");
        assert_eq!(slot.runs_at, slot.tick_at);
        assert_eq!(tick(Lane::Access, "2026-11-23T00:05:00Z"), "2026-11-26T00:05:00Z");
    }

    #[test]
    fn weekdays_are_those_of_standard_cron() {
        let after: Timestamp = "2026-11-22T23:00:00Z".parse().unwrap();
        for (expression, weekday) in [
            ("0 0 * * 0", jiff::civil::Weekday::Sunday),
            ("0 0 * * 7", jiff::civil::Weekday::Sunday),
            ("0 0 * * 1", jiff::civil::Weekday::Monday),
            ("0 0 * * 6", jiff::civil::Weekday::Saturday),
            ("0 0 * * SAT", jiff::civil::Weekday::Saturday),
        ] {
            let schedule: Schedule = expression.parse().unwrap();
            let tick = schedule.next_after(after).unwrap().to_zoned(TimeZone::UTC);
            assert_eq!(tick.weekday(), weekday, "{expression}");
        }
    }

    #[test]
    fn six_fields_have_seconds_first() {
        let schedule: Schedule = "*/5 * * * * *".parse().unwrap();
        let next = schedule.next_after("2026-11-22T09:00:03.5Z".parse().unwrap()).unwrap();
        assert_eq!(next.to_string(), "2026-11-22T09:00:05Z");
    }

    #[test]
    fn what_never_comes_is_refused() {
        for refused in ["", "* * *", "61 * * * *", "* * * * MOON", "0 0 30 2 *", "0 0 0 1 1 * 2026"] {
            assert!(refused.parse::<Schedule>().is_err(), "{refused}");
        }
    }

    #[test]
    fn lanes_follow_type_and_haste() {
        assert_eq!(Lane::of(RequestType::Erasure, false), Lane::Erasure);
        assert_eq!(Lane::of(RequestType::Erasure, true), Lane::Expedited);
        assert_eq!(Lane::of(RequestType::Access, true), Lane::Access);
        assert_eq!(Lane::once_approved(RequestType::Erasure), Lane::Expedited);
        assert_eq!(Lane::once_approved(RequestType::Portability), Lane::Access);
    }

    proptest! {
        /// However long nobody looked: the tick is after the receipt, within a week, and asking again at any
        /// instant before that tick gives the same tick. So each instant has exactly one batch.
        #[test]
        fn a_slot_is_the_same_until_its_tick(micros in 0_i64..4_000_000_000_000_000, later in 0_f64..1.0) {
            let received_at = Timestamp::from_microsecond(micros).unwrap();
            for lane in [Lane::Erasure, Lane::Expedited, Lane::Access] {
                let slot = calendar().slot(lane, received_at).unwrap();
                prop_assert!(slot.tick_at > received_at);
                prop_assert!(slot.tick_at.duration_since(received_at) <= SignedDuration::from_hours(7 * 24));
                let gap = slot.tick_at.as_microsecond() - micros;
                #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "a share of a week in µs")]
                let between = Timestamp::from_microsecond(micros + (gap as f64 * later) as i64).unwrap();
                prop_assert_eq!(calendar().slot(lane, between).unwrap().tick_at, slot.tick_at);
            }
        }
    }
}
