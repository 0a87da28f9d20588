//! The pool and transactions. Each transaction has a static name, which labels its metrics.

use std::future::Future;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::{
    ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts,
};
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Row, RowStream, SimpleQueryMessage, Statement};

use super::server_error::SWALLOWED;
use super::{DbError, tls};
use lethe_domain::request::ControllerId;

/// A pool of sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Db {
    pool: Pool,
    /// What is known of the server that the sessions of the pool are connected to.
    trust: Arc<Trust>,
    /// Sets the session up for one controller, where the role sees no more (migration V0007).
    acting_for: Option<Arc<str>>,
}

/// How long a statement, a wait for a lock and an idle transaction may take. No parallel workers and no
/// JIT: each statement takes milliseconds, many run at once, and one would gain only what the others lose. A page is
/// assumed to cost the same wherever it lies, as in memory and on solid-state disks: some hundreds of keys are looked
/// up in the index, and a growing table is never read as a whole: a plan that is kept may have been made while it was small.
const SESSION: &str = "-c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s \
                       -c max_parallel_workers_per_gather=0 -c jit=off -c random_page_cost=1.1 -c enable_seqscan=off \
                       -c TimeZone=UTC";

/// What a statement says that is planned for what it is given: that it is about subject data, or that a parameter is optional.
const PLANNED: [&str; 3] = ["subject_data.", "::text IS NULL OR", "::bigint IS NULL OR"];

/// Proves in a session that its settings came through: one that we alone know of, so that nobody overrides it.
const MARK: &str = " -c lethe.session=set";

/// Whether the sessions of a pool can still be used. A server that has become read-only (a failover that left it behind as
/// a standby) answers as ever, and refuses every write; connecting anew leads to its successor.
#[derive(Debug, Default)]
struct Trust {
    /// Sessions from before this are closed rather than used again.
    lost_at: Mutex<Option<Instant>>,
}

impl Trust {
    fn lose(&self) {
        *self.lost_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn covers(&self, connected_at: Instant) -> bool {
        self.lost_at.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|lost_at| connected_at > lost_at)
    }

    /// Passes on what came of a statement, and takes note of a server that writes no more.
    fn heed<T>(&self, outcome: Result<T, tokio_postgres::Error>) -> Result<T, DbError> {
        outcome.map_err(|error| {
            // A session holds statements by name. One whose result was changed by a migration runs in none from before it.
            let lost = [
                &SqlState::READ_ONLY_SQL_TRANSACTION,
                &SqlState::FEATURE_NOT_SUPPORTED,
                &SqlState::INVALID_SQL_STATEMENT_NAME,
            ];
            if error.code().is_some_and(|code| lost.contains(&code)) {
                self.lose();
            }
            DbError::from(error)
        })
    }
}

/// Settings that are given at the start of a session are lost on the way through some poolers: the time-outs, and the role
/// with which the gateway sees the rows of one controller only.
async fn check_settings(client: &tokio_postgres::Client, role: Option<&str>) -> Result<(), HookError> {
    let sql = "SELECT coalesce(current_setting('lethe.session', true), ''), current_user";
    let messages = client.simple_query(sql).await.map_err(HookError::Backend)?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((row.get(0) == Some("set"), row.get(1))),
        _ => None,
    });
    match row {
        Some((true, user)) if role.is_none() || role == user => Ok(()),
        _ => Err(HookError::message(SWALLOWED)),
    }
}

impl Db {
    /// A pool for `url`. Connects only when it is asked for the first session.
    ///
    /// # Errors
    /// [`DbError::Url`] where `url` cannot be used.
    pub fn new(url: &str, connections: u16, application: &str) -> Result<Self, DbError> {
        Self::with_role(url, connections, application, None)
    }

    /// The same under `role`, which the user of `url` must be a member of.
    ///
    /// # Errors
    /// [`DbError::Url`] where `url` cannot be used.
    pub fn with_role(
        url: &str,
        connections: u16,
        application: &str,
        role: Option<&'static str>,
    ) -> Result<Self, DbError> {
        let (mut config, connector) = tls::parse(url)?;
        if config.get_application_name().is_none() {
            config.application_name(application);
        }
        let as_role = role.map_or_else(String::new, |role| format!(" -c role={role}"));
        let given = config.get_options().map_or_else(String::new, |given| format!(" {given}"));
        config.options(format!("{SESSION}{given}{as_role}{MARK}"));
        if !url.contains("target_session_attrs") {
            // Every process writes: a standby among several hosts is passed over.
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        config.connect_timeout(Duration::from_secs(10));
        config.keepalives_idle(Duration::from_secs(30));
        config.tcp_user_timeout(Duration::from_secs(30));
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_config(config, connector, recycling);
        let timeouts = Timeouts {
            wait: Some(Duration::from_secs(30)),
            create: Some(Duration::from_secs(15)),
            recycle: Some(Duration::from_secs(5)),
        };
        let trust = Arc::new(Trust::default());
        let trusted = trust.clone();
        let pool = Pool::builder(manager)
            .post_create(Hook::async_fn(move |client: &mut ClientWrapper, _| {
                Box::pin(async move { check_settings(client, role).await })
            }))
            .pre_recycle(Hook::sync_fn(move |_: &mut ClientWrapper, metrics| {
                let usable = trusted.covers(metrics.created);
                usable.then_some(()).ok_or_else(|| HookError::message("connected to a server that became read-only"))
            }))
            .max_size(connections.into())
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| DbError::Url(format!("the pool cannot be built: {error}")))?;
        Ok(Self { pool, trust, acting_for: None })
    }

