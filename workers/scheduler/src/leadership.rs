//! Being the one scheduler that acts. The lease is renewed on the way; every write that moves batches, requests or
//! results checks the epoch in the database, so that a leader that was stopped and woke up is refused there.

use std::time::{Duration, Instant};

use lethe::db::{Db, DbError, leader};
use uuid::Uuid;

/// How long others wait for a leader that does not renew.
const LEASE: Duration = Duration::from_secs(15);

pub(crate) struct Leadership {
    db: Db,
    holder: Uuid,
    current: Option<(i64, Instant)>,
}

impl Leadership {
    pub(crate) fn new(db: Db) -> Self {
        Self { db, holder: Uuid::new_v4(), current: None }
    }

    /// The epoch in which we lead; `None` while another one does. Asks the database only when it is time to renew.
    pub(crate) async fn epoch(&mut self) -> Result<Option<i64>, DbError> {
        if let Some((epoch, renewed)) = self.current
            && renewed.elapsed() < LEASE / 3
        {
            return Ok(Some(epoch));
        }
        let before = self.current.take().map(|(epoch, _)| epoch);
        let asked = Instant::now();
        let epoch = leader::acquire(&self.db, self.holder, LEASE).await?;
        self.current = epoch.map(|epoch| (epoch, asked));
        match (before, epoch) {
            (before, Some(now)) if before != Some(now) => tracing::info!(epoch = now, "leading"),
            (Some(epoch), None) => tracing::warn!(epoch, "another scheduler leads now"),
            _ => {}
        }
        Ok(epoch)
    }

    /// Forgets the epoch, so that the next look asks the database.
    pub(crate) fn doubt(&mut self) {
        self.current = None;
    }

    /// Lets another one lead at once.
    pub(crate) async fn resign(&self) {
        if let Ok(session) = self.db.session().await {
            let _ = leader::resign(&session, self.holder).await;
        }
    }
}
