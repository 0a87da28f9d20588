//! Leases on slices: claiming, renewing, giving back, waking. [`super::slices`] has all of it as well.
//!
//! **Invariant** (DESIGN rule 4): every write of a holder checks the token of its lease.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

use super::pool::Session;
use super::{Db, DbError, statements};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::disposition::Disposition;
use lethe_domain::request::{ControllerId, SliceId, Stage};
use lethe_process::fault;

statements! {
    CLAIM = "
        SELECT slice_id, controller_id, lease_token, attempts, started_at, writers, paused_before
          FROM lethe.claim_slice($1, $2, $3, $4)";
    HOLD = "
        UPDATE lethe.slices SET lease_expires_at = lethe.now() + make_interval(secs => $3)
         WHERE slice_id = $1 AND lease_token = $2 AND state = 'ready'";
    RETRY_LATER = "
        UPDATE lethe.slices
           SET lease_token = NULL, lease_expires_at = NULL, last_error = $4, needs_operator = $5,
               last_nudged_at = '-infinity', nudges = 0, next_attempt_at = lethe.now() + make_interval(secs => $3)
         WHERE slice_id = $1 AND lease_token = $2 AND state = 'ready'";
    /// Slices that were under way together fail together: that counts once.
    COUNT_FAILURE = "
        INSERT INTO lethe.pauses AS p (stage, controller_id, class, since, paused_at, paused_until)
        VALUES ($1, $2, $3, lethe.now(), lethe.now(), lethe.now())
        ON CONFLICT (stage, controller_id) DO UPDATE
           SET failures = p.failures + (excluded.paused_at NOT BETWEEN p.paused_at AND p.paused_until)::integer,
               class = excluded.class
        RETURNING failures, paused_at = paused_until OR lethe.now() NOT BETWEEN paused_at AND paused_until AS begins";
    PAUSE = "
        UPDATE lethe.pauses SET paused_at = lethe.now(), paused_until = lethe.now() + make_interval(secs => $3)
         WHERE stage = $1 AND controller_id = $2";
    RESUME = "DELETE FROM lethe.pauses WHERE stage = $1 AND controller_id = $2";
    /// Due, unleased, and not woken for a while; the wait doubles each time, up to five minutes. Nothing of a controller
    /// that is paused; after its pause one slice at a time.
    TO_WAKE = "
        WITH due AS MATERIALIZED (
            SELECT s.slice_id, s.stage, s.controller_id, s.next_attempt_at
              FROM lethe.slices s CROSS JOIN (SELECT lethe.now()) AS clock (instant)
             WHERE s.stage = $1 AND s.state = 'ready' AND s.next_attempt_at <= (SELECT lethe.now())
               AND (s.lease_expires_at IS NULL
                    OR s.lease_expires_at NOT BETWEEN instant AND instant + make_interval(secs => $4))
               AND s.last_nudged_at NOT BETWEEN instant - make_interval(secs => least($2 * power(2, least(s.nudges, 10)), 300))
                                            AND instant
               AND NOT EXISTS (
                    SELECT FROM lethe.pauses p
                     WHERE p.stage = s.stage AND p.controller_id = s.controller_id
                       AND ((p.paused_at <= instant AND p.paused_until > instant)
                            OR EXISTS (SELECT FROM lethe.slices l
                                        WHERE l.stage = s.stage AND l.controller_id = s.controller_id AND l.state = 'ready'
                                          AND l.lease_token IS NOT NULL
                                          AND l.lease_expires_at BETWEEN instant AND instant + make_interval(secs => $4))))
             ORDER BY s.next_attempt_at LIMIT $3 FOR UPDATE OF s SKIP LOCKED),
        in_turn AS (
            SELECT slice_id, row_number() OVER (PARTITION BY controller_id ORDER BY next_attempt_at) AS place,
                   EXISTS (SELECT FROM lethe.pauses p
                            WHERE p.stage = due.stage AND p.controller_id = due.controller_id) AS probes
              FROM due)
        UPDATE lethe.slices SET last_nudged_at = lethe.now(), nudges = nudges + 1
         WHERE slice_id IN (SELECT slice_id FROM in_turn WHERE place = 1 OR NOT probes)
        RETURNING slice_id";
    WRITERS = "SELECT lethe.writers($1)";
    KEEP_WRITERS = "
        UPDATE lethe.slices SET writers = $3 WHERE slice_id = $1 AND lease_token = $2";
}

