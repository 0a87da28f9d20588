-- The life of a callback: added with a status, claimed for delivery, followed by its successor.

-- Adds the callbacks of a new status of the given requests, one for each URL (they all have sequence 0), and returns the
-- endpoints that have something to deliver. Nobody waits for a replay. The clock is read once.
CREATE OR REPLACE FUNCTION lethe.add_callbacks(keys bigint[], new_status text, new_sequence smallint) RETURNS SETOF bigint
LANGUAGE plpgsql AS $$
DECLARE
    instant timestamptz;
BEGIN
    -- In key order, as everyone who locks several of them does.
    PERFORM 1 FROM lethe.callbacks
      WHERE request_key = ANY (keys) AND sequence = new_sequence - 1
      ORDER BY callback_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    instant := lethe.now();
    RETURN QUERY
    WITH added AS (
        INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                     expected_completion_time, state, next_attempt_at, created_at)
        SELECT gen_random_uuid(), p.request_key, p.url_no, new_sequence, p.endpoint_id, new_status,
               r.expected_completion_time,
               CASE WHEN p.state IN ('delivered', 'exhausted') OR p.replays > 0 THEN 'ready' ELSE 'waiting' END,
               instant, instant
          FROM lethe.callbacks p JOIN lethe.requests r USING (request_key)
         WHERE p.request_key = ANY (keys) AND p.sequence = new_sequence - 1
        RETURNING endpoint_id, state)
    SELECT DISTINCT endpoint_id FROM added WHERE state = 'ready';
END $$;

-- Claims the due callbacks of endpoints, of each as many as are wanted, within its limit and its breaker. A claim goes on from
-- the place of the last one; what lies before it is looked at as soon as there is room for it, unless that took long the last
-- time: so a claim with room left has seen everything (ADR 0025). The sealed request comes along only if what callbacks need
-- was not sealed by itself.
CREATE OR REPLACE FUNCTION lethe.claim_due_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds float8,
                                          endpoint_limit integer)
RETURNS TABLE (callback_id uuid, endpoint_id bigint, url_no smallint, request_status text,
               expected_completion_time timestamptz, attempt integer, started_at timestamptz, controller_id text,
               subject_request_id uuid, api_version text, sealed_reporting bytea, sealed_request bytea,
               signature_algorithm text, result_id uuid, token_salt bytea, lines bigint, replay boolean)
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
               -- What lies before the place, if there is room for it.
               NOT looks.back AND e.looked_back_at <= instant AS may_look,
               CASE WHEN looks.back THEN '-infinity' ELSE e.claimed_until END AS since,
               -- A breaker that was open lets one through to probe.
               least(asked.wanted, CASE WHEN e.open_until IS NULL THEN endpoint_limit ELSE 1 END - held.in_force) AS room
          FROM unnest(endpoints, wanted) AS asked (endpoint_id, wanted)
          JOIN lethe.endpoints e ON e.endpoint_id = asked.endpoint_id
         CROSS JOIN LATERAL (
            -- Every two seconds, for what no claim has had room for. And where the clock was set back.
            SELECT e.looked_back_at NOT BETWEEN instant - interval '2 s' AND instant + interval '1 minute'
                   OR greatest(e.claimed_until, e.claimed_at) > instant) AS looks (back)
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
                SELECT ahead_or_behind.callback_id FROM (
                    SELECT ahead.callback_id FROM (
                        SELECT d.callback_id FROM lethe.callbacks d
                         WHERE d.endpoint_id = rooms.endpoint_id AND d.state = 'ready'
                           AND d.next_attempt_at BETWEEN rooms.since AND instant
                           AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                         ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) ahead
                    -- Read only where the first part leaves room.
                    UNION ALL
                    SELECT behind.callback_id FROM (
                        SELECT d.callback_id FROM lethe.callbacks d
                         WHERE rooms.may_look AND d.endpoint_id = rooms.endpoint_id AND d.state = 'ready'
                           AND d.next_attempt_at < rooms.since
                           AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                         ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) behind
                ) ahead_or_behind LIMIT greatest(rooms.room, 0)) due))
        RETURNING c.callback_id, c.endpoint_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time,
                  c.attempts, c.replays, c.next_attempt_at),
    places AS (
        SELECT rooms.*, taken.new_ids, taken.new_oldest,
               rooms.back OR rooms.may_look AND coalesce(cardinality(taken.new_ids), 0) < rooms.room AS looked,
               lethe.now() - instant AS took
          FROM rooms LEFT JOIN (
                SELECT c.endpoint_id, array_agg(c.callback_id) AS new_ids, min(c.next_attempt_at) AS new_oldest
                  FROM claimed c GROUP BY c.endpoint_id) taken ON taken.endpoint_id = rooms.endpoint_id
         WHERE rooms.room > 0),
    remembered AS (
        UPDATE lethe.endpoints e
           SET in_flight = coalesce(places.ids || places.new_ids, '{}'),
               -- Whatever becomes due is due now; some seconds are left to those who have not committed yet.
               claimed_until = least(places.oldest, places.new_oldest, instant - interval '5 s'),
               claimed_at = instant,
               -- One that took long is not repeated soon: a twentieth of the time is spent on it at most.
               looked_back_at = CASE WHEN places.looked
                                     THEN lethe.now() + least(20 * places.took, interval '50 s')
                                     ELSE e.looked_back_at END
          FROM places
         WHERE e.endpoint_id = places.endpoint_id
           -- What found nothing, and cost nothing, is not worth a write.
           AND (places.new_ids IS NOT NULL OR places.back OR places.looked AND places.took > interval '1 ms'))
    SELECT c.callback_id, c.endpoint_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.api_version, d.sealed_reporting,
           CASE WHEN d.sealed_reporting IS NULL THEN d.sealed_request END, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      LEFT JOIN LATERAL (SELECT * FROM lethe.request_details x
                          WHERE x.week = r.details_week AND x.request_key = r.request_key OFFSET 0) d ON true
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;

-- A delivered or exhausted callback lets its successor go. The delivering transaction holds the row of the
-- predecessor first; a transaction that adds a successor locks that row too (add_callbacks). So one of the
-- two sees the other, whichever comes first.
-- In a language that keeps its plan: planning took twice as long as running.
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
