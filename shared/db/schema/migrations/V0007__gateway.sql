-- The gateway works under a role of its own, which sees and changes rows of one controller at a time: the one that
-- `lethe.controller_id` names in the session. Owner and workers are not bound by the policies.

DO $$
BEGIN
    -- Roles belong to the whole cluster: another database may be migrated at the same time.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'lethe_gateway') THEN
        BEGIN
            CREATE ROLE lethe_gateway NOLOGIN;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END IF;
    -- Whether one may take a role cannot be asked in the same way in every version; so it is tried.
    BEGIN
        SET LOCAL ROLE lethe_gateway;
        RESET ROLE;
    EXCEPTION WHEN insufficient_privilege THEN
        EXECUTE format('GRANT lethe_gateway TO %I', current_user);
    END;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the role lethe_gateway cannot be made or taken by %', current_user
        USING HINT = format('run as an administrator: CREATE ROLE lethe_gateway NOLOGIN; GRANT lethe_gateway TO %I;',
                            current_user);
END $$;

GRANT USAGE ON SCHEMA lethe, subject_data TO lethe_gateway;
GRANT SELECT ON public.refinery_schema_history TO lethe_gateway;
GRANT SELECT ON lethe.clock, lethe.calendars, lethe.lanes TO lethe_gateway;
-- Batches are shared by all controllers.
GRANT SELECT, INSERT ON lethe.batches TO lethe_gateway;
GRANT SELECT, INSERT, UPDATE (status, cancelled_at, cancellation_received_at) ON lethe.requests TO lethe_gateway;
GRANT SELECT, INSERT ON lethe.request_mpids, lethe.endpoints TO lethe_gateway;
-- A callback is locked while its successor is added, which takes the right to change something.
GRANT SELECT, INSERT, UPDATE (next_attempt_at) ON lethe.callbacks TO lethe_gateway;
GRANT SELECT, DELETE ON lethe.early_cancellations TO lethe_gateway;
GRANT SELECT ON lethe.results, lethe.erasure_receipts TO lethe_gateway;
GRANT SELECT ON subject_data.profile_identities TO lethe_gateway;

-- Without the setting there is no controller, and no row. Once it was set in a session, «not set» reads as empty.
CREATE FUNCTION lethe.acting_controller() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN nullif(current_setting('lethe.controller_id', true), '');

ALTER TABLE lethe.requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.requests TO lethe_gateway USING (controller_id = lethe.acting_controller());
ALTER TABLE lethe.endpoints ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.endpoints TO lethe_gateway USING (controller_id = lethe.acting_controller());
ALTER TABLE lethe.early_cancellations ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.early_cancellations TO lethe_gateway USING (controller_id = lethe.acting_controller());
ALTER TABLE subject_data.profile_identities ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON subject_data.profile_identities TO lethe_gateway
    USING (controller_id = lethe.acting_controller());
-- What hangs on a request is seen by whoever sees the request.
ALTER TABLE lethe.request_mpids ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.request_mpids TO lethe_gateway
    USING (EXISTS (SELECT FROM lethe.requests r WHERE r.request_key = request_mpids.request_key));
ALTER TABLE lethe.callbacks ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.callbacks TO lethe_gateway
    USING (EXISTS (SELECT FROM lethe.requests r WHERE r.request_key = callbacks.request_key));
ALTER TABLE lethe.results ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.results TO lethe_gateway
    USING (EXISTS (SELECT FROM lethe.requests r WHERE r.request_key = results.request_key));
ALTER TABLE lethe.erasure_receipts ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.erasure_receipts TO lethe_gateway
    USING (EXISTS (SELECT FROM lethe.requests r WHERE r.request_key = erasure_receipts.request_key));

-- What is asked before the controller is known. Each gives away only what its secret argument opens.

CREATE FUNCTION lethe.find_api_key(wanted text)
RETURNS TABLE (controller_id text, api_secret_hash text, signature_algorithm text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.controller_id, c.api_secret_hash, c.signature_algorithm FROM lethe.controllers c WHERE c.api_key = wanted
$$;

CREATE FUNCTION lethe.find_result(wanted bytea)
RETURNS TABLE (result_id uuid, controller_id text, subject_request_id uuid, request_type text, object_path text,
               media_type text, size_bytes bigint, wrapped_key bytea, expiry_day date, expired boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.result_id, r.controller_id, r.subject_request_id, r.request_type, s.object_path, s.media_type,
           s.size_bytes, s.wrapped_key, s.expiry_day, s.expires_at <= lethe.now() OR s.expired_at IS NOT NULL
      FROM lethe.results s JOIN lethe.requests r USING (request_key) WHERE s.token_sha256 = wanted
$$;

-- A download enters the audit trail before its first byte is sent. Whoever can name a result has its token.
CREATE FUNCTION lethe.record_download(wanted bytea, first_byte bigint, last_byte bigint) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'result.downloaded',
           jsonb_build_object('result_id', s.result_id, 'first_byte', first_byte, 'last_byte', last_byte,
                              'size_bytes', s.size_bytes)
      FROM lethe.results s JOIN lethe.requests r USING (request_key) WHERE s.token_sha256 = wanted
    RETURNING entry_id
$$;

REVOKE ALL ON FUNCTION lethe.find_api_key(text), lethe.find_result(bytea), lethe.record_download(bytea, bigint, bigint)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lethe.find_api_key(text), lethe.find_result(bytea),
    lethe.record_download(bytea, bigint, bigint) TO lethe_gateway;
