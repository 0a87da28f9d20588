//! What is put off further than anything waits was put off by a clock that was ahead. Nobody would look at it before that clock
//! is reached, so it is brought back to the longest wait that there is (ADR 0033).

use std::time::Duration;

use super::leader::{self, Term};
use super::{Db, DbError, statements};

statements! {
    /// The endpoints that have something ready are read one by one from the index. What is locked is in use, and not stuck.
    CALLBACKS = "
        WITH RECURSIVE found AS (
            (SELECT endpoint_id FROM lethe.callbacks WHERE state = 'ready' ORDER BY endpoint_id LIMIT 1)
            UNION ALL
            SELECT next.endpoint_id
              FROM found CROSS JOIN LATERAL (
                SELECT c.endpoint_id FROM lethe.callbacks c
                 WHERE c.state = 'ready' AND c.endpoint_id > found.endpoint_id
                 ORDER BY c.endpoint_id LIMIT 1) next),
        latest AS MATERIALIZED (SELECT lethe.now() + make_interval(secs => $1) AS instant),
        chosen AS MATERIALIZED (
            SELECT l.callback_id FROM lethe.callbacks l
             WHERE l.callback_id = ANY (ARRAY (
                SELECT beyond.callback_id FROM found
                 CROSS JOIN LATERAL (
                    SELECT c.callback_id FROM lethe.callbacks c
                     WHERE c.endpoint_id = found.endpoint_id AND c.state = 'ready'
                       AND c.next_attempt_at > (SELECT instant FROM latest)
                     ORDER BY c.next_attempt_at LIMIT $2) beyond
                 LIMIT $2))
               AND l.state = 'ready' AND l.next_attempt_at > (SELECT instant FROM latest)
               FOR UPDATE SKIP LOCKED)
        UPDATE lethe.callbacks c SET next_attempt_at = (SELECT instant FROM latest)
          FROM chosen WHERE c.callback_id = chosen.callback_id";
    /// Only those that fail are held.
    ENDPOINTS = "
        WITH latest AS MATERIALIZED (SELECT lethe.now() + make_interval(secs => $1) AS instant),
        chosen AS MATERIALIZED (
            SELECT endpoint_id FROM lethe.endpoints
             WHERE consecutive_failures > 0 AND open_until > (SELECT instant FROM latest)
             LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED)
        UPDATE lethe.endpoints e SET open_until = (SELECT instant FROM latest)
          FROM chosen WHERE e.endpoint_id = chosen.endpoint_id";
    SLICES = "
        WITH latest AS MATERIALIZED (SELECT lethe.now() + make_interval(secs => $1) AS instant),
        chosen AS MATERIALIZED (
            SELECT slice_id FROM lethe.slices
             WHERE state = 'ready' AND next_attempt_at > (SELECT instant FROM latest)
             ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED)
        UPDATE lethe.slices s SET next_attempt_at = (SELECT instant FROM latest)
          FROM chosen WHERE s.slice_id = chosen.slice_id";
    RESULTS = "
        WITH latest AS MATERIALIZED (SELECT lethe.now() + make_interval(secs => $1) AS instant),
        chosen AS MATERIALIZED (
            SELECT result_id FROM lethe.results
             WHERE expired_at IS NOT NULL AND object_path IS NOT NULL AND delete_after > (SELECT instant FROM latest)
             ORDER BY delete_after LIMIT $2 FOR UPDATE SKIP LOCKED)
        UPDATE lethe.results r SET delete_after = (SELECT instant FROM latest)
          FROM chosen WHERE r.result_id = chosen.result_id";
}

/// The longest that each of these is put off by whoever puts it off.
#[derive(Clone, Copy, Debug)]
pub struct Longest {
    /// A callback that failed.
    pub callback: Duration,
    /// An endpoint that is held by its breaker.
    pub endpoint: Duration,
    /// A slice that failed.
    pub slice: Duration,
    /// An object that could not be deleted.
    pub object: Duration,
}

/// What was brought back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BroughtBack {
    /// How many there were.
    pub items: u64,
    /// There may be more.
    pub more: bool,
}

/// Brings back what is put off further than anything waits, at most `limit` of each kind.
///
/// # Errors
/// [`DbError::LeadershipLost`], [`DbError::ClockAhead`].
pub async fn bring_back(db: &Db, term: &Term, longest: Longest, limit: i64) -> Result<BroughtBack, DbError> {
    let mut brought = BroughtBack::default();
    for (statement, wait) in [
        (CALLBACKS, longest.callback),
        (ENDPOINTS, longest.endpoint),
        (SLICES, longest.slice),
        (RESULTS, longest.object),
    ] {
        // Each by itself: nothing is locked for longer than its own step.
        let tx = db.begin("bring_back").await?;
        leader::assert_term(&tx, term).await?;
        let items = tx.execute(statement, &[&wait.as_secs_f64(), &limit]).await?;
        leader::assert_clock(&tx, term).await?;
        tx.commit().await?;
        brought.items += items;
        brought.more |= i64::try_from(items).is_ok_and(|items| items >= limit);
    }
    Ok(brought)
}
