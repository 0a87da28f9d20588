-- The hot path of the courier, one round trip. Each statement of the function sees what had committed before it began:
-- the count behind the row lock is what keeps the limit of an endpoint over all couriers. For the same reason request
-- and result are read in the statement that claims: a query around the function would have the older snapshot, and
-- miss the result that was committed together with the callback.

CREATE FUNCTION lethe.claim_callbacks(wanted_endpoint bigint, token uuid, lease_seconds float8,
                                      endpoint_limit integer, wanted integer)
RETURNS TABLE (callback_id uuid, url_no smallint, request_status text, expected_completion_time timestamptz,
               attempt integer, started_at timestamptz, controller_id text, subject_request_id uuid,
               sealed_request bytea, signature_algorithm text, result_id uuid, token_salt bytea, lines bigint)
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
        RETURNING c.callback_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time, c.attempts)
    SELECT c.callback_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.sealed_request, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;
