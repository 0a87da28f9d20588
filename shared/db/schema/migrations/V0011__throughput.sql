-- What costs most where requests come and go by the million, made cheaper.

-- A foreign key is checked row by row, with a lock on the parent each time. Where rows are written by the hundred, with keys
-- that the same transaction has just read or made, that is a third of the work. The parents are never removed
-- instead (docs/adr/0023-no-foreign-keys-where-rows-come-by-the-hundred.md).
ALTER TABLE lethe.requests
    DROP CONSTRAINT requests_controller_id_fkey,
    DROP CONSTRAINT requests_batch_id_fkey,
    DROP CONSTRAINT requests_slice_id_fkey,
    DROP CONSTRAINT requests_lane_fkey,
    ADD CONSTRAINT requests_lane_check CHECK (lane IN ('erasure', 'expedited', 'access'));
ALTER TABLE lethe.request_mpids DROP CONSTRAINT request_mpids_request_key_fkey;
ALTER TABLE lethe.erasure_receipts DROP CONSTRAINT erasure_receipts_request_key_fkey;
ALTER TABLE lethe.callbacks
    DROP CONSTRAINT callbacks_request_key_fkey,
    DROP CONSTRAINT callbacks_endpoint_id_fkey;
ALTER TABLE lethe.callback_attempts DROP CONSTRAINT callback_attempts_callback_id_fkey;

CREATE FUNCTION lethe.refuse_removal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are never removed', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $$;
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.controllers
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.batches
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.slices
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.requests
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.endpoints
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.callbacks
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();

-- As before; the clock is read once.
CREATE OR REPLACE FUNCTION lethe.release_successors(finished uuid[]) RETURNS void LANGUAGE sql AS $$
    UPDATE lethe.callbacks c
       SET state = 'ready', next_attempt_at = (SELECT lethe.now())
      -- In key order, as everyone who locks several of them does.
      FROM (SELECT next.callback_id
              FROM lethe.callbacks done
              JOIN lethe.callbacks next
                ON next.request_key = done.request_key AND next.url_no = done.url_no AND next.sequence = done.sequence + 1
             WHERE done.callback_id = ANY (finished) AND next.state = 'waiting'
             ORDER BY next.callback_id FOR UPDATE OF next) ready
     WHERE c.callback_id = ready.callback_id
$$;

-- As before; the clock is read once.
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

-- Due callbacks of many endpoints in one call, of each as many as are wanted, as its limit and its breaker allow.
DROP FUNCTION lethe.claim_callbacks(bigint, uuid, float8, integer, integer);
CREATE FUNCTION lethe.claim_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds float8,
                                      endpoint_limit integer)
RETURNS TABLE (callback_id uuid, endpoint_id bigint, url_no smallint, request_status text,
               expected_completion_time timestamptz, attempt integer, started_at timestamptz, controller_id text,
               subject_request_id uuid, sealed_request bytea, signature_algorithm text, result_id uuid,
               token_salt bytea, lines bigint, replay boolean)
LANGUAGE plpgsql AS $$
DECLARE
    instant timestamptz;
BEGIN
    -- In key order, as everyone who locks several of them does. What is in flight is counted under these locks.
    PERFORM 1 FROM lethe.endpoints e WHERE e.endpoint_id = ANY (endpoints)
      ORDER BY e.endpoint_id FOR NO KEY UPDATE;
    instant := lethe.now();
    RETURN QUERY
    WITH rooms AS MATERIALIZED (
        SELECT e.endpoint_id,
               -- A breaker that was open lets one through to probe.
               least(asked.wanted, CASE WHEN e.open_until IS NULL THEN endpoint_limit ELSE 1 END - in_flight.count) AS room
          FROM unnest(endpoints, wanted) AS asked (endpoint_id, wanted)
          JOIN lethe.endpoints e ON e.endpoint_id = asked.endpoint_id
         CROSS JOIN LATERAL (
            SELECT count(*)::integer AS count FROM lethe.callbacks c
             WHERE c.endpoint_id = e.endpoint_id AND c.state = 'ready' AND c.lease_token IS NOT NULL
               AND c.lease_expires_at > instant) in_flight
         WHERE e.open_until IS NULL OR e.open_until <= instant),
    claimed AS (
        UPDATE lethe.callbacks c
           SET lease_token = token, lease_expires_at = instant + make_interval(secs => lease_seconds),
               attempts = attempts + 1
          FROM (SELECT due.callback_id FROM rooms
                 CROSS JOIN LATERAL (
                    SELECT d.callback_id FROM lethe.callbacks d
                     WHERE d.endpoint_id = rooms.endpoint_id AND d.state = 'ready' AND d.next_attempt_at <= instant
                       AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                     ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) due) chosen
         WHERE c.callback_id = chosen.callback_id
        RETURNING c.callback_id, c.endpoint_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time,
                  c.attempts, c.replays)
    SELECT c.callback_id, c.endpoint_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.sealed_request, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;

