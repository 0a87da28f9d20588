//! Endpoints: where callbacks go. Each has one limit of deliveries in flight and one breaker over all couriers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Instant;

use super::pool::Session;
use super::{DbError, statements};
use lethe_domain::opendsr::callback_url::Origin;
use lethe_domain::request::{ControllerId, EndpointId};
use lethe_process::fault;

statements! {
    /// In the order of the key, so that two intakes that meet cannot wait for each other.
    ADD = "
        INSERT INTO lethe.endpoints (controller_id, scheme, host, port)
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int[]) ORDER BY 1, 2, 3, 4
        ON CONFLICT DO NOTHING";
    FIND = "
        SELECT e.endpoint_id, e.controller_id, e.scheme, e.host, e.port
          FROM lethe.endpoints e
          JOIN unnest($1::text[], $2::text[], $3::text[], $4::int[]) AS q (controller_id, scheme, host, port)
         USING (controller_id, scheme, host, port)";
    /// Whose endpoints these are; that never changes.
    CONTROLLERS = "
        SELECT endpoint_id, controller_id FROM lethe.endpoints WHERE endpoint_id = ANY ($1)";
    /// The next endpoints, after one, that have something ready: each is found by one look into the index of what is
    /// ready, so that those with nothing cost nothing.
    WITH_READY = "
        WITH RECURSIVE found AS (
            (SELECT c.endpoint_id, 1::bigint AS place FROM lethe.callbacks c
              WHERE c.state = 'ready' AND c.endpoint_id > $1 ORDER BY c.endpoint_id LIMIT 1)
            UNION ALL
            SELECT next.endpoint_id, found.place + 1 FROM found
             CROSS JOIN LATERAL (
                SELECT c.endpoint_id FROM lethe.callbacks c
                 WHERE c.state = 'ready' AND c.endpoint_id > found.endpoint_id
                 ORDER BY c.endpoint_id LIMIT 1) next
             WHERE found.place < $2)
        SELECT endpoint_id FROM found";
    /// Those of them with something due that no courier has under way and whose breaker lets at least a probe through.
    /// Woken in the future: the clock was set back.
    TO_WAKE = "
        UPDATE lethe.endpoints SET last_nudged_at = lethe.now()
         WHERE endpoint_id IN (
            SELECT e.endpoint_id FROM lethe.endpoints e
             WHERE e.endpoint_id = ANY ($3)
               AND e.last_nudged_at NOT BETWEEN (SELECT lethe.now()) - make_interval(secs => $1) AND (SELECT lethe.now())
               AND (e.open_until IS NULL OR e.open_until <= (SELECT lethe.now()))
               AND EXISTS (
                   SELECT FROM lethe.callbacks c
                    WHERE c.endpoint_id = e.endpoint_id AND c.state = 'ready' AND c.next_attempt_at <= (SELECT lethe.now())
                      AND (c.lease_expires_at IS NULL OR c.lease_expires_at <= (SELECT lethe.now())))
             ORDER BY e.last_nudged_at LIMIT $2 FOR UPDATE SKIP LOCKED)
        RETURNING endpoint_id";
}

type Key = (ControllerId, Origin);

/// Remembers the ids of endpoints, which never change, and when each was read: a server to which somebody connects later
/// may be another one, which never had it.
#[derive(Debug, Default)]
pub(crate) struct EndpointCache(RwLock<HashMap<Key, (EndpointId, Instant)>>);

/// More than these would be a memory leak rather than a cache.
const CACHE_LIMIT: usize = 100_000;

