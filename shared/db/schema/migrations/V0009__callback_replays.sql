-- Callbacks that an operator sends once more: the same callback, outside the order (contract 6).

ALTER TABLE lethe.callbacks ADD COLUMN replays integer NOT NULL DEFAULT 0;

-- As before, and tells whether a callback is a replay.
DROP FUNCTION lethe.claim_callbacks(bigint, uuid, float8, integer, integer);
CREATE FUNCTION lethe.claim_callbacks(wanted_endpoint bigint, token uuid, lease_seconds float8,
                                      endpoint_limit integer, wanted integer)
RETURNS TABLE (callback_id uuid, url_no smallint, request_status text, expected_completion_time timestamptz,
               attempt integer, started_at timestamptz, controller_id text, subject_request_id uuid,
               sealed_request bytea, signature_algorithm text, result_id uuid, token_salt bytea, lines bigint,
               replay boolean)
LANGUAGE plpgsql AS $$
DECLARE
    endpoint lethe.endpoints;
    busy     integer;
    room     integer;
    instant  timestamptz;
BEGIN
    SELECT * INTO endpoint FROM lethe.endpoints e WHERE e.endpoint_id = wanted_endpoint FOR NO KEY UPDATE;
    instant := lethe.now();
    IF NOT FOUND OR endpoint.open_until > instant THEN
        RETURN;
    END IF;
    SELECT count(*) INTO busy FROM lethe.callbacks c
     WHERE c.endpoint_id = wanted_endpoint AND c.state = 'ready' AND c.lease_token IS NOT NULL
       AND c.lease_expires_at > instant;
    -- A breaker that was open lets one through to probe.
    room := CASE WHEN endpoint.open_until IS NULL THEN endpoint_limit ELSE 1 END - busy;
    IF room <= 0 THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH claimed AS (
        UPDATE lethe.callbacks c
           SET lease_token = token, lease_expires_at = instant + make_interval(secs => lease_seconds),
               attempts = attempts + 1
          FROM (SELECT d.callback_id FROM lethe.callbacks d
                 WHERE d.endpoint_id = wanted_endpoint AND d.state = 'ready' AND d.next_attempt_at <= instant
                   AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                 ORDER BY d.next_attempt_at LIMIT least(room, wanted) FOR UPDATE SKIP LOCKED) due
         WHERE c.callback_id = due.callback_id
        RETURNING c.callback_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time, c.attempts,
                  c.replays)
    SELECT c.callback_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.sealed_request, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;

-- As before; but nobody waits for a replay.
CREATE OR REPLACE FUNCTION lethe.add_callbacks(keys bigint[], new_status text, new_sequence smallint) RETURNS SETOF bigint
LANGUAGE plpgsql AS $$
BEGIN
    -- In key order, as everyone who locks several of them does.
    PERFORM 1 FROM lethe.callbacks
      WHERE request_key = ANY (keys) AND sequence = new_sequence - 1
      ORDER BY callback_id FOR UPDATE;
    RETURN QUERY
    WITH added AS (
        INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                     expected_completion_time, state, next_attempt_at, created_at)
        SELECT gen_random_uuid(), p.request_key, p.url_no, new_sequence, p.endpoint_id, new_status,
               r.expected_completion_time,
               CASE WHEN p.state IN ('delivered', 'exhausted') OR p.replays > 0 THEN 'ready' ELSE 'waiting' END, lethe.now(), lethe.now()
          FROM lethe.callbacks p JOIN lethe.requests r USING (request_key)
         WHERE p.request_key = ANY (keys) AND p.sequence = new_sequence - 1
        RETURNING endpoint_id, state)
    SELECT DISTINCT endpoint_id FROM added WHERE state = 'ready';
END $$;
