-- What the gateway's role may do beside reading the rows of one controller (ADR 0020).

-- Without the setting there is no controller, and no row. Once it was set in a session, "not set" reads as empty.
CREATE OR REPLACE FUNCTION lethe.acting_controller() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN nullif(current_setting('lethe.controller_id', true), '');

CREATE OR REPLACE FUNCTION lethe.find_api_key(wanted text)
RETURNS TABLE (controller_id text, api_secret_hash text, signature_algorithm text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.controller_id, c.api_secret_hash, c.signature_algorithm FROM lethe.controllers c WHERE c.api_key = wanted
$$;

CREATE OR REPLACE FUNCTION lethe.find_result(wanted bytea)
RETURNS TABLE (result_id uuid, controller_id text, subject_request_id uuid, request_type text, object_path text,
               media_type text, size_bytes bigint, wrapped_key bytea, expiry_day date, expired boolean)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT s.result_id, r.controller_id, r.subject_request_id, r.request_type, s.object_path, s.media_type,
           s.size_bytes, s.wrapped_key, s.expiry_day, s.expires_at <= lethe.now() OR s.expired_at IS NOT NULL
      FROM lethe.results s JOIN lethe.requests r USING (request_key) WHERE s.token_sha256 = wanted
$$;

-- A download enters the audit trail before its first byte is sent, up to `most` times for a result; then it records nothing
-- and returns no row. Whoever can name a result has its token.
CREATE OR REPLACE FUNCTION lethe.record_download(wanted bytea, first_byte bigint, last_byte bigint, most integer) RETURNS SETOF bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH counted AS (
        UPDATE lethe.results s SET downloads = s.downloads + 1
         WHERE s.token_sha256 = wanted AND s.downloads < most
        RETURNING s.result_id, s.request_key, s.size_bytes)
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'result.downloaded',
           jsonb_build_object('result_id', c.result_id, 'first_byte', first_byte, 'last_byte', last_byte,
                              'size_bytes', c.size_bytes)
      FROM counted c JOIN lethe.requests r USING (request_key)
    RETURNING entry_id
$$;
