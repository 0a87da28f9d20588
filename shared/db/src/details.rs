//! What is personal in requests: the sealed texts and the profiles, apart from the requests themselves and by the week in which
//! they are needed. Their end is that of their week (ADR 0042, [`super::purge`]).
//!
//! Statements that look for the details of many requests do it one by one (`OFFSET 0` is a fence to the planner): a plan that
//! is kept must not read a week as a whole.
//!
//! The week of a request is the one in which its batch runs, with a seventh of a week for the batch to end in. So hardly
//! anything has to move on to another week because it has not ended yet.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use tokio_postgres::Row;

use super::pool::Session;
use super::{DbError, Tx, statements};
use lethe_domain::request::{ControllerId, Mpid, RequestKey};

statements! {
    OPEN_WEEK = "SELECT week, starts_at, ends_at FROM lethe.open_week($1)";
    WEEK_OF = "SELECT week, starts_at, ends_at FROM lethe.week_of($1)";
    /// Lists of profiles are written as texts: arrays of arrays would have to be of one length.
    INSERT_DETAILS = "
        INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, sealed_reporting, named, at_receipt)
        SELECT week, request_key, controller_id, sealed_request, sealed_reporting, named::bigint[], at_receipt::bigint[]
          FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bytea[], $5::bytea[], $6::text[], $7::text[])
               AS q (week, request_key, controller_id, sealed_request, sealed_reporting, named, at_receipt)";
    /// What was matched at the release, and not before.
    ADD_RELEASED = "
        UPDATE lethe.request_details d
           SET at_release = coalesce(d.at_release, '{}') || q.mpids::bigint[]
          FROM unnest($1::bigint[], $2::bigint[], $3::text[]) AS q (week, request_key, mpids)
         WHERE d.week = q.week AND d.request_key = q.request_key";
}

/// How long a week of details is, where requests are kept for so long after their end: they go with their week.
#[must_use]
pub fn span(retention: SignedDuration) -> SignedDuration {
    retention.clamp(SignedDuration::from_secs(1), SignedDuration::from_hours(7 * 24))
}

/// In which week the details of a request are kept whose batch runs at an instant.
pub(super) fn place(runs_at: Timestamp, span: SignedDuration) -> Timestamp {
    runs_at.checked_add(span / 7).unwrap_or(runs_at)
}

/// A week that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Week {
    pub(super) number: i64,
    starts_at: Timestamp,
    ends_at: Timestamp,
}

impl Week {
    pub(super) fn holds(&self, instant: Timestamp) -> bool {
        (self.starts_at..self.ends_at).contains(&instant)
    }
}

/// The week of an instant that is to come, opened where it is not there.
pub(super) async fn open_week(session: &Session, instant: Timestamp) -> Result<Week, DbError> {
    Ok(read_week(&session.query_one(OPEN_WEEK, &[&instant]).await?))
}

/// The same of any instant: for what moves on.
pub(super) async fn week_of(session: &Session, instant: Timestamp) -> Result<Week, DbError> {
    Ok(read_week(&session.query_one(WEEK_OF, &[&instant]).await?))
}

fn read_week(row: &Row) -> Week {
    Week { number: row.get("week"), starts_at: row.get("starts_at"), ends_at: row.get("ends_at") }
}

/// The weeks that are known, and when each was read.
#[derive(Debug, Default)]
pub(super) struct WeekCache(Mutex<Vec<(Week, Instant)>>);

impl WeekCache {
    /// The week of an instant, where it is known of the server that the session is connected to.
    pub(super) fn find(&self, session: &Session, instant: Timestamp) -> Option<Week> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .find(|(week, read_at)| week.holds(instant) && session.connected_at() <= *read_at)
            .map(|(week, _)| *week)
    }

    /// Remembers weeks that were read in a transaction, once it is committed. Those that are over are forgotten.
    pub(super) fn remember(&self, weeks: &[Week], read_at: Instant, now: Timestamp) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(week, _)| week.ends_at > now && !weeks.contains(week));
        known.extend(weeks.iter().map(|week| (*week, read_at)));
    }

    /// Forgets all: one of them has been dropped.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The details of a request that is new.
#[derive(Debug)]
pub(super) struct Details<'a> {
    pub(super) week: i64,
    pub(super) request_key: RequestKey,
    pub(super) controller_id: &'a ControllerId,
    pub(super) sealed_request: &'a [u8],
    pub(super) sealed_reporting: &'a [u8],
    pub(super) named: &'a [Mpid],
    pub(super) at_receipt: Vec<Mpid>,
}

/// Inserts the details of requests that were inserted in the same transaction.
pub(super) async fn insert(tx: &Tx, details: &[Details<'_>]) -> Result<(), DbError> {
    let weeks: Vec<i64> = details.iter().map(|one| one.week).collect();
    let keys: Vec<RequestKey> = details.iter().map(|one| one.request_key).collect();
    let controllers: Vec<&str> = details.iter().map(|one| one.controller_id.as_str()).collect();
    let sealed: Vec<&[u8]> = details.iter().map(|one| one.sealed_request).collect();
    let reporting: Vec<&[u8]> = details.iter().map(|one| one.sealed_reporting).collect();
    let named: Vec<Option<String>> = details.iter().map(|one| as_text(one.named)).collect();
    let at_receipt: Vec<Option<String>> = details.iter().map(|one| as_text(&one.at_receipt)).collect();
    tx.execute(INSERT_DETAILS, &[&weeks, &keys, &controllers, &sealed, &reporting, &named, &at_receipt]).await?;
    Ok(())
}

/// Profiles of a request that were found at its release, and the week of its details.
#[derive(Debug)]
pub(super) struct FoundAtRelease {
    pub(super) week: i64,
    pub(super) request_key: RequestKey,
    pub(super) mpids: Vec<Mpid>,
}

/// Adds profiles that were found at the release of requests that are locked.
pub(super) async fn add_released(tx: &Tx, found: &[FoundAtRelease]) -> Result<(), DbError> {
    if found.is_empty() {
        return Ok(());
    }
    let weeks: Vec<i64> = found.iter().map(|one| one.week).collect();
    let keys: Vec<RequestKey> = found.iter().map(|one| one.request_key).collect();
    let mpids: Vec<Option<String>> = found.iter().map(|one| as_text(&one.mpids)).collect();
    tx.execute(ADD_RELEASED, &[&weeks, &keys, &mpids]).await?;
    Ok(())
}

/// A list as PostgreSQL writes one; nothing for none.
fn as_text(mpids: &[Mpid]) -> Option<String> {
    let numbers: Vec<String> = mpids.iter().map(|mpid| mpid.0.to_string()).collect();
    (!numbers.is_empty()).then(|| format!("{{{}}}", numbers.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_week_is_seven_days_or_the_retention_where_that_is_shorter() {
        let days = |days: i64| SignedDuration::from_hours(24 * days);
        assert_eq!([span(days(30)), span(days(7)), span(days(2))], [days(7), days(7), days(2)]);
        assert_eq!(span(SignedDuration::ZERO), SignedDuration::from_secs(1));
        let monday: Timestamp = "2026-11-30T12:30:00Z".parse().unwrap();
        assert_eq!(place(monday, days(7)), "2026-12-01T12:30:00Z".parse().unwrap(), "a day for the batch to end in");
    }
}
