//! The keys of the days of expiry: once a day is over, its key is destroyed, and with it every file of that day. Only in a key
//! store that was found fit: in one that keeps versions nothing would be destroyed.

use std::time::{Duration, Instant};

use jiff::civil::Date;
use lethe_db::{DbError, results};
use lethe_process::health::Component;
use lethe_results::store::{self, Fitness};
use lethe_runtime::service::Service;

use crate::parts::{Part, Turn};
use crate::scheduler::Scheduler;

/// A key of a day that is over may come late: from a compiler that began before midnight, or out of a backup.
const LOOK_AGAIN: Duration = Duration::from_mins(10);
/// A key store that was found unfit, or cannot be asked, is tried again.
const PROBE_AGAIN: Duration = Duration::from_secs(30);

/// Destroys the keys of days that are over.
pub(crate) struct Days {
    fit: Component,
    probed: Option<(Fitness, Instant)>,
    silent: bool,
    /// The day up to which all are destroyed, and when that was seen.
    done: Option<(Date, Instant)>,
}

impl Days {
    pub(crate) fn new(service: &Service) -> Self {
        let fit = service.health.component("key_store");
        // Until it has answered it counts as fit: one that is away stops nothing else of a scheduler.
        fit.set(true);
        Self { fit, probed: None, silent: false, done: None }
    }

    /// Whether the key store is fit, asked once.
    async fn is_fit(&mut self, scheduler: &Scheduler) -> bool {
        match self.probed {
            Some((fitness, _)) if fitness.is_fit() => return true,
            Some((_, at)) if at.elapsed() < PROBE_AGAIN => return false,
            _ => {}
        }
        match store::probe(&scheduler.ready.key_store, &scheduler.ready.key_store_url).await {
            Ok(fitness) => {
                if !fitness.is_fit() {
                    tracing::error!(
                        found = fitness.as_str(),
                        "the key store cannot be used, and no key is destroyed: see \"The key store\" in docs/operate/keys.md"
                    );
                }
                self.silent = false;
                self.fit.set(fitness.is_fit());
                self.probed = Some((fitness, Instant::now()));
                fitness.is_fit()
            }
            Err(error) => {
                // Told once; an answer is told again.
                if !std::mem::replace(&mut self.silent, true) {
                    tracing::warn!(%error, "the key store cannot be probed; trying again");
                }
                false
            }
        }
    }
}

impl Part for Days {
    const EVERY: Duration = Duration::from_secs(2);

    fn name(&self) -> &'static str {
        "day_keys"
    }

    async fn turn(&mut self, scheduler: &Scheduler) -> Result<Turn, DbError> {
        let Some(term) = scheduler.lead.term() else { return Ok(Turn::Later) };
        if !self.is_fit(scheduler).await {
            return Ok(Turn::Later);
        }
        let today = results::today(&scheduler.service.db.session().await?, &term).await?;
        if self.done.is_some_and(|(day, at)| day == today && at.elapsed() < LOOK_AGAIN) {
            return Ok(Turn::Later);
        }
        match scheduler.ready.day_keys.destroy_before(today).await {
            Ok(destroyed) => {
                if destroyed.days > 0 {
                    tracing::info!(days = destroyed.days, "keys of expiry days destroyed");
                }
                self.done = (destroyed.failed == 0).then(|| (today, Instant::now()));
            }
            Err(error) => tracing::warn!(%error, "keys of expiry days could not be destroyed; trying again"),
        }
        Ok(Turn::Later)
    }
}