-- Entries of the audit trail: json keeps what was written, and is made in half the time of jsonb. What is there keeps its text,
-- which is what the chain was made of.
ALTER TABLE lethe.audit_entries ALTER COLUMN details DROP DEFAULT;
ALTER TABLE lethe.audit_entries ALTER COLUMN details TYPE json USING details::text::json;
ALTER TABLE lethe.audit_entries ALTER COLUMN details SET DEFAULT '{}';

CREATE OR REPLACE FUNCTION lethe.audit_new_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, 'request.received',
           json_build_object('subject_request_id', n.subject_request_id, 'type', n.request_type,
                             'regulation', n.regulation, 'api_version', n.api_version,
                             'content_digest', encode(n.content_digest, 'hex'), 'approval', n.approval,
                             'received_at', n.received_at, 'expected_completion_time', n.expected_completion_time),
           instant.now
      FROM new_rows n CROSS JOIN (SELECT lethe.now()) AS instant (now)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION lethe.audit_changed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, told.event, told.details, instant.now
      FROM new_rows n JOIN old_rows o USING (request_key)
      CROSS JOIN (SELECT lethe.now()) AS instant (now)
      CROSS JOIN LATERAL (
        SELECT 'request.approved',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', n.batch_id, 'lane', n.lane,
                                 'expected_completion_time', n.expected_completion_time)
         WHERE o.approval <> 'approved' AND n.approval = 'approved'
        UNION ALL
        SELECT 'request.held_back',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', o.batch_id)
         WHERE o.approval <> 'needed' AND n.approval = 'needed'
        UNION ALL
        SELECT 'request.cancelled',
               json_build_object('subject_request_id', n.subject_request_id,
                                 'received_at', n.cancellation_received_at)
         WHERE o.status <> 'cancelled' AND n.status = 'cancelled'
        UNION ALL
        SELECT 'request.released',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', n.batch_id,
                                 'slice_id', n.slice_id)
         WHERE o.status <> 'in_progress' AND n.status = 'in_progress'
        UNION ALL
        SELECT 'request.completed',
               json_build_object('subject_request_id', n.subject_request_id, 'type', n.request_type,
                                 'completed_at', n.completed_at, 'content_digest', encode(n.content_digest, 'hex'),
                                 'profiles', (SELECT count(*) FROM lethe.request_mpids m
                                               WHERE m.request_key = n.request_key))
         WHERE o.status <> 'completed' AND n.status = 'completed'
        UNION ALL
        SELECT 'request.purged',
               json_build_object('subject_request_id', n.subject_request_id,
                                 'content_digest', encode(n.content_digest, 'hex'))
         WHERE o.sealed_request IS NOT NULL AND n.sealed_request IS NULL) AS told (event, details)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION lethe.audit_receipts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT r.controller_id, n.request_key, 'erasure.verified',
           json_build_object('subject_request_id', r.subject_request_id, 'store', n.store, 'as_of', n.as_of,
                             'rows_deleted', n.rows_deleted, 'rows_arrived', n.rows_arrived,
                             'verified_at', n.verified_at),
           instant.now
      FROM new_rows n
      JOIN old_rows o USING (request_key, store)
      JOIN lethe.requests r USING (request_key)
      CROSS JOIN (SELECT lethe.now()) AS instant (now)
     WHERE o.verified_at IS NULL AND n.verified_at IS NOT NULL
     ORDER BY n.request_key, n.store;
    RETURN NULL;
END $$;