/// How long a lease lasts; it is renewed by every step, and by [`keep_alive`] during long ones.
pub const LEASE: Duration = Duration::from_mins(1);

/// A leased slice.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Which one.
    pub slice_id: SliceId,
    /// Whose requests.
    pub controller_id: ControllerId,
    /// The start of its execution: what was received up to here is covered.
    pub as_of: Timestamp,
    /// This claim included.
    pub attempts: i32,
    /// The transactions that were writing to the controller's tables at the start of the execution and were not seen to
    /// end. An erasure waits for them and for no others.
    pub writers: Vec<String>,
    stage: Stage,
    token: Uuid,
    /// Earlier work of this controller failed, and this one shows whether it goes on.
    paused_before: bool,
    /// When the lease was last renewed, by whichever session.
    renewed_at: Arc<Mutex<Instant>>,
}

impl Claimed {
    /// The token of this lease, a fresh one for every claim.
    #[must_use]
    pub const fn token(&self) -> Uuid {
        self.token
    }

    fn renewed_at(&self) -> Instant {
        *self.renewed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose turn it is, as far as the claiming process knows.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// The controller that this process served last; equals come behind it.
    pub served_last: Option<ControllerId>,
    /// Controllers that use up their share of this process.
    pub at_limit: Vec<ControllerId>,
}

/// Claims the oldest due slice of the controller with the fewest leases in force; `None` if none is due.
///
/// # Errors
/// [`DbError`].
pub async fn claim(session: &Session, stage: Stage, turn: &Turn) -> Result<Option<Claimed>, DbError> {
    let served_last = turn.served_last.as_ref().map_or("", |id| id.as_str());
    let at_limit: Vec<&str> = turn.at_limit.iter().map(ControllerId::as_str).collect();
    let row = session.query_opt(CLAIM, &[&stage, &LEASE.as_secs_f64(), &served_last, &at_limit]).await?;
    row.map(|row| {
        let controller_id = row.get::<_, &str>("controller_id").parse();
        Ok(Claimed {
            slice_id: row.get("slice_id"),
            controller_id: controller_id.map_err(|_| DbError::Unexpected { place: "slices.controller_id" })?,
            token: row.get("lease_token"),
            attempts: row.get("attempts"),
            as_of: row.get("started_at"),
            writers: row.get::<_, Option<_>>("writers").unwrap_or_default(),
            paused_before: row.get("paused_before"),
            stage,
            renewed_at: Arc::new(Mutex::new(Instant::now())),
        })
    })
    .transpose()
}

/// Checks that the lease is still ours, renews it, and keeps others from taking it until the transaction ends.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn hold(session: &Session, claimed: &Claimed) -> Result<(), DbError> {
    let began = Instant::now();
    match session.execute(HOLD, &[&claimed.slice_id, &claimed.token, &LEASE.as_secs_f64()]).await? {
        0 if !fault::defect("no_lease_check") => Err(DbError::LeaseLost),
        _ => {
            *claimed.renewed_at.lock().unwrap_or_else(PoisonError::into_inner) = began;
            Ok(())
        }
    }
}

/// Renews the lease again and again. Ends only with an error: when the lease is lost, or was renewed by nobody in time.
/// Run it beside the work and stop the work when it ends.
pub async fn keep_alive(db: &Db, claimed: &Claimed) -> DbError {
    loop {
        tokio::time::sleep(LEASE / 4).await;
        // A step holds the slice until it ends: then this waits for it, in vain if the step takes long.
        let renewed = async { hold(&db.session().await?, claimed).await }.await;
        match renewed {
            Err(DbError::LeaseLost) => return DbError::LeaseLost,
            Err(error) if claimed.renewed_at().elapsed() > LEASE * 3 / 4 => return error,
            Ok(()) | Err(_) => {}
        }
    }
}

