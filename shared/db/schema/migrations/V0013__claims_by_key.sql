-- A claim of callbacks walked over whatever had been leased within the last minute and delivered before, for as long as
-- the oldest snapshot could still see it: with a dump or an import under way, over all of a batch, each time. And the lease
-- stood in an index, so that each claim wrote into all of them (docs/adr/0025-claims-that-know-their-place.md).
ALTER TABLE lethe.endpoints
    -- What was claimed and not known to have ended when the last claim looked.
    ADD COLUMN in_flight uuid[] NOT NULL DEFAULT '{}',
    -- Nothing that was due before this is unclaimed, except what was locked, or committed late.
    ADD COLUMN claimed_until timestamptz NOT NULL DEFAULT '-infinity',
    -- When a claim last looked at what lies before it as well; ahead of the clock where that took long.
    ADD COLUMN looked_back_at timestamptz NOT NULL DEFAULT '-infinity';
UPDATE lethe.endpoints e SET in_flight = q.ids
  FROM (SELECT endpoint_id, array_agg(callback_id) AS ids
          FROM lethe.callbacks WHERE state = 'ready' AND lease_token IS NOT NULL GROUP BY endpoint_id) q
 WHERE e.endpoint_id = q.endpoint_id;

DROP INDEX lethe.callbacks_leased;
-- Room for the version with the lease.
ALTER TABLE lethe.callbacks SET (fillfactor = 70);

CREATE OR REPLACE FUNCTION lethe.claim_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds float8,
                                                 endpoint_limit integer)
RETURNS TABLE (callback_id uuid, endpoint_id bigint, url_no smallint, request_status text,
               expected_completion_time timestamptz, attempt integer, started_at timestamptz, controller_id text,
               subject_request_id uuid, sealed_request bytea, signature_algorithm text, result_id uuid,
               token_salt bytea, lines bigint, replay boolean)
-- Plans are kept: one that was made for tables with next to nothing in them must not read them as a whole later.
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    instant timestamptz;
BEGIN
    -- In key order, as everyone who locks several of them does. What is in flight is counted under these locks.
    PERFORM 1 FROM lethe.endpoints e WHERE e.endpoint_id = ANY (endpoints)
      ORDER BY e.endpoint_id FOR NO KEY UPDATE;
    instant := lethe.now();
    RETURN QUERY
    WITH rooms AS MATERIALIZED (
        SELECT e.endpoint_id, held.ids, held.oldest, looks.back,
               CASE WHEN looks.back THEN '-infinity' ELSE e.claimed_until END AS since,
               -- A breaker that was open lets one through to probe.
               least(asked.wanted, CASE WHEN e.open_until IS NULL THEN endpoint_limit ELSE 1 END - held.in_force) AS room
          FROM unnest(endpoints, wanted) AS asked (endpoint_id, wanted)
          JOIN lethe.endpoints e ON e.endpoint_id = asked.endpoint_id
         CROSS JOIN LATERAL (
            -- Also where the clock was set back.
            SELECT e.looked_back_at NOT BETWEEN instant - interval '2 s' AND instant + interval '1 minute'
                   OR e.claimed_until > instant) AS looks (back)
         CROSS JOIN LATERAL (
            SELECT array_agg(c.callback_id) AS ids, min(c.next_attempt_at) AS oldest,
                   (count(*) FILTER (WHERE c.lease_expires_at > instant))::integer AS in_force
              FROM lethe.callbacks c
             WHERE c.callback_id = ANY (e.in_flight) AND c.lease_token IS NOT NULL) held
         WHERE e.open_until IS NULL OR e.open_until <= instant),
    claimed AS (
        UPDATE lethe.callbacks c
           SET lease_token = token, lease_expires_at = instant + make_interval(secs => lease_seconds),
               attempts = attempts + 1
         WHERE c.callback_id = ANY (ARRAY (
            SELECT due.callback_id FROM rooms
             CROSS JOIN LATERAL (
                SELECT d.callback_id FROM lethe.callbacks d
                 WHERE d.endpoint_id = rooms.endpoint_id AND d.state = 'ready'
                   AND d.next_attempt_at BETWEEN rooms.since AND instant
                   AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                 ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) due))
        RETURNING c.callback_id, c.endpoint_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time,
                  c.attempts, c.replays, c.next_attempt_at),
    remembered AS (
        UPDATE lethe.endpoints e
           SET in_flight = coalesce(rooms.ids || taken.ids, '{}'),
               -- Whatever becomes due is due now; some seconds are left to those who have not committed yet.
               claimed_until = least(rooms.oldest, taken.oldest, instant - interval '5 s'),
               -- One that took long is not repeated soon.
               looked_back_at = CASE WHEN rooms.back
                                     THEN lethe.now() + least(4 * (lethe.now() - instant), interval '50 s')
                                     ELSE e.looked_back_at END
          FROM rooms LEFT JOIN (
                SELECT c.endpoint_id, array_agg(c.callback_id) AS ids, min(c.next_attempt_at) AS oldest
                  FROM claimed c GROUP BY c.endpoint_id) taken ON taken.endpoint_id = rooms.endpoint_id
         WHERE e.endpoint_id = rooms.endpoint_id AND rooms.room > 0 AND (taken.ids IS NOT NULL OR rooms.back))
    SELECT c.callback_id, c.endpoint_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.sealed_request, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;

-- As before; in a language that keeps its plan: planning took twice as long as running.
CREATE OR REPLACE FUNCTION lethe.release_successors(finished uuid[]) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    UPDATE lethe.callbacks c
       SET state = 'ready', next_attempt_at = (SELECT lethe.now())
      -- In key order, as everyone who locks several of them does.
      FROM (SELECT next.callback_id
              FROM lethe.callbacks done
              JOIN lethe.callbacks next
                ON next.request_key = done.request_key AND next.url_no = done.url_no AND next.sequence = done.sequence + 1
             WHERE done.callback_id = ANY (finished) AND next.state = 'waiting'
             ORDER BY next.callback_id FOR UPDATE OF next) ready
     WHERE c.callback_id = ready.callback_id;
END $$;
