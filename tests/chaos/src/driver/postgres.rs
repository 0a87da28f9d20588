//! Harm to PostgreSQL.

use lethe::db::Db;

use super::{Driver, pause};

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
        // Sessions of our own are spared, so that somebody can end it.
        let spared = "options=-c%20default_transaction_read_only%3Doff";
        let url = format!("{}?{spared}", self.world.tests.database_url);
        let Ok(db) = Db::new(&url, 1, "chaos") else { return };
        let set = async |change: &str| {
            let session = db.session().await?;
            session.batch_execute(&format!("ALTER SYSTEM {change}")).await?;
            session.batch_execute("SELECT pg_reload_conf()").await
        };
        if set("SET default_transaction_read_only = on").await.is_err() {
            return;
        }
        pause(millis).await;
        for _ in 0..20 {
            if set("RESET default_transaction_read_only").await.is_ok() {
                return;
            }
            pause(500).await;
        }
        panic!("PostgreSQL stays read-only");
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
