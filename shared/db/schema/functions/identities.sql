-- Normalisation, digests and keys of identities: the reference. The generated columns of subject_data.profile_identities compute
-- the same by plain expressions, ten times as fast (ADR 0044); a test compares them, and the code of requests, on odd values.

-- The one definition of normalisation: ASCII white space trimmed, e-mail lower-cased (ASCII only, hence "C").
-- \x0B is the vertical tab: PostgreSQL knows no \v, and would trim the letter v.
CREATE OR REPLACE FUNCTION lethe.normalise_identity(identity_type text, value text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT CASE identity_type
        WHEN 'email' THEN lower(btrim(value, E' \t\n\r\f\x0B') COLLATE "C")
        ELSE btrim(value, E' \t\n\r\f\x0B') END
$$;

-- By pgcrypto; if that is installed in another schema than `public`, the function names it.
CREATE OR REPLACE FUNCTION lethe.sha1(value text) RETURNS bytea LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
AS $$SELECT public.digest(convert_to(value, 'UTF8'), 'sha1')$$;

CREATE OR REPLACE FUNCTION lethe.identity_md5(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT decode(md5(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8')), 'hex')
$$;

CREATE OR REPLACE FUNCTION lethe.identity_sha1(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT lethe.sha1(lethe.normalise_identity(identity_type, value))
$$;

CREATE OR REPLACE FUNCTION lethe.identity_sha256(identity_type text, value text) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT sha256(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8'))
$$;

-- What an identity is found by: sixteen bytes of the SHA-256 over its type and one of its digests.
CREATE OR REPLACE FUNCTION lethe.identity_key(identity_type text, digest bytea) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT encode(substring(sha256(convert_to(identity_type || ' ' || encode(digest, 'hex'), 'UTF8')) FOR 16), 'hex')::uuid
$$;
