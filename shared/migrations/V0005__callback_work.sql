-- The two hot paths of the courier, each one round trip. Statements of a function see what committed before each of
-- them: the count below the row lock is what keeps the limit of an endpoint over all couriers.

CREATE FUNCTION lethe.claim_callbacks(wanted_endpoint bigint, token uuid, lease_seconds float8,
                                      endpoint_limit integer, wanted integer)
RETURNS TABLE (callback_id uuid, request_key bigint, url_no smallint, request_status text,
               expected_completion_time timestamptz, attempt integer, started_at timestamptz)
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
    UPDATE lethe.callbacks c
       SET lease_token = token, lease_expires_at = instant + make_interval(secs => lease_seconds), attempts = attempts + 1
      FROM (SELECT d.callback_id FROM lethe.callbacks d
             WHERE d.endpoint_id = wanted_endpoint AND d.state = 'ready' AND d.next_attempt_at <= instant
               AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
             ORDER BY d.next_attempt_at LIMIT least(room, wanted) FOR UPDATE SKIP LOCKED) due
     WHERE c.callback_id = due.callback_id
    RETURNING c.callback_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant;
END $$;
