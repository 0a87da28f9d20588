//! Harm to PostgreSQL.

use std::time::Instant;

use lethe_db::{Db, DbError};
use uuid::Uuid;

use super::{Driver, pause};

/// A server that takes over knows sequences as they are written ahead: what it gives out is not what the old one gave out.
const SKIP_NUMBERS: &str = "
    SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, coalesce(last_value, 0) + 32)
      FROM pg_sequences WHERE schemaname = 'lethe'";

impl Driver {
    pub(super) async fn terminate_sessions(&self) {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid()";
        let _ = self.world.attempt(sql, &[]).await;
    }

    /// Longer than some statements wait for a lock, shorter than others.
    pub(super) async fn long_lock(&self, table: &str, millis: u64) {
        let Ok(tx) = self.world.tests.db.begin("chaos").await else { return };
        let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
        if tx.batch_execute(&lock).await.is_ok() {
            pause(millis * 3).await;
        }
        tx.rollback().await;
    }

    /// As after a failover that left the server behind as a standby: it answers, and takes no writes.
    pub(super) async fn read_only(&self, millis: u64) {
        if self.alter_system(&["SET default_transaction_read_only = on"]).await.is_err() {
            return;
        }
        pause(millis).await;
        self.reset(&["RESET default_transaction_read_only"]).await;
    }

    /// A copy of the server as a standby has it that receives no more from now on.
    pub async fn standby(&self) {
        let began = Instant::now();
        assert!(self.world.run_servers(&["standby"]).await, "PostgreSQL cannot be copied; see .local/log");
        *self.copied_at.lock().unwrap() = Some(began);
    }

    /// As after a failover to a server that had not received the last commits: somebody was told that they are durable, and
    /// they are gone.
    pub(super) async fn failover_with_loss(&self, millis: u64) {
        if self.copied_at.lock().unwrap().is_none() {
            self.standby().await;
        }
        pause(millis).await;
        let mark = Uuid::new_v4();
        let marked = self.world.attempt("INSERT INTO chaos.marks VALUES ($1)", &[&mark]).await;
        if !self.world.run_servers(&["failover"]).await {
            self.start_servers().await;
        }
        self.world.patiently(SKIP_NUMBERS, &[]).await;
        let found = self.world.patiently("SELECT FROM chaos.marks WHERE mark = $1", &[&mark]).await;
        assert!(marked.is_err() || found.is_empty(), "a failover that was to lose commits lost none");
        let began = self.copied_at.lock().unwrap().take();
        self.losses.lock().unwrap().extend(began.map(|began| (began, Instant::now())));
    }

    /// Changes settings of the server, which each session then has.
    async fn alter_system(&self, changes: &[&str]) -> Result<(), DbError> {
        // A session of our own is spared, so that somebody can end what is set.
        let spared = "options=-c%20default_transaction_read_only%3Doff";
        let url = format!("{}?{spared}", self.world.tests.database_url);
        let session = Db::new(&url, 1, "chaos")?.session().await?;
        for change in changes {
            session.batch_execute(&format!("ALTER SYSTEM {change}")).await?;
        }
        session.batch_execute("SELECT pg_reload_conf()").await
    }

    async fn reset(&self, changes: &[&str]) {
        for _ in 0..20 {
            if self.alter_system(changes).await.is_ok() {
                return;
            }
            pause(500).await;
        }
        panic!("PostgreSQL keeps settings of the fault suite: {changes:?}");
    }

    pub(super) async fn restart_postgres(&self, hard: bool) {
        if hard {
            self.kill_server("state/postgresql/data/postmaster.pid").await;
        } else {
            self.world.run_servers(&["stop", "postgresql"]).await;
        }
        self.start_servers().await;
    }
}