impl EndpointCache {
    /// The ids of the given endpoints; adds those that are new. Not part of the caller's transaction: an endpoint
    /// without callbacks harms nobody, and a lock on its key would hold up other intakes.
    ///
    /// # Errors
    /// [`DbError`].
    pub(crate) async fn resolve(&self, session: &Session, wanted: &[Key]) -> Result<HashMap<Key, EndpointId>, DbError> {
        let mut known = HashMap::with_capacity(wanted.len());
        let mut missing: Vec<&Key> = Vec::new();
        {
            let is_of_this_server =
                |read_at| session.connected_at() <= read_at || fault::defect("lost_commits_believed");
            let cache = self.0.read().unwrap_or_else(PoisonError::into_inner);
            for key in wanted {
                match cache.get(key) {
                    Some((id, read_at)) if is_of_this_server(*read_at) => drop(known.insert(key.clone(), *id)),
                    _ => missing.push(key),
                }
            }
        }
        if missing.is_empty() {
            return Ok(known);
        }
        missing.sort();
        missing.dedup();
        let controllers: Vec<&str> = missing.iter().map(|(controller, _)| controller.as_str()).collect();
        let schemes: Vec<&str> = missing.iter().map(|(_, origin)| origin.scheme.as_str()).collect();
        let hosts: Vec<&str> = missing.iter().map(|(_, origin)| origin.host.as_str()).collect();
        let ports: Vec<i32> = missing.iter().map(|(_, origin)| origin.port.into()).collect();
        let read_at = Instant::now();
        session.execute(ADD, &[&controllers, &schemes, &hosts, &ports]).await?;
        let rows = session.query(FIND, &[&controllers, &schemes, &hosts, &ports]).await?;
        let unexpected = || DbError::Unexpected { place: "endpoints" };
        let mut cache = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if cache.len() + rows.len() > CACHE_LIMIT {
            cache.clear();
        }
        for row in rows {
            let port: i32 = row.get("port");
            let origin = Origin {
                scheme: row.get("scheme"),
                host: row.get("host"),
                port: port.try_into().map_err(|_| unexpected())?,
            };
            let key = (row.get("controller_id"), origin);
            cache.insert(key.clone(), (row.get("endpoint_id"), read_at));
            known.insert(key, row.get("endpoint_id"));
        }
        Ok(known)
    }
}

/// Endpoints with something ready that a call of [`to_wake`] looks at. With fewer of them it looks at all.
const LOOKED_AT: i64 = 2_000;

/// Where the last call of this process has ended, so that the next one goes on from there: with more endpoints than one
/// call looks at, each has its turn. A hint only; it may be of another database.
static LAST_LOOKED_AT: AtomicI64 = AtomicI64::new(0);

/// Endpoints that are due and untouched, at most `limit`, none twice within `pause_seconds`.
///
/// # Errors
/// [`DbError`].
pub async fn to_wake(session: &Session, pause_seconds: f64, limit: i64) -> Result<Vec<EndpointId>, DbError> {
    let begin = LAST_LOOKED_AT.load(Ordering::Relaxed);
    let mut found = with_ready(session, begin, LOOKED_AT).await?;
    let left = LOOKED_AT.saturating_sub_unsigned(found.len() as u64);
    if begin > 0 && left > 0 {
        // Once around: what lies before the place where this call began.
        let rest = with_ready(session, 0, left).await?;
        found.extend(rest.into_iter().take_while(|endpoint| endpoint.0 <= begin));
    }
    let Some(last) = found.last() else { return Ok(Vec::new()) };
    LAST_LOOKED_AT.store(last.0, Ordering::Relaxed);
    session.values(TO_WAKE, &[&pause_seconds, &limit, &found]).await
}

async fn with_ready(session: &Session, after: i64, limit: i64) -> Result<Vec<EndpointId>, DbError> {
    session.values(WITH_READY, &[&after, &limit]).await
}

/// Whose the given endpoints are; one that is unknown is left out.
///
/// # Errors
/// [`DbError`].
pub async fn controllers(
    session: &Session,
    endpoints: &[EndpointId],
) -> Result<HashMap<EndpointId, ControllerId>, DbError> {
    Ok(session
        .query(CONTROLLERS, &[&endpoints])
        .await?
        .iter()
        .map(|row| (row.get("endpoint_id"), row.get("controller_id")))
        .collect())
}
