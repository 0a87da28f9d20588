//! PostgreSQL: the pool, transactions, migrations, and one module for each aggregate with its typed functions.

mod error;
pub mod pool;
mod server_error;
mod stored_result;
mod tls;

pub mod audit;
pub mod batches;
pub mod calendar;
pub mod callback_list;
pub mod callbacks;
pub mod certificates;
pub mod controllers;
pub mod details;
pub mod endpoint_list;
pub mod endpoints;
pub mod give_up;
pub mod installation;
pub mod intake;
pub mod leader;
pub mod leases;
pub mod matching;
pub mod message_failures;
pub mod migrate;
pub mod obstacles;
pub mod overview;
pub mod purge;
pub mod put_off;
pub mod records;
pub mod release;
pub mod reporting;
pub mod request_lists;
pub mod requests;
pub mod results;
pub mod sealed;
pub mod slices;

pub use error::DbError;
pub use pool::{Db, Session, Tx, retrying};
pub use server_error::ServerError;

/// Declares the statements of a module, each by a name, and lists them for the test that prepares them all. The name stands
/// in the text as well, so that the server's log, `pg_stat_activity` and `pg_stat_statements` tell which one it is.
#[macro_export]
macro_rules! statements {
    ($($(#[$doc:meta])* $name:ident = $sql:expr;)+) => {
        $($(#[$doc])* pub(crate) const $name: &str = concat!("/* ", module_path!(), "::", stringify!($name), " */", $sql);)+

        /// Every statement of this module, by name.
        pub const STATEMENTS: &[(&str, &str)] = &[$((stringify!($name), $name)),+];
    };
}

/// Every statement of every module here: a test prepares them on a migrated database.
#[must_use]
pub fn all_statements() -> Vec<(&'static str, &'static str)> {
    [
        audit::STATEMENTS,
        batches::STATEMENTS,
        calendar::STATEMENTS,
        callback_list::STATEMENTS,
        callbacks::STATEMENTS,
        certificates::STATEMENTS,
        controllers::STATEMENTS,
        details::STATEMENTS,
        endpoint_list::STATEMENTS,
        endpoints::STATEMENTS,
        installation::STATEMENTS,
        give_up::STATEMENTS,
        intake::STATEMENTS,
        leader::STATEMENTS,
        leases::STATEMENTS,
        matching::STATEMENTS,
        message_failures::STATEMENTS,
        obstacles::STATEMENTS,
        overview::STATEMENTS,
        purge::STATEMENTS,
        put_off::STATEMENTS,
        records::STATEMENTS,
        release::STATEMENTS,
        request_lists::STATEMENTS,
        requests::STATEMENTS,
        results::STATEMENTS,
        slices::STATEMENTS,
    ]
    .concat()
}
