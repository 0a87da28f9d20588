-- Identities are found by keys of sixteen bytes, one for each digest that a request may bring (ADR 0044). They are computed by plain
-- expressions: functions of functions took ten times as long. The functions stay as the reference that a test holds these against.

CREATE OR REPLACE FUNCTION lethe.identity_key(identity_type text, digest bytea) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT encode(substring(sha256(convert_to(identity_type || ' ' || encode(digest, 'hex'), 'UTF8')) FOR 16), 'hex')::uuid
$$;

DO $$
DECLARE
    pgcrypto text;
    -- Immutable, where convert_to is not: the bytes of a text are those of its UTF-8.
    bytes    constant text := 'decode(replace(%s, ''\'', ''\\''), ''escape'')';
    normal   constant text := 'CASE identity_type WHEN ''email'' THEN lower(btrim(identity_value, E'' \t\n\r\f\x0B'') COLLATE "C")'
                           || ' ELSE btrim(identity_value, E'' \t\n\r\f\x0B'') END';
    key      constant text := 'encode(substring(sha256(' || format(bytes, 'identity_type || '' '' || %s') || ') FOR 16), ''hex'')::uuid';
    value    constant text := format(bytes, normal);
BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE EXCEPTION 'the database must have the encoding UTF8, not %', current_setting('server_encoding');
    END IF;
    SELECT quote_ident(n.nspname) INTO STRICT pgcrypto
      FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pgcrypto';
    ALTER TABLE subject_data.profile_identities
        DROP CONSTRAINT profile_identities_pkey, DROP COLUMN sha256, DROP COLUMN sha1, DROP COLUMN md5;
    -- One rewriting for all three.
    EXECUTE format('ALTER TABLE subject_data.profile_identities
                        ADD COLUMN by_sha256 uuid NOT NULL GENERATED ALWAYS AS (%s) STORED,
                        ADD COLUMN by_sha1 uuid NOT NULL GENERATED ALWAYS AS (%s) STORED,
                        ADD COLUMN by_md5 uuid NOT NULL GENERATED ALWAYS AS (%s) STORED',
                   format(key, format('encode(sha256(%s), ''hex'')', value)),
                   format(key, format('encode(%s.digest(%s, ''sha1''), ''hex'')', pgcrypto, value)),
                   format(key, format('md5(%s)', value)));
END $$;

ALTER TABLE subject_data.profile_identities ADD PRIMARY KEY (controller_id, mpid, by_sha256);
-- A look-up reads the index alone: it names the controller, whose partition it is.
CREATE INDEX ON subject_data.profile_identities (by_sha256) INCLUDE (mpid, controller_id);
CREATE INDEX ON subject_data.profile_identities (by_sha1) INCLUDE (mpid, controller_id);
CREATE INDEX ON subject_data.profile_identities (by_md5) INCLUDE (mpid, controller_id);
