//! Harm to PostgreSQL.

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

    pub(super) async fn restart_postgres(&self, hard: bool) {
        if hard {
            self.kill_server("state/postgresql/data/postmaster.pid").await;
        } else {
            self.world.run_servers(&["stop", "postgresql"]).await;
        }
        self.start_servers().await;
    }
}