    /// The same sessions, acting for one controller: under the gateway's role they see no other's rows.
    #[must_use]
    pub fn acting_for(&self, controller_id: &ControllerId) -> Self {
        // An id needs no quoting: it has neither quotes nor backslashes.
        let setting = format!("lethe.controller_id = '{controller_id}'");
        Self { acting_for: Some(setting.into()), ..self.clone() }
    }

    /// A session for single statements.
    ///
    /// # Errors
    /// [`DbError::Pool`] where none can be had.
    pub async fn session(&self) -> Result<Session, DbError> {
        let session = self.any_session().await?;
        if let Some(setting) = &self.acting_for {
            session.batch_execute(&format!("SET {setting}")).await?;
        }
        Ok(session)
    }

    async fn any_session(&self) -> Result<Session, DbError> {
        Ok(Session { object: self.pool.get().await?, trust: self.trust.clone() })
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// [`DbError`] where no session can be had.
    pub async fn begin(&self, name: &'static str) -> Result<Tx, DbError> {
        self.begin_with(name, "BEGIN").await
    }

    /// Begins a transaction that sees one state of the database and writes nothing.
    ///
    /// # Errors
    /// [`DbError`] where no session can be had.
    pub async fn begin_snapshot(&self, name: &'static str) -> Result<Tx, DbError> {
        self.begin_with(name, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await
    }

    async fn begin_with(&self, name: &'static str, begin: &str) -> Result<Tx, DbError> {
        let started = Instant::now();
        // The guard stands before the first statement: should this future be dropped while `BEGIN` is under way,
        // the session does not go back into the pool.
        let tx = Tx { session: Some(self.any_session().await?), name, started };
        match &self.acting_for {
            Some(setting) => tx.batch_execute(&format!("{begin}; SET LOCAL {setting}")).await?,
            None => tx.batch_execute(begin).await?,
        }
        Ok(tx)
    }

    /// Whether the server answers and takes writes.
    ///
    /// # Errors
    /// [`DbError`] where it does not.
    pub async fn ping(&self) -> Result<(), DbError> {
        let session = self.session().await?;
        if session.value("SELECT current_setting('transaction_read_only')::bool", &[]).await? {
            self.trust.lose();
            return Err(DbError::ReadOnly);
        }
        Ok(())
    }
}

/// A session of the pool.
///
/// A statement is prepared once per session, and its plan is kept where PostgreSQL finds that planning it again gains nothing:
/// look-ups by a key. Two kinds run unnamed and are planned for what they are given (ADR 0041). Those on subject data: a generic
/// plan on partitioned tables would lock the partitions of every controller before it prunes them. And lists with optional
/// filters: a generic plan could not use an index for a filter that may be absent.
#[derive(Debug)]
pub struct Session {
    object: Object,
    trust: Arc<Trust>,
}

impl Session {
    /// When it was connected. What was learnt before may come from another server, which had what this one has lost.
    #[must_use]
    pub fn connected_at(&self) -> Instant {
        Object::metrics(&self.object).created
    }

    /// Runs a statement and returns its rows.
    ///
    /// # Errors
    /// [`DbError::Postgres`].
    pub async fn query(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, DbError> {
        let statement = self.prepared(sql).await?;
        self.trust.heed(if is_kept(sql) {
            self.object.query(&statement, params).await
        } else {
            self.object.query_typed(sql, &typed(&statement, params)).await
        })
    }

    /// Runs a statement and returns its rows as they come in.
    ///
    /// # Errors
    /// [`DbError::Postgres`].
    pub async fn stream(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<RowStream, DbError> {
        let statement = self.prepared(sql).await?;
        self.trust.heed(self.object.query_typed_raw(sql, typed(&statement, params)).await)
    }

    /// Runs a statement that returns at most one row.
    ///
    /// # Errors
    /// [`DbError::Postgres`]; [`DbError::Unexpected`] where there are more.
    pub async fn query_opt(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, DbError> {
        let mut rows = self.query(sql, params).await?;
        let row = rows.pop();
        if rows.is_empty() { Ok(row) } else { Err(DbError::Unexpected { place: "a result: more than one row" }) }
    }

    /// Runs a statement that returns exactly one row.
    ///
    /// # Errors
    /// [`DbError::Postgres`]; [`DbError::Unexpected`] where there is none, or are more.
    pub async fn query_one(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Row, DbError> {
        let row = self.query_opt(sql, params).await?;
        row.ok_or(DbError::Unexpected { place: "a result: no row" })
    }

    /// Runs a statement that returns one row of one column: its value.
    ///
    /// # Errors
    /// [`DbError::Postgres`]; [`DbError::Unexpected`] where the value is of another type.
    pub async fn value<T>(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<T, DbError>
    where
        T: for<'a> FromSql<'a>,
    {
        only_column(&self.query_one(sql, params).await?)
    }

    /// Runs a statement that returns rows of one column: their values.
    ///
    /// # Errors
    /// [`DbError::Postgres`]; [`DbError::Unexpected`] where a value is of another type.
    pub async fn values<T>(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<T>, DbError>
    where
        T: for<'a> FromSql<'a>,
    {
        self.query(sql, params).await?.iter().map(only_column).collect()
    }

    /// Runs a statement and returns the number of rows it changed.
    ///
    /// # Errors
    /// [`DbError::Postgres`].
    pub async fn execute(&self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, DbError> {
        let statement = self.prepared(sql).await?;
        self.trust.heed(if is_kept(sql) {
            self.object.execute(&statement, params).await
        } else {
            self.object.execute_typed(sql, &typed(&statement, params)).await
        })
    }

    /// Prepares a statement, once for each session.
    ///
    /// # Errors
    /// [`DbError::Postgres`].
    pub async fn prepared(&self, sql: &str) -> Result<Statement, DbError> {
        self.trust.heed(self.object.prepare_cached(sql).await)
    }

    /// Runs statements without parameters.
    ///
    /// # Errors
    /// [`DbError::Postgres`].
    pub async fn batch_execute(&self, sql: &str) -> Result<(), DbError> {
        self.trust.heed(self.object.batch_execute(sql).await)
    }

    /// The driver's own client, for streams.
    #[must_use]
    pub fn client(&mut self) -> &mut tokio_postgres::Client {
        &mut self.object
    }

    /// The driver's own client, shared.
    #[must_use]
    pub fn raw(&self) -> &tokio_postgres::Client {
        &self.object
    }
}

/// Columns that may hold what this code does not know: the names of things, which later releases add to.
pub(crate) trait Column {
    /// The value of a column.
    ///
    /// # Errors
    /// [`DbError::Unexpected`] where it is unknown to this code, or `NULL` and `T` has no place for that.
    fn column<'a, T: FromSql<'a>>(&'a self, name: &'static str) -> Result<T, DbError>;
}

impl Column for Row {
    fn column<'a, T: FromSql<'a>>(&'a self, name: &'static str) -> Result<T, DbError> {
        self.try_get(name).map_err(|_| DbError::Unexpected { place: name })
    }
}

fn only_column<'a, T: FromSql<'a>>(row: &'a Row) -> Result<T, DbError> {
    row.try_get(0).map_err(|_| DbError::Unexpected { place: "a result: its only column" })
}

/// Whether the plan of a statement may be kept.
#[must_use]
pub fn is_kept(sql: &str) -> bool {
    !PLANNED.iter().any(|text| sql.contains(text))
}

/// Parameters, each with its type.
fn typed<'a>(statement: &Statement, params: &[&'a (dyn ToSql + Sync)]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().copied().zip(statement.params().iter().cloned()).collect()
}

/// A transaction. Without [`Tx::commit`] it never happened: the session is then closed rather than given back, so
/// that nobody inherits an open transaction.
#[derive(Debug)]
pub struct Tx {
    session: Option<Session>,
    name: &'static str,
    started: Instant,
}

impl Tx {
    /// Commits.
    ///
    /// # Errors
    /// [`DbError::Postgres`]; after a broken connection it is not known whether the commit took place.
    pub async fn commit(mut self) -> Result<(), DbError> {
        self.batch_execute("COMMIT").await?;
        // Only now may the session go back.
        drop(self.session.take());
        metrics::histogram!("lethe_transaction_seconds", "transaction" => self.name)
            .record(self.started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Gives the transaction up and keeps the session.
    pub async fn rollback(mut self) {
        if self.batch_execute("ROLLBACK").await.is_ok() {
            drop(self.session.take());
        }
    }
}

impl Deref for Tx {
    type Target = Session;
    #[expect(
        clippy::expect_used,
        reason = "only commit, rollback and drop take the session, and each of them ends the value"
    )]
    fn deref(&self) -> &Session {
        self.session.as_ref().expect("a transaction has its session until it ends")
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(Session { object, .. }) = self.session.take() {
            metrics::counter!("lethe_transactions_abandoned_total", "transaction" => self.name).increment(1);
            drop(Object::take(object));
        }
    }
}

/// Runs `work` again at once when two transactions were in each other's way (40001, 40P01), a few times.
///
/// # Errors
/// The last error of `work`.
pub async fn retrying<T, F, Fut>(mut work: F) -> Result<T, DbError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, DbError>>,
{
    let mut left = 5;
    loop {
        match work().await {
            Err(error) if error.is_conflict() && left > 0 => left -= 1,
            result => return result,
        }
    }
}
