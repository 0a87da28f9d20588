-- The audit trail: what was done, for whom, when. Entries are written in the transaction of what they record, so that
-- neither exists without the other, and are never changed. They hold no personal data: a request is named by the
-- controller's own id of it, its identities by the keyed digest of its content only.

-- No foreign keys: the trail must outlive what it tells of, and take no locks on it.
CREATE TABLE lethe.audit_entries (
    entry_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- NULL: the processor's own doing, for no controller in particular.
    controller_id text,
    request_key   bigint,
    event         text NOT NULL CHECK (event ~ '^[a-z_]+\.[a-z_]+$'),
    details       jsonb NOT NULL DEFAULT '{}',
    recorded_at   timestamptz NOT NULL DEFAULT lethe.now()
);
-- Where a certificate finds the position of what it certifies.
CREATE INDEX audit_entries_completed ON lethe.audit_entries (request_key) WHERE event = 'request.completed';

-- Entries that the sealer has not chained yet. Numbers of entries commit out of order, so that «all after the last one»
-- would skip some; what is listed here is committed, and stays listed until it is chained.
CREATE TABLE lethe.audit_unsealed (
    entry_id bigint PRIMARY KEY
);

-- The chains: one for each controller, and one called '' for the processor's own doing. The position is the sealer's,
-- the digest is over the previous digest and the entry (docs/adr/0011-the-audit-trail.md).
CREATE TABLE lethe.audit_seals (
    chain     text NOT NULL,
    position  bigint NOT NULL CHECK (position > 0),
    entry_id  bigint NOT NULL UNIQUE,
    digest    bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- Where a group of the sealer ended: RSA PKCS#1 v1.5 with SHA-256, base64. So a rewritten chain shows from where on.
    signature text,
    signed_at timestamptz,
    -- Two schedulers can never fork a chain: a position is there once.
    PRIMARY KEY (chain, position)
);

-- How far each chain goes, signed.
CREATE TABLE lethe.audit_heads (
    chain     text PRIMARY KEY,
    position  bigint NOT NULL,
    digest    bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- RSA PKCS#1 v1.5 with SHA-256, base64.
    signature text NOT NULL,
    signed_at timestamptz NOT NULL
);

CREATE FUNCTION lethe.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON lethe.audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON lethe.audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();

-- The functions below run with the rights of the owner: whoever may change a request may not write the trail by hand.

CREATE FUNCTION lethe.announce_audit_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_unsealed (entry_id) SELECT entry_id FROM new_rows;
    RETURN NULL;
END $$;
CREATE TRIGGER announce AFTER INSERT ON lethe.audit_entries
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.announce_audit_entries();

CREATE FUNCTION lethe.audit_new_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, 'request.received',
           jsonb_build_object('subject_request_id', n.subject_request_id, 'type', n.request_type,
                              'regulation', n.regulation, 'api_version', n.api_version,
                              'content_digest', encode(n.content_digest, 'hex'), 'approval', n.approval,
                              'received_at', n.received_at, 'expected_completion_time', n.expected_completion_time),
           instant.now
      FROM new_rows n CROSS JOIN (SELECT lethe.now()) AS instant (now)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_received AFTER INSERT ON lethe.requests
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_new_requests();

-- Each entry with what it takes to follow the request from there. The profiles are counted at completion: the purge
-- removes them, and the certificate tells their number.
CREATE FUNCTION lethe.audit_changed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, told.event,
           jsonb_build_object('subject_request_id', n.subject_request_id) || told.details, instant.now
      FROM new_rows n JOIN old_rows o USING (request_key)
      CROSS JOIN (SELECT lethe.now()) AS instant (now)
      CROSS JOIN LATERAL (
        SELECT 'request.approved', jsonb_build_object('batch_id', n.batch_id, 'lane', n.lane,
                   'expected_completion_time', n.expected_completion_time)
         WHERE o.approval <> 'approved' AND n.approval = 'approved'
        UNION ALL
        SELECT 'request.held_back', jsonb_build_object('batch_id', o.batch_id)
         WHERE o.approval <> 'needed' AND n.approval = 'needed'
        UNION ALL
        SELECT 'request.cancelled', jsonb_build_object('received_at', n.cancellation_received_at)
         WHERE o.status <> 'cancelled' AND n.status = 'cancelled'
        UNION ALL
        SELECT 'request.released', jsonb_build_object('batch_id', n.batch_id, 'slice_id', n.slice_id)
         WHERE o.status <> 'in_progress' AND n.status = 'in_progress'
        UNION ALL
        SELECT 'request.completed', jsonb_build_object('type', n.request_type, 'completed_at', n.completed_at,
                   'content_digest', encode(n.content_digest, 'hex'),
                   'profiles', (SELECT count(*) FROM lethe.request_mpids m WHERE m.request_key = n.request_key))
         WHERE o.status <> 'completed' AND n.status = 'completed'
        UNION ALL
        SELECT 'request.purged', jsonb_build_object('content_digest', encode(n.content_digest, 'hex'))
         WHERE o.sealed_request IS NOT NULL AND n.sealed_request IS NULL) AS told (event, details)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_changed AFTER UPDATE ON lethe.requests
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_changed_requests();

