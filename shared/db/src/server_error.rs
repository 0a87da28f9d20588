//! What the driver says, without what the server quotes.
//!
//! PostgreSQL puts values into the detail of an error (the failing row) and into some messages. Whoever prints an error
//! with its sources, or its debug form, would print them. So the driver's errors are wrapped: they have no source, and
//! both forms show code and message only, the message only where it cannot quote what was sent.

use std::error::Error;
use std::fmt;
use std::ops::Deref;

use deadpool_postgres::{HookError, PoolError};
use tokio_postgres::error::SqlState;

/// An error of the server or of the way to it.
pub struct ServerError(tokio_postgres::Error);

impl Deref for ServerError {
    type Target = tokio_postgres::Error;
    fn deref(&self) -> &tokio_postgres::Error {
        &self.0
    }
}

impl From<tokio_postgres::Error> for ServerError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self(error)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.0))
    }
}

impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.0))
    }
}

impl Error for ServerError {}

/// What the check of a new session says.
pub(super) const SWALLOWED: &str = "the settings of the session did not take effect: a connection pooler in between \
     drops them; connect to PostgreSQL directly (docs/operate/runbook.md, \"A pooler in between\")";

/// Why the pool has no session.
pub struct PoolRefusal(PoolError);

impl From<PoolError> for PoolRefusal {
    fn from(error: PoolError) -> Self {
        Self(error)
    }
}

impl PoolRefusal {
    /// The settings of a new session did not take effect.
    pub(super) const fn is_swallowed(&self) -> bool {
        matches!(self.0, PoolError::PostCreateHook(HookError::Message(_)))
    }
}

impl fmt::Display for PoolRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => {
                f.write_str(&describe(error))
            }
            PoolError::PostCreateHook(HookError::Message(message)) => f.write_str(message),
            error => error.fmt(f),
        }
    }
}

impl fmt::Debug for PoolRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for PoolRefusal {}

/// Why a migration failed: on a database with data, its constraints name rows.
pub struct MigrationFailure(refinery::Error);

impl From<refinery::Error> for MigrationFailure {
    fn from(error: refinery::Error) -> Self {
        Self(error)
    }
}

impl MigrationFailure {
    pub(super) fn code(&self) -> Option<&SqlState> {
        told_by_the_server(&self.0).and_then(tokio_postgres::Error::code)
    }
}

impl fmt::Display for MigrationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refinery::error::Kind::Connection(step, source) = self.0.kind() else { return write!(f, "{}", self.0) };
        match told_by_the_server(source.as_ref()) {
            // What a migration raises are our own words.
            Some(error) if error.code().is_some_and(|code| code.code() == "P0001") => {
                write!(f, "{step}: {}", error.as_db_error().map_or("", |error| error.message()))
            }
            Some(error) => write!(f, "{step}: {}", describe(error)),
            None => f.write_str(step),
        }
    }
}

impl fmt::Debug for MigrationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for MigrationFailure {}

/// What the driver said, however often it was wrapped.
fn told_by_the_server<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a tokio_postgres::Error> {
    let mut chain = std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    chain.find_map(|error| error.downcast_ref())
}

/// Whether a statement RAISE of a function or a trigger made the error: whatever code it gave, the words are its author's.
pub(super) fn is_raised(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| error.routine() == Some("exec_stmt_raise"))
}

/// Errors of data (class 22) quote the value that is wrong, and a trigger's own words may be anything. Others name tables,
/// columns and constraints, in the message; the detail names rows.
fn describe(error: &tokio_postgres::Error) -> String {
    let is_raised = is_raised(error);
    match error.as_db_error() {
        Some(error) => {
            let code = error.code().code();
            if is_raised || code.starts_with("22") || code.starts_with("P0") {
                format!("PostgreSQL said {code} (its message may quote data and is not shown)")
            } else {
                format!("PostgreSQL said {code}: {}", error.message())
            }
        }
        // What the driver was told by others: the system, TLS. Their words are about connections.
        None => match error.source() {
            Some(source) => format!("PostgreSQL: {error}: {source}"),
            None => format!("PostgreSQL: {error}"),
        },
    }
}
