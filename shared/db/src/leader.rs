//! Leadership of the scheduler: a lease with an epoch that only grows (DESIGN rule 4), and the clock that a leader has
//! seen, since what cannot be undone depends on it (DESIGN rule 5).

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::pool::Session;
use super::{Db, DbError, Tx, statements};

statements! {
    /// Renews the lease of its holder, or takes an expired one over under the next epoch. One that lies further ahead
    /// than any lease reaches was taken by a clock that was ahead. Only a takeover waits for the leader's transactions: a
    /// renewal leaves the epoch as it is.
    ACQUIRE = "
        WITH before AS MATERIALIZED (
            SELECT known_clock, agreements, agreed_clock FROM lethe.leaders WHERE name = 'scheduler'),
        led AS (
            UPDATE lethe.leaders
               SET epoch = CASE WHEN holder = $1 AND expires_at > lethe.now() THEN epoch ELSE epoch + 1 END,
                   holder = $1, expires_at = lethe.now() + make_interval(secs => $2),
                   known_clock = coalesce($3, known_clock)
             WHERE name = 'scheduler'
               AND (holder = $1 OR expires_at <= lethe.now() OR expires_at > lethe.now() + 2 * make_interval(secs => $2))
            RETURNING epoch)
        SELECT (SELECT epoch FROM led), before.known_clock, before.agreements, before.agreed_clock, lethe.wall_clock()
          FROM before";
    RESIGN = "
        UPDATE lethe.leaders SET expires_at = '-infinity', holder = NULL
         WHERE name = 'scheduler' AND holder = $1";
    ASSERT = "SELECT lethe.assert_leader('scheduler', $1)";
    WALL_CLOCK = "SELECT lethe.wall_clock()";
    CLOCK = "
        SELECT lethe.wall_clock(), known_clock, expires_at > lethe.now() AS is_led FROM lethe.leaders WHERE name = 'scheduler'";
    AGREE = "
        UPDATE lethe.leaders
           SET agreements = agreements + 1, agreed_clock = lethe.wall_clock(), known_clock = lethe.wall_clock()
         WHERE name = 'scheduler' RETURNING agreed_clock";
}

/// How far a clock may be ahead of the time that has passed before everything that cannot be undone has to wait.
pub const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_mins(1);

/// What a scheduler sees when it asks for the lead.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The epoch, where it leads.
    pub epoch: Option<i64>,
    /// The last clock that a leader believed.
    pub known: Option<Timestamp>,
    /// How often an operator has agreed to the clock.
    pub agreements: i64,
    /// To which clock the last time.
    pub agreed: Option<Timestamp>,
    /// PostgreSQL's clock, without the shift that tests agree on.
    pub wall: Timestamp,
}

/// The time in office of a leader: its epoch, and the clock that it believes.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    epoch: i64,
    clock: Option<(Timestamp, Instant)>,
}

impl Term {
    /// A term of `epoch`, whose leader believes that it is `clock` just now.
    #[must_use]
    pub fn new(epoch: i64, clock: Timestamp) -> Self {
        Self { epoch, clock: Some((clock, Instant::now())) }
    }

    /// A term that takes the clock as it is: for tests that play the leader.
    #[must_use]
    pub const fn without_clock(epoch: i64) -> Self {
        Self { epoch, clock: None }
    }

    /// Its epoch.
    #[must_use]
    pub const fn epoch(&self) -> i64 {
        self.epoch
    }

    /// How far `wall` is ahead of the time that has passed.
    fn ahead(&self, wall: Timestamp) -> SignedDuration {
        self.clock.map_or(SignedDuration::ZERO, |(clock, at)| {
            let passed = SignedDuration::try_from(at.elapsed()).unwrap_or(SignedDuration::MAX);
            wall.duration_since(clock).saturating_sub(passed)
        })
    }

    /// Fails where `wall`, which PostgreSQL's clock has just shown, is ahead of the time that has passed.
    ///
    /// # Errors
    /// [`DbError::ClockAhead`].
    pub fn check(&self, wall: Timestamp) -> Result<(), DbError> {
        let ahead = self.ahead(wall);
        if ahead > CLOCK_TOLERANCE { Err(DbError::ClockAhead { seconds: ahead.as_secs() }) } else { Ok(()) }
    }
}

