//! Errors of the database, and what they mean for the work at hand.

use tokio_postgres::error::SqlState;

use super::server_error::{MigrationFailure, PoolRefusal, ServerError, is_raised};
use lethe_domain::crypto::CryptoError;
use lethe_domain::disposition::Disposition;
use lethe_domain::request::calendar::{CalendarExhausted, InvalidSchedule};

/// A statement, a transaction, or the way to the server failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// No connection could be had from the pool.
    #[error("no connection to PostgreSQL: {source}")]
    Pool {
        /// What the pool said.
        source: PoolRefusal,
    },
    /// The server refused or the connection broke.
    #[error("{source}")]
    Postgres {
        /// What the driver said.
        source: ServerError,
    },
    /// The server answers, and takes no writes: a standby, or one that was made read-only.
    #[error("PostgreSQL accepts no writes: it is a standby, or was made read-only")]
    ReadOnly,
    /// The database was used with another master key.
    #[error(
        "the database was used with another master key (LETHE_MASTER_KEY_FILE): nobody else could open what this process seals"
    )]
    OtherMasterKey,
    /// No process has recorded yet which master key the database is used with.
    #[error("it is not known yet which master key the database is used with: start a scheduler, which records its own")]
    NoMasterKey,
    /// The epoch of this leader is over; another one leads.
    #[error("the leadership was lost")]
    LeadershipLost,
    /// The database's clock is ahead of the time that has passed; what cannot be undone waits.
    #[error(
        "PostgreSQL's clock is {seconds} s ahead of the time that has passed: correct it, or accept it with `lethe clock agree`"
    )]
    ClockAhead {
        /// So far.
        seconds: i64,
    },
    /// The lease of this holder is over; another one holds the work.
    #[error("the lease was lost")]
    LeaseLost,
    /// No scheduler has stored a calendar yet.
    #[error("there is no calendar yet: start the scheduler, which stores it")]
    NoCalendar,
    /// The calendar in the database has no next tick.
    #[error(transparent)]
    CalendarExhausted(#[from] CalendarExhausted),
    /// A schedule in the database cannot be read.
    #[error("the calendar in the database cannot be read: {0}")]
    InvalidSchedule(#[from] InvalidSchedule),
    /// Something sealed could not be opened, or sealed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// A row holds what this version of the code does not know.
    #[error("unexpected content in {place}")]
    Unexpected {
        /// Table or column.
        place: &'static str,
    },
    /// The schema is not the one that this version of the code needs.
    #[error("the schema is at version {found}; this release needs {needed}: run `lethe migrate` of the same release")]
    SchemaVersion {
        /// Version in the database; 0 for none.
        found: i32,
        /// Version that the code was built with.
        needed: i32,
    },
    /// The schema is of a later release, which has removed or changed what this code uses.
    #[error(
        "the schema is at version {found}, this release was built for {needed}, and only releases built for {oldest} \
         or later can run: start the worker of the release that migrated the database"
    )]
    SchemaTooNew {
        /// Version in the database.
        found: i32,
        /// Version that the code was built for.
        needed: i32,
        /// What the code must have been built for, at least.
        oldest: i32,
    },
    /// `lethe migrate` of an earlier release than the one that migrated the database.
    #[error(
        "the schema is at version {found}, and the migrations of this release end at {needed}: a later release has migrated \
         the database, so this one has nothing to do"
    )]
    SchemaOfLaterRelease {
        /// Version in the database.
        found: i32,
        /// The last one that this release knows.
        needed: i32,
    },
    /// Others kept hold of what a migration has to lock, for a minute and a half at most.
    #[error(
        "a migration cannot get locks held by others: end long transactions (pg_stat_activity), and run `lethe migrate` again"
    )]
    SchemaInUse,
    /// A migration failed.
    #[error("migration failed: {source}")]
    Migration {
        /// What refinery said.
        source: MigrationFailure,
    },
    /// `DATABASE_URL` cannot be used.
    #[error("{0}")]
    Url(String),
}

