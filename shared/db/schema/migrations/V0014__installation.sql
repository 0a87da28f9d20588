-- What is one and the same for all processes of an installation, and a bound on what one result can write to the trail.

-- Which master key seals what this database holds. A process with another one would take requests in that nobody else can
-- open; it ends instead. Written once, by the first process that has a key. Not by the gateway: it sees no request by which it
-- could tell that its key is another one.
CREATE TABLE lethe.installation (
    only_row               boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    master_key_fingerprint bytea NOT NULL CHECK (octet_length(master_key_fingerprint) = 32),
    recorded_at            timestamptz NOT NULL DEFAULT lethe.now()
);
GRANT SELECT ON lethe.installation TO lethe_gateway;

-- Each range of a download is an entry of the trail that nobody can ever delete. Whoever has a token must not be able to
-- write as many as there are seconds in its lifetime.
ALTER TABLE lethe.results ADD COLUMN downloads integer NOT NULL DEFAULT 0;

DROP FUNCTION lethe.record_download(bytea, bigint, bigint);
-- As before, up to `most` times for a result; then it records nothing and returns no row.
CREATE FUNCTION lethe.record_download(wanted bytea, first_byte bigint, last_byte bigint, most integer) RETURNS SETOF bigint
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
REVOKE ALL ON FUNCTION lethe.record_download(bytea, bigint, bigint, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lethe.record_download(bytea, bigint, bigint, integer) TO lethe_gateway;
