//! The calendar in the database: the leading scheduler stores it, everyone else reads it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use jiff::SignedDuration;
use tokio_postgres::Row;

use super::pool::Session;
use super::{Db, DbError, leader, statements};
use lethe_domain::request::Calendar;

statements! {
    /// The calendar of a version, or the one in force.
    LOAD = "
        SELECT version, erasure_schedule, expedited_schedule, access_schedule,
               extract(epoch FROM waiting_period)::float8 AS waiting_period,
               extract(epoch FROM completion_margin)::float8 AS completion_margin,
               extract(epoch FROM details_span)::float8 AS details_span
          FROM lethe.calendars WHERE version = $1 OR $1 IS NULL ORDER BY version DESC LIMIT 1";
    /// Nobody may schedule by the old calendar once the new one is there: intake holds this lock shared.
    LOCK_OUT_INTAKE = "SELECT pg_advisory_xact_lock(lethe.calendar_lock())";
    STORE = "
        INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin,
                                     details_span)
        VALUES ($1, $2, $3, make_interval(secs => $4), make_interval(secs => $5), make_interval(secs => $6))
        RETURNING version";
}

/// A calendar and its version.
#[derive(Clone, Debug)]
pub struct VersionedCalendar {
    /// Grows with each change.
    pub version: i64,
    /// What it says.
    pub calendar: Calendar,
    /// How long a week of details is ([`super::details`]).
    pub details_span: SignedDuration,
}

fn read(row: &Row) -> Result<VersionedCalendar, DbError> {
    let text = |index| row.get::<_, &str>(index);
    Ok(VersionedCalendar {
        version: row.get("version"),
        calendar: Calendar {
            erasure: text(1).parse()?,
            expedited: text(2).parse()?,
            access: text(3).parse()?,
            waiting_period: SignedDuration::from_secs_f64(row.get("waiting_period")),
            completion_margin: SignedDuration::from_secs_f64(row.get("completion_margin")),
        },
        details_span: SignedDuration::from_secs_f64(row.get("details_span")),
    })
}

/// The calendar in force; `None` before a scheduler has stored the first one.
///
/// # Errors
/// [`DbError`].
pub async fn current(session: &Session) -> Result<Option<VersionedCalendar>, DbError> {
    session.query_opt(LOAD, &[&None::<i64>]).await?.as_ref().map(read).transpose()
}

/// Stores `calendar`, and how long a week of details is, unless they are in force already; returns the version and whether it
/// is new.
///
/// # Errors
/// [`DbError::LeadershipLost`] where `epoch` is over.
pub async fn store(
    db: &Db,
    epoch: i64,
    calendar: &Calendar,
    details_span: SignedDuration,
) -> Result<(i64, bool), DbError> {
    let tx = db.begin("store_calendar").await?;
    leader::assert(&tx, epoch).await?;
    tx.query(LOCK_OUT_INTAKE, &[]).await?;
    let stored = match current(&tx).await? {
        Some(stored) if stored.calendar == *calendar && stored.details_span == details_span => (stored.version, false),
        _ => {
            let (erasure, expedited, access) =
                (calendar.erasure.to_string(), calendar.expedited.to_string(), calendar.access.to_string());
            let (wait, margin) = (calendar.waiting_period.as_secs_f64(), calendar.completion_margin.as_secs_f64());
            let span = details_span.as_secs_f64();
            let row = tx.query_one(STORE, &[&erasure, &expedited, &access, &wait, &margin, &span]).await?;
            (row.get("version"), true)
        }
    };
    tx.commit().await?;
    Ok(stored)
}

/// Remembers the last calendar read, and when, since intake needs one for every group.
#[derive(Debug, Default)]
pub(crate) struct CalendarCache(RwLock<Option<(Arc<VersionedCalendar>, Instant)>>);

impl CalendarCache {
    /// The calendar of `version`, read from the database where it is not the one remembered, or was read before the
    /// session was connected: from a server, maybe, that had other calendars.
    ///
    /// # Errors
    /// [`DbError::NoCalendar`] where there is none.
    pub(crate) async fn get(&self, session: &Session, version: Option<i64>) -> Result<Arc<VersionedCalendar>, DbError> {
        let version = version.ok_or(DbError::NoCalendar)?;
        let remembered = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((calendar, read_at)) = remembered
            && calendar.version == version
            && session.connected_at() <= read_at
        {
            return Ok(calendar);
        }
        let read_at = Instant::now();
        let row = session.query_opt(LOAD, &[&Some(version)]).await?.ok_or(DbError::NoCalendar)?;
        let calendar = Arc::new(read(&row)?);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some((calendar.clone(), read_at));
        Ok(calendar)
    }
}