impl From<tokio_postgres::Error> for DbError {
    fn from(source: tokio_postgres::Error) -> Self {
        Self::Postgres { source: source.into() }
    }
}

impl From<deadpool_postgres::PoolError> for DbError {
    fn from(source: deadpool_postgres::PoolError) -> Self {
        Self::Pool { source: source.into() }
    }
}

impl From<refinery::Error> for DbError {
    fn from(source: refinery::Error) -> Self {
        Self::Migration { source: source.into() }
    }
}

impl DbError {
    /// The SQLSTATE, where the server gave one.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Postgres { source } => source.code(),
            Self::Migration { source } => source.code(),
            _ => None,
        }
    }

    /// A short class for metrics, receipts and logs; never a value.
    #[must_use]
    pub fn class(&self) -> String {
        match (self, self.code()) {
            (_, Some(code)) => format!("sqlstate_{}", code.code()),
            (Self::LeaseLost, _) => "lease_lost".to_owned(),
            (Self::LeadershipLost, _) => "leadership_lost".to_owned(),
            (Self::ClockAhead { .. }, _) => "clock_ahead".to_owned(),
            (Self::Crypto(_), _) => "sealed_data".to_owned(),
            (Self::ReadOnly, _) => "read_only".to_owned(),
            (Self::Pool { .. } | Self::Postgres { .. }, None) => "connection".to_owned(),
            _ => "configuration".to_owned(),
        }
    }

    /// The process is not configured as it must be, and waiting does not change that.
    #[must_use]
    pub const fn is_misconfiguration(&self) -> bool {
        match self {
            Self::Pool { source } => source.is_swallowed(),
            _ => matches!(self, Self::OtherMasterKey),
        }
    }

    /// Two transactions were in each other's way; the same one can be run again at once.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code().is_some_and(|code| {
            *code == SqlState::T_R_SERIALIZATION_FAILURE || *code == SqlState::T_R_DEADLOCK_DETECTED
        })
    }

    /// The statement was too much for the server (time, memory, locks); half of it may not be.
    #[must_use]
    pub fn is_too_much(&self) -> bool {
        self.code().is_some_and(|code| *code == SqlState::QUERY_CANCELED || code.code().starts_with("53"))
    }

    /// Whether a single item among several may be the cause; the others are then tried without it. An error that did
    /// not come from the server is one of the connection, unless it is about the content of a row.
    #[must_use]
    pub fn may_be_one_item(&self) -> bool {
        let is_of_data = self.code().is_some() || matches!(self, Self::Unexpected { .. });
        self.is_too_much() || (is_of_data && self.disposition() != Disposition::Transient)
    }

    /// A function or a trigger raised it, with whatever code.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        matches!(self, Self::Postgres { source } if is_raised(source))
    }

    /// What it means for the work at hand.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match (self, self.code()) {
            (Self::Postgres { .. }, Some(code)) if mends_itself(code) => Disposition::Transient,
            (Self::Postgres { .. }, Some(code)) => match code.code().get(..2) {
                // Connection, roll-back, resources, operator intervention, system.
                Some("08" | "40" | "53" | "57" | "58") => Disposition::Transient,
                // Data exception, integrity, program limit.
                Some("22" | "23" | "54") => Disposition::Poison,
                _ => Disposition::Permanent,
            },
            (Self::Crypto(CryptoError::Unopenable), _) => Disposition::Poison,
            (
                Self::Pool { .. }
                | Self::Postgres { .. }
                | Self::ReadOnly
                | Self::NoMasterKey
                | Self::NoCalendar
                | Self::LeaseLost
                | Self::LeadershipLost
                | Self::ClockAhead { .. },
                None,
            ) => Disposition::Transient,
            _ => Disposition::Permanent,
        }
    }
}

/// Of class 55, the state of an object, only what somebody else holds is given back by itself. And a session to a server
/// that has become read-only is closed; the next one leads to a server that writes.
fn mends_itself(code: &SqlState) -> bool {
    [SqlState::LOCK_NOT_AVAILABLE, SqlState::OBJECT_IN_USE, SqlState::READ_ONLY_SQL_TRANSACTION].contains(code)
}
