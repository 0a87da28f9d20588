-- Subject requests and the batches that they are promised to.

CREATE TABLE lethe.batches (
    batch_id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane             text NOT NULL REFERENCES lethe.lanes,
    tick_at          timestamptz NOT NULL,
    runs_at          timestamptz NOT NULL CHECK (runs_at >= tick_at),
    calendar_version bigint NOT NULL REFERENCES lethe.calendars,
    state            text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'closed', 'released', 'completed')),
    opened_at        timestamptz NOT NULL DEFAULT lethe.now(),
    closed_at        timestamptz,
    -- When the cancellations that were queued before its release had been handled (ADR 0010).
    cancellations_handled_at timestamptz,
    released_at      timestamptz,
    completed_at     timestamptz,
    -- A tick is one row: two schedulers cannot make two batches of it.
    UNIQUE (lane, tick_at, runs_at)
);
CREATE INDEX batches_unfinished ON lethe.batches (state, tick_at) WHERE state <> 'completed';

CREATE TABLE lethe.requests (
    request_key              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    controller_id            text NOT NULL REFERENCES lethe.controllers,
    subject_request_id       uuid NOT NULL,
    api_version              text NOT NULL CHECK (api_version IN ('1.0', '2.0', '3.0')),
    regulation               text CHECK (regulation IN ('gdpr', 'ccpa')),
    request_type             text NOT NULL CHECK (request_type IN ('erasure', 'access', 'portability')),
    status                   text NOT NULL CHECK (status IN ('pending', 'in_progress', 'completed', 'cancelled')),
    lane                     text NOT NULL REFERENCES lethe.lanes,
    -- NULL while an operator's approval is awaited, and for what was cancelled before it got a batch.
    batch_id                 bigint REFERENCES lethe.batches,
    slice_id                 bigint,
    -- Keyed digest of the parsed request; kept for good, so that a repetition is known after the purge too.
    content_digest           bytea NOT NULL CHECK (octet_length(content_digest) = 32),
    -- The parsed request, AES-256-GCM; NULL after the purge.
    sealed_request           bytea,
    group_digest             bytea,
    submitted_time           timestamptz NOT NULL,
    received_at              timestamptz NOT NULL,
    expected_completion_time timestamptz NOT NULL,
    approval                 text NOT NULL DEFAULT 'not_needed' CHECK (approval IN ('not_needed', 'needed', 'approved')),
    approved_at              timestamptz,
    in_progress_at           timestamptz,
    completed_at             timestamptz,
    cancelled_at             timestamptz,
    -- When the cancellation was received: what a repeated cancellation is answered with.
    cancellation_received_at timestamptz,
    UNIQUE (controller_id, subject_request_id)
);
CREATE INDEX requests_of_batch ON lethe.requests (batch_id, controller_id, request_key) WHERE status = 'pending';
CREATE INDEX requests_all_of_batch ON lethe.requests (batch_id);
CREATE INDEX requests_of_slice ON lethe.requests (slice_id) WHERE slice_id IS NOT NULL;
CREATE INDEX requests_of_group ON lethe.requests (controller_id, group_digest, request_key) WHERE group_digest IS NOT NULL;
CREATE INDEX requests_awaiting_approval ON lethe.requests (request_key) WHERE approval = 'needed' AND status = 'pending';
CREATE INDEX requests_listed ON lethe.requests (received_at DESC, request_key DESC);

-- The state machine once more, where nobody can get around it (docs/state-machine.md).
CREATE FUNCTION lethe.guard_request_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.status, NEW.status) NOT IN (
        ('pending', 'in_progress'), ('pending', 'cancelled'), ('in_progress', 'completed'))
    THEN
        RAISE EXCEPTION 'a request cannot go from % to %', OLD.status, NEW.status USING ERRCODE = 'LT002';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_status BEFORE UPDATE OF status ON lethe.requests
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION lethe.guard_request_status();
CREATE FUNCTION lethe.guard_request_birth() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a request begins as pending, not as %', NEW.status USING ERRCODE = 'LT002';
END $$;
CREATE TRIGGER guard_birth BEFORE INSERT ON lethe.requests
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION lethe.guard_request_birth();

-- A batch likewise.
CREATE FUNCTION lethe.guard_batch_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.state, NEW.state) NOT IN (('open', 'closed'), ('closed', 'released'), ('released', 'completed')) THEN
        RAISE EXCEPTION 'a batch cannot go from % to %', OLD.state, NEW.state USING ERRCODE = 'LT002';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard_state BEFORE UPDATE OF state ON lethe.batches
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION lethe.guard_batch_state();

-- What a request is executed on, and how each profile got there.
CREATE TABLE lethe.request_mpids (
    request_key bigint NOT NULL REFERENCES lethe.requests,
    mpid        bigint NOT NULL,
    source      text NOT NULL CHECK (source IN ('named', 'receipt', 'release')),
    PRIMARY KEY (request_key, mpid)
);

-- A cancellation that overtook its request waits here, at most one waiting period.
CREATE TABLE lethe.early_cancellations (
    controller_id      text NOT NULL REFERENCES lethe.controllers,
    subject_request_id uuid NOT NULL,
    received_at        timestamptz NOT NULL,
    expires_at         timestamptz NOT NULL,
    PRIMARY KEY (controller_id, subject_request_id)
);
CREATE INDEX early_cancellations_expiry ON lethe.early_cancellations (expires_at);