/// What keeps a slice from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// This slice cannot be worked on now; others of its controller may.
    Slice,
    /// Writers from before the start are under way. Nothing was touched, so it is not known whether the controller's data
    /// can be worked on.
    Writers,
    /// The controller's data cannot be worked on now: locked, slow, away.
    Controller,
    /// Waiting does not mend it.
    Operator,
}

impl Trouble {
    /// Who is affected by an error of the database. A lock, a time-out, a lost connection or a full server affects all
    /// other work on the same data; an unreadable block, for instance, does not.
    #[must_use]
    pub fn of(error: &DbError) -> Self {
        match (error.disposition(), error.code()) {
            (Disposition::Transient, Some(code)) if code.code().starts_with("58") => Self::Slice,
            (Disposition::Transient, _) => Self::Controller,
            (Disposition::Permanent | Disposition::Poison, _) => Self::Operator,
        }
    }
}

/// Gives a slice back after a failure: it is tried again after a wait that grows with its attempts. In [trouble] of its
/// controller, nothing of that controller is claimed for a wait that grows with the failures in a row. `random` is the
/// jitter. Returns the wait of the slice.
///
/// [trouble]: Trouble::Controller
///
/// # Errors
/// [`DbError`].
pub async fn give_back(
    db: &Db,
    claimed: &Claimed,
    backoff: BackoffPolicy,
    trouble: Trouble,
    class: &str,
    random: f64,
) -> Result<Duration, DbError> {
    let wait = |failures: i32| backoff.delay(u32::try_from(failures).unwrap_or(1), random);
    let delay = wait(claimed.attempts);
    let operator = trouble == Trouble::Operator;
    let tx = db.begin("give_back_slice").await?;
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&claimed.slice_id, &claimed.token, &delay.as_secs_f64(), &class, &operator];
    if tx.execute(RETRY_LATER, &params).await? == 1 {
        if trouble == Trouble::Controller {
            let of = (claimed.stage, &claimed.controller_id);
            let counted = tx.query_one(COUNT_FAILURE, &[&of.0, of.1, &class]).await?;
            let (failures, begins): (i32, bool) = (counted.get("failures"), counted.get("begins"));
            if begins {
                tx.execute(PAUSE, &[&of.0, of.1, &wait(failures).as_secs_f64()]).await?;
            }
        } else if claimed.paused_before && trouble != Trouble::Writers {
            tx.execute(RESUME, &[&claimed.stage, &claimed.controller_id]).await?;
        }
    }
    tx.commit().await?;
    Ok(delay)
}

/// After an attempt that ended well: the controller's other work goes on, if it was paused.
///
/// # Errors
/// [`DbError`].
pub async fn went_well(db: &Db, claimed: &Claimed) -> Result<(), DbError> {
    if claimed.paused_before {
        db.session().await?.execute(RESUME, &[&claimed.stage, &claimed.controller_id]).await?;
    }
    Ok(())
}

/// Slices of a stage that are due and untouched, at most `limit`; none twice within the pause, which grows.
///
/// # Errors
/// [`DbError`].
pub async fn to_wake(session: &Session, stage: Stage, pause_seconds: f64, limit: i64) -> Result<Vec<SliceId>, DbError> {
    // One that was renewed meanwhile ends a little later than one from now.
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&stage, &pause_seconds, &limit, &(2 * LEASE).as_secs_f64()];
    session.values(TO_WAKE, &params).await
}

/// The transactions that hold a write lock on the controller's tables now.
///
/// # Errors
/// [`DbError`].
pub async fn writers(session: &Session, controller_id: &ControllerId) -> Result<Vec<String>, DbError> {
    session.value(WRITERS, &[controller_id]).await
}

/// Remembers with the slice which of its writers are left.
///
/// # Errors
/// [`DbError::LeaseLost`].
pub async fn keep_writers(session: &Session, claimed: &Claimed, left: &[String]) -> Result<(), DbError> {
    match session.execute(KEEP_WRITERS, &[&claimed.slice_id, &claimed.token, &left]).await? {
        0 => Err(DbError::LeaseLost),
        _ => Ok(()),
    }
}
