-- Work: slices (erasures and compilations), what they left behind, and callbacks.

-- The unit of work, lease, retry and progress. All requests of a slice are of one controller.
CREATE TABLE lethe.slices (
    slice_id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id         bigint NOT NULL REFERENCES lethe.batches,
    controller_id    text NOT NULL REFERENCES lethe.controllers,
    stage            text NOT NULL CHECK (stage IN ('erasure', 'compilation')),
    state            text NOT NULL DEFAULT 'ready' CHECK (state IN ('ready', 'completed')),
    request_count    integer NOT NULL CHECK (request_count > 0),
    mpid_count       integer NOT NULL,
    attempts         integer NOT NULL DEFAULT 0,
    lease_token      uuid,
    lease_expires_at timestamptz,
    next_attempt_at  timestamptz NOT NULL DEFAULT lethe.now(),
    last_nudged_at   timestamptz NOT NULL DEFAULT lethe.now(),
    nudges           integer NOT NULL DEFAULT 0,
    -- The start of its execution: an erasure covers what was received up to here. Set once, kept over retries.
    started_at       timestamptz,
    last_error       text,
    created_at       timestamptz NOT NULL DEFAULT lethe.now(),
    completed_at     timestamptz
);
CREATE INDEX slices_open ON lethe.slices (stage, next_attempt_at) WHERE state = 'ready';
CREATE INDEX slices_of_batch ON lethe.slices (batch_id);
CREATE INDEX slices_open_of_batch ON lethe.slices (batch_id) WHERE state = 'ready';
ALTER TABLE lethe.requests ADD FOREIGN KEY (slice_id) REFERENCES lethe.slices;

-- What an erasure did, per request and store.
CREATE TABLE lethe.erasure_receipts (
    request_key  bigint NOT NULL REFERENCES lethe.requests,
    store        text NOT NULL,
    as_of        timestamptz NOT NULL,
    rows_deleted bigint NOT NULL DEFAULT 0,
    -- Received after as_of, hence not covered; counted when the store was asked again.
    rows_arrived bigint,
    -- When the store, asked again, held nothing from before as_of. NULL until then.
    verified_at  timestamptz,
    -- The class of the last failure of this store for this request; NULL once verified.
    failure      text,
    PRIMARY KEY (request_key, store)
);

-- Result files of access and portability requests. The token is never stored, only its SHA-256.
CREATE TABLE lethe.results (
    result_id    uuid PRIMARY KEY,
    request_key  bigint NOT NULL UNIQUE REFERENCES lethe.requests,
    token_salt   bytea NOT NULL,
    token_sha256 bytea NOT NULL UNIQUE,
    -- NULL where nothing matched: the link answers 404 and the count is 0.
    object_path  text,
    media_type   text NOT NULL,
    size_bytes   bigint NOT NULL,
    lines        bigint NOT NULL,
    -- The key of the file, wrapped by the key of the day of expiry; NULL after the expiry.
    wrapped_key  bytea,
    expiry_day   date NOT NULL,
    expires_at   timestamptz NOT NULL,
    expired_at   timestamptz
);
CREATE INDEX results_unexpired ON lethe.results (expires_at) WHERE expired_at IS NULL;
CREATE INDEX results_to_delete ON lethe.results (expired_at) WHERE expired_at IS NOT NULL AND object_path IS NOT NULL;

-- Where callbacks go: controller, scheme, host and port share one limit and one breaker over all couriers.
CREATE TABLE lethe.endpoints (
    endpoint_id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    controller_id        text NOT NULL REFERENCES lethe.controllers,
    scheme               text NOT NULL,
    host                 text NOT NULL,
    port                 integer NOT NULL,
    consecutive_failures integer NOT NULL DEFAULT 0,
    -- Not NULL: the breaker is open; from then on one delivery at a time probes.
    open_until           timestamptz,
    last_nudged_at       timestamptz NOT NULL DEFAULT '-infinity',
    UNIQUE (controller_id, scheme, host, port)
);

CREATE TABLE lethe.callbacks (
    callback_id              uuid PRIMARY KEY,
    request_key              bigint NOT NULL REFERENCES lethe.requests,
    -- The position in status_callback_urls; the URL itself lies in the sealed request.
    url_no                   smallint NOT NULL,
    -- 0 pending, 1 in_progress or cancelled, 2 completed: the order of delivery.
    sequence                 smallint NOT NULL,
    endpoint_id              bigint NOT NULL REFERENCES lethe.endpoints,
    request_status           text NOT NULL CHECK (request_status IN ('pending', 'in_progress', 'completed', 'cancelled')),
    expected_completion_time timestamptz NOT NULL,
    state                    text NOT NULL CHECK (state IN ('waiting', 'ready', 'delivered', 'exhausted')),
    attempts                 integer NOT NULL DEFAULT 0,
    -- Time used up by attempts and backoff; what a breaker holds back is not counted.
    retrying_for             interval NOT NULL DEFAULT '0',
    next_attempt_at          timestamptz NOT NULL,
    lease_token              uuid,
    lease_expires_at         timestamptz,
    created_at               timestamptz NOT NULL,
    finished_at              timestamptz,
    UNIQUE (request_key, url_no, sequence)
);
CREATE INDEX callbacks_due ON lethe.callbacks (endpoint_id, next_attempt_at) WHERE state = 'ready';
CREATE INDEX callbacks_leased ON lethe.callbacks (endpoint_id, lease_expires_at)
    WHERE state = 'ready' AND lease_token IS NOT NULL;

CREATE TABLE lethe.callback_attempts (
    callback_id uuid NOT NULL REFERENCES lethe.callbacks,
    attempt     integer NOT NULL,
    started_at  timestamptz NOT NULL,
    duration    interval NOT NULL,
    status_code smallint,
    error_class text,
    PRIMARY KEY (callback_id, attempt)
);

-- A delivered or exhausted callback lets its successor go. The delivering transaction holds the row of the
-- predecessor first; a transaction that adds a successor locks that row too (add_callbacks). So one of the
-- two sees the other, whichever comes first.
CREATE FUNCTION lethe.release_successors(finished uuid[]) RETURNS void LANGUAGE sql AS $$
    UPDATE lethe.callbacks c
       SET state = 'ready', next_attempt_at = lethe.now()
      -- In key order, as everyone who locks several of them does.
      FROM (SELECT next.callback_id
              FROM lethe.callbacks done
              JOIN lethe.callbacks next
                ON next.request_key = done.request_key AND next.url_no = done.url_no AND next.sequence = done.sequence + 1
             WHERE done.callback_id = ANY (finished) AND next.state = 'waiting'
             ORDER BY next.callback_id FOR UPDATE OF next) ready
     WHERE c.callback_id = ready.callback_id
$$;

-- Adds the callbacks of a new status of the given requests, one for each URL (they all have sequence 0),
-- and returns the endpoints that have something to deliver.
CREATE FUNCTION lethe.add_callbacks(keys bigint[], new_status text, new_sequence smallint) RETURNS SETOF bigint
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
               CASE WHEN p.state IN ('delivered', 'exhausted') THEN 'ready' ELSE 'waiting' END, lethe.now(), lethe.now()
          FROM lethe.callbacks p JOIN lethe.requests r USING (request_key)
         WHERE p.request_key = ANY (keys) AND p.sequence = new_sequence - 1
        RETURNING endpoint_id, state)
    SELECT DISTINCT endpoint_id FROM added WHERE state = 'ready';
END $$;
