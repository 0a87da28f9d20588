-- The built-in data store. Partitioned by controller: no two controllers' data share a file.

CREATE SCHEMA subject_data;
COMMENT ON SCHEMA subject_data IS 'Profiles, identities and event batches of data subjects; the built-in data store.';

-- SHA-1 is not built in; pgcrypto may lie in any schema.
DO $$
DECLARE home text;
BEGIN
    CREATE EXTENSION IF NOT EXISTS pgcrypto;
    SELECT quote_ident(n.nspname) INTO home
      FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pgcrypto';
    EXECUTE format($f$
        CREATE FUNCTION lethe.sha1(value text) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
        AS 'SELECT %s.digest(convert_to(value, ''UTF8''), ''sha1'')' $f$, home);
END $$;

-- The one definition of normalisation: ASCII white space trimmed, e-mail lower-cased (ASCII only, hence "C").
-- \x0B is the vertical tab: PostgreSQL knows no \v, and would trim the letter v.
CREATE FUNCTION lethe.normalise_identity(identity_type text, value text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT CASE identity_type
        WHEN 'email' THEN lower(btrim(value, E' \t\n\r\f\x0B') COLLATE "C")
        ELSE btrim(value, E' \t\n\r\f\x0B') END
$$;
CREATE FUNCTION lethe.identity_sha256(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT sha256(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8'))
$$;
CREATE FUNCTION lethe.identity_sha1(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT lethe.sha1(lethe.normalise_identity(identity_type, value))
$$;
CREATE FUNCTION lethe.identity_md5(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT decode(md5(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8')), 'hex')
$$;

CREATE TABLE subject_data.profiles (
    controller_id text NOT NULL,
    mpid          bigint NOT NULL,
    attributes    jsonb NOT NULL DEFAULT '{}',
    audiences     jsonb NOT NULL DEFAULT '[]',
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (controller_id, mpid)
) PARTITION BY LIST (controller_id);

CREATE TABLE subject_data.profile_identities (
    controller_id  text NOT NULL,
    identity_type  text NOT NULL,
    identity_value text NOT NULL,
    mpid           bigint NOT NULL,
    sha256         bytea NOT NULL GENERATED ALWAYS AS (lethe.identity_sha256(identity_type, identity_value)) STORED,
    sha1           bytea NOT NULL GENERATED ALWAYS AS (lethe.identity_sha1(identity_type, identity_value)) STORED,
    md5            bytea NOT NULL GENERATED ALWAYS AS (lethe.identity_md5(identity_type, identity_value)) STORED,
    PRIMARY KEY (controller_id, mpid, identity_type, sha256)
) PARTITION BY LIST (controller_id);
CREATE INDEX ON subject_data.profile_identities (sha256, identity_type);
CREATE INDEX ON subject_data.profile_identities (sha1, identity_type);
CREATE INDEX ON subject_data.profile_identities (md5, identity_type);

CREATE SEQUENCE subject_data.event_batch_id AS bigint CACHE 64;
CREATE TABLE subject_data.event_batches (
    id            bigint NOT NULL DEFAULT nextval('subject_data.event_batch_id'),
    controller_id text NOT NULL,
    mpid          bigint NOT NULL,
    received_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- json, not jsonb: a subject gets each batch exactly as it was stored. One line: the file is JSON Lines.
    body          json NOT NULL CHECK (body::text !~ '[\n\r]')
) PARTITION BY LIST (controller_id);
ALTER SEQUENCE subject_data.event_batch_id OWNED BY subject_data.event_batches.id;
CREATE INDEX ON subject_data.event_batches (mpid, id);

-- The partitions of a controller are built aside and attached: CREATE TABLE … PARTITION OF would lock the
-- parent against every other controller's work.
CREATE FUNCTION lethe.create_partitions(new_controller text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    parent text;
    child  text;
    no     integer;
BEGIN
    SELECT partition_no INTO STRICT no FROM lethe.controllers WHERE controller_id = new_controller;
    FOREACH parent IN ARRAY ARRAY['profiles', 'profile_identities', 'event_batches'] LOOP
        child := format('%s_p%s', parent, no);
        IF to_regclass('subject_data.' || child) IS NOT NULL THEN
            CONTINUE;
        END IF;
        EXECUTE format('CREATE TABLE subject_data.%I (LIKE subject_data.%I INCLUDING ALL, CHECK (controller_id = %L))',
                       child, parent, new_controller);
        EXECUTE format('ALTER TABLE subject_data.%I ATTACH PARTITION subject_data.%I FOR VALUES IN (%L)',
                       parent, child, new_controller);
    END LOOP;
END $$;