/// Asks for the lead, for `lease`; `believed` is remembered as the last clock that a leader believed, where it becomes or
/// stays the leader.
///
/// # Errors
/// [`DbError`].
pub async fn ask(
    session: &Session,
    holder: Uuid,
    lease: Duration,
    believed: Option<Timestamp>,
) -> Result<Seen, DbError> {
    let row = session.query_one(ACQUIRE, &[&holder, &lease.as_secs_f64(), &believed]).await?;
    Ok(Seen {
        epoch: row.get("epoch"),
        known: row.get("known_clock"),
        agreements: row.get("agreements"),
        agreed: row.get("agreed_clock"),
        wall: row.get("wall_clock"),
    })
}

/// Becomes or stays the leader for `lease`; the epoch, or `None` where another one leads.
///
/// # Errors
/// [`DbError`].
pub async fn acquire(db: &Db, holder: Uuid, lease: Duration) -> Result<Option<i64>, DbError> {
    Ok(ask(&db.session().await?, holder, lease, None).await?.epoch)
}

/// Gives the leadership up, so that another one can lead at once.
///
/// # Errors
/// [`DbError`].
pub async fn resign(session: &Session, holder: Uuid) -> Result<(), DbError> {
    session.execute(RESIGN, &[&holder]).await?;
    Ok(())
}

/// Fails unless `epoch` is the current one, and keeps it current until the transaction ends.
///
/// # Errors
/// [`DbError::LeadershipLost`].
pub async fn assert(tx: &Tx, epoch: i64) -> Result<(), DbError> {
    match tx.query(ASSERT, &[&epoch]).await {
        Err(error) if error.code().is_some_and(|code| code.code() == "LT001") => Err(DbError::LeadershipLost),
        other => other.map(drop),
    }
}

/// As [`assert()`], for what cannot be undone: fails as well where the clock is ahead of the time that has passed. To be
/// called once more before the commit: what was done was due by a clock that may have jumped meanwhile.
///
/// # Errors
/// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
pub(crate) async fn assert_term(tx: &Tx, term: &Term) -> Result<(), DbError> {
    assert(tx, term.epoch).await?;
    assert_clock(tx, term).await
}

/// Fails where the clock is ahead of the time that has passed.
///
/// # Errors
/// [`DbError::ClockAhead`].
pub(crate) async fn assert_clock(session: &Session, term: &Term) -> Result<(), DbError> {
    if term.clock.is_none() {
        return Ok(());
    }
    term.check(session.value(WALL_CLOCK, &[]).await?)
}

/// What is known of the clock.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct KnownClock {
    /// PostgreSQL's clock, without the shift that tests agree on.
    pub database: Timestamp,
    /// The last clock that a leader believed; renewed every few seconds while one leads.
    pub believed: Option<Timestamp>,
    /// A scheduler leads just now.
    pub led: bool,
}

impl KnownClock {
    /// How far the clock is ahead of what the leader believes; a lead that nobody renews tells nothing.
    #[must_use]
    pub fn ahead(&self) -> Option<SignedDuration> {
        self.believed.map(|believed| self.database.duration_since(believed))
    }
}

/// What is known of the clock.
///
/// # Errors
/// [`DbError`].
pub async fn clock(session: &Session) -> Result<KnownClock, DbError> {
    let row = session.query_one(CLOCK, &[]).await?;
    Ok(KnownClock { database: row.get("wall_clock"), believed: row.get("known_clock"), led: row.get("is_led") })
}

/// Agrees to PostgreSQL's clock as it is now, on the audit trail; the clock that was agreed to.
///
/// # Errors
/// [`DbError`].
pub async fn agree_to_clock(db: &Db) -> Result<Timestamp, DbError> {
    let tx = db.begin("agree_to_clock").await?;
    let before = clock(&tx).await?;
    let agreed: Timestamp = tx.value(AGREE, &[]).await?;
    let details = serde_json::json!({"clock": agreed, "believed_before": before.believed});
    super::audit::record(&tx, None, None, "clock.agreed", &details).await?;
    tx.commit().await?;
    Ok(agreed)
}
