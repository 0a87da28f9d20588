//! Being the one scheduler that acts. The lead is renewed by a task of its own, so that no wait elsewhere
//! can cost it; every write that moves batches, requests or results checks the epoch in the database, so that a leader that
//! was stopped and woke up is refused there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use lethe_db::leader::{self, Term};
use lethe_db::{Db, DbError};
use lethe_runtime::service::Service;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::{Guard, uptime};

/// How long others wait for a leader that does not renew.
const LEASE: Duration = Duration::from_secs(15);
/// How often a clock that is doubted is looked at.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(1);
/// A loop that has not come around for this long is stuck: another scheduler may do better.
const STUCK: Duration = Duration::from_mins(5);

/// The lead, as all parts of the scheduler see it. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lead(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Somebody doubts what we know.
    asked: Notify,
    /// It is known who leads.
    known: Notify,
}

#[derive(Debug)]
struct State {
    /// The epoch, and when we asked for it.
    held: Option<(i64, Instant)>,
    guard: Guard,
    /// When the loop last came around; `None` before its first time.
    progress: Option<Instant>,
}

impl Lead {
    /// Nobody's yet.
    pub(crate) fn new(absence: SignedDuration) -> Self {
        let state = State { held: None, guard: Guard::new(absence), progress: None };
        Self(Arc::new(Shared { state: Mutex::new(state), asked: Notify::new(), known: Notify::new() }))
    }

    fn with<T>(&self, read: impl FnOnce(&mut State) -> T) -> T {
        read(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The epoch in which we lead, whatever the clock: for what can be done again, and undone.
    pub(crate) fn epoch(&self) -> Option<i64> {
        self.with(|state| state.held.filter(|(_, asked)| asked.elapsed() < LEASE).map(|(epoch, _)| epoch))
    }

    /// The term in which we lead, where the clock is believed: for what cannot be undone.
    pub(crate) fn term(&self) -> Option<Term> {
        let epoch = self.epoch()?;
        let at = uptime()?;
        let clock = self.with(|state| state.guard.ahead().is_none().then(|| state.guard.expected(at)))??;
        Some(Term::new(epoch, clock))
    }

    /// Something has failed that shows that another one leads, or that the clock has jumped: it is asked anew at once.
    pub(crate) fn doubt(&self, error: &DbError) {
        if matches!(error, DbError::LeadershipLost) {
            self.with(|state| state.held = None);
        }
        if matches!(error, DbError::LeadershipLost | DbError::ClockAhead { .. }) {
            self.0.asked.notify_one();
        }
    }

    /// Waits until it is known for the first time who leads.
    pub(crate) async fn known(&self) {
        self.0.known.notified().await;
    }

    /// The loop has come around.
    pub(crate) fn progress(&self) {
        self.with(|state| state.progress = Some(Instant::now()));
    }

    /// Keeps the lead, or waits for it, until all is `done`; then lets another one lead at once.
    pub(crate) async fn keep(self, service: Service, interval: Duration, done: CancellationToken) {
        let holder = Uuid::new_v4();
        let believed = service.health.component("clock");
        believed.set(true);
        let mut failing = false;
        while !done.is_cancelled() {
            let asked = self.ask(&service.db, holder).await;
            if asked.is_err() != failing {
                failing = asked.is_err();
                match &asked {
                    Ok(()) => tracing::info!("can ask for the lead again"),
                    Err(error) => tracing::warn!(%error, "cannot ask for the lead; trying again"),
                }
            }
            let ahead = self.with(|state| state.guard.ahead());
            tell_clock(ahead, believed.set(ahead.is_none()));
            let pause = match (self.epoch().is_some(), ahead) {
                (_, Some(_)) => LOOK_AT_CLOCK,
                (true, None) if !failing => LEASE / 3,
                _ => interval,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.0.asked.notified() => {}
                () = done.cancelled() => {}
            }
        }
        if let Ok(session) = service.db.session().await {
            let _ = leader::resign(&session, holder).await;
        }
    }

    async fn ask(&self, db: &Db, holder: Uuid) -> Result<(), DbError> {
        let (before, progress) = self.with(|state| (state.held, state.progress));
        if progress.is_some_and(|since| since.elapsed() > STUCK) {
            if before.is_some() {
                tracing::error!("the loop has made no round for minutes; another scheduler may lead");
                self.with(|state| state.held = None);
                leader::resign(&db.session().await?, holder).await?;
            }
            return Ok(());
        }
        let session = db.session().await?;
        let expected = uptime().and_then(|at| self.with(|state| state.guard.expected(at)));
        let asked = Instant::now();
        let seen = leader::ask(&session, holder, LEASE, expected).await?;
        self.with(|state| {
            // What was believed is measured from the answer: until then the clock may have gone on.
            // A clock of our own that cannot be read judges nothing: until it can there is no term.
            if let Some(at) = uptime() {
                state.guard.judge(&seen, Timestamp::now(), at);
            }
            state.held = seen.epoch.map(|epoch| (epoch, asked));
        });
        self.0.known.notify_one();
        match (before.map(|(epoch, _)| epoch), seen.epoch) {
            (before, Some(now)) if before != Some(now) => tracing::info!(epoch = now, "leading"),
            (Some(epoch), None) => tracing::warn!(epoch, "another scheduler leads now"),
            _ => {}
        }
        if let Some(epoch) = seen.epoch {
            #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; epochs stay far below 2^52")]
            metrics::gauge!("lethe_leader_epoch").set(epoch as f64);
        }
        Ok(())
    }
}

fn tell_clock(ahead: Option<SignedDuration>, changed: bool) {
    metrics::gauge!("lethe_clock_ahead_seconds").set(ahead.map_or(0.0, |ahead| ahead.as_secs_f64()));
    match ahead {
        Some(ahead) if changed => tracing::error!(
            seconds = ahead.as_secs(),
            "PostgreSQL's clock is ahead of the time that has passed: nothing is closed, released, expired, destroyed or purged until it is right again, or is accepted with `lethe clock agree`"
        ),
        None if changed => tracing::info!("PostgreSQL's clock is believed again"),
        _ => {}
    }
}