CREATE FUNCTION lethe.audit_receipts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT r.controller_id, n.request_key, 'erasure.verified',
           jsonb_build_object('subject_request_id', r.subject_request_id, 'store', n.store, 'as_of', n.as_of,
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
CREATE TRIGGER audit_verified AFTER UPDATE ON lethe.erasure_receipts
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_receipts();

CREATE FUNCTION lethe.audit_results() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key,
           CASE TG_OP WHEN 'INSERT' THEN 'result.written' ELSE 'result.expired' END,
           jsonb_build_object('subject_request_id', r.subject_request_id, 'result_id', NEW.result_id,
                              'lines', NEW.lines, 'size_bytes', NEW.size_bytes, 'expires_at', NEW.expires_at)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_written AFTER INSERT ON lethe.results
    FOR EACH ROW EXECUTE FUNCTION lethe.audit_results();
CREATE TRIGGER audit_expired AFTER UPDATE OF expired_at ON lethe.results
    FOR EACH ROW WHEN (OLD.expired_at IS NULL AND NEW.expired_at IS NOT NULL)
    EXECUTE FUNCTION lethe.audit_results();

-- For each row: callbacks are updated with every claim, and hardly any of them ends so.
CREATE FUNCTION lethe.audit_callbacks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'callback.exhausted',
           jsonb_build_object('subject_request_id', r.subject_request_id, 'callback_id', NEW.callback_id,
                              'request_status', NEW.request_status, 'attempts', NEW.attempts)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_exhausted AFTER UPDATE OF state ON lethe.callbacks
    FOR EACH ROW WHEN (OLD.state <> 'exhausted' AND NEW.state = 'exhausted')
    EXECUTE FUNCTION lethe.audit_callbacks();

CREATE FUNCTION lethe.audit_controllers() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, event, details)
    VALUES (NEW.controller_id,
            CASE WHEN TG_OP = 'INSERT' THEN 'controller.added'
                 WHEN OLD.api_secret_hash <> NEW.api_secret_hash THEN 'controller.secret_rotated'
                 ELSE 'controller.changed' END,
            jsonb_build_object('amqp_user', NEW.amqp_user, 'any_amqp_user', NEW.any_amqp_user,
                               'signature_algorithm', NEW.signature_algorithm,
                               'include_profile', NEW.include_profile, 'database_user', session_user));
    RETURN NULL;
END $$;
CREATE TRIGGER audit_added AFTER INSERT ON lethe.controllers
    FOR EACH ROW EXECUTE FUNCTION lethe.audit_controllers();
CREATE TRIGGER audit_changed
    AFTER UPDATE OF api_secret_hash, amqp_user, any_amqp_user, signature_algorithm, include_profile ON lethe.controllers
    FOR EACH ROW EXECUTE FUNCTION lethe.audit_controllers();

CREATE FUNCTION lethe.audit_batches() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (event, details)
    VALUES ('batch.' || NEW.state,
            jsonb_build_object('batch_id', NEW.batch_id, 'lane', NEW.lane, 'tick_at', NEW.tick_at,
                               'runs_at', NEW.runs_at, 'calendar_version', NEW.calendar_version));
    RETURN NULL;
END $$;
CREATE TRIGGER audit_moved AFTER UPDATE OF state ON lethe.batches
    FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION lethe.audit_batches();

CREATE FUNCTION lethe.audit_calendars() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (event, details) VALUES ('calendar.stored', to_jsonb(NEW));
    RETURN NULL;
END $$;
CREATE TRIGGER audit_stored AFTER INSERT ON lethe.calendars
    FOR EACH ROW EXECUTE FUNCTION lethe.audit_calendars();
