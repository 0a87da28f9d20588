-- What everything else stands on: the schema, the one clock, the version of the calendar, leadership, controllers.

CREATE SCHEMA lethe;
COMMENT ON SCHEMA lethe IS 'State of Lethe: requests, batches, slices, callbacks, results.';

-- The one clock. Tests shift it by updating the one row; in production the shift is zero.
CREATE TABLE lethe.clock (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    shift    interval NOT NULL DEFAULT '0'
);
INSERT INTO lethe.clock DEFAULT VALUES;

CREATE FUNCTION lethe.now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT clock_timestamp() + shift FROM lethe.clock
$$;

CREATE TABLE lethe.controllers (
    controller_id       text PRIMARY KEY CHECK (controller_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    partition_no        integer GENERATED ALWAYS AS IDENTITY UNIQUE,
    amqp_user           text,
    any_amqp_user       boolean NOT NULL DEFAULT false,
    api_key             text NOT NULL UNIQUE,
    api_secret_hash     text NOT NULL,
    signature_algorithm text NOT NULL DEFAULT 'rsa-pkcs1v15'
        CHECK (signature_algorithm IN ('rsa-pkcs1v15', 'rsa-pss', 'ecdsa-p256')),
    include_profile     boolean NOT NULL DEFAULT true,
    created_at          timestamptz NOT NULL DEFAULT lethe.now(),
    CHECK (NOT (any_amqp_user AND amqp_user IS NOT NULL))
);

-- The calendar in force is the row with the highest version. Only the leading scheduler writes it.
CREATE TABLE lethe.calendars (
    version            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    erasure_schedule   text NOT NULL,
    expedited_schedule text NOT NULL,
    access_schedule    text NOT NULL,
    waiting_period     interval NOT NULL CHECK (waiting_period >= '0'),
    completion_margin  interval NOT NULL CHECK (completion_margin >= '0'),
    stored_at          timestamptz NOT NULL DEFAULT lethe.now()
);

-- One row per kind of batch: how far its ticks are closed. Intake never promises a tick at or before it,
-- so that a clock that steps back cannot slip a request behind a closed tick.
CREATE TABLE lethe.lanes (
    lane           text PRIMARY KEY CHECK (lane IN ('erasure', 'expedited', 'access')),
    closed_through timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO lethe.lanes (lane) VALUES ('erasure'), ('expedited'), ('access');

-- Leadership is a lease with an epoch that only grows. Each write of a leader holds this row FOR SHARE.
CREATE TABLE lethe.leaders (
    name       text PRIMARY KEY,
    epoch      bigint NOT NULL DEFAULT 0,
    holder     uuid,
    expires_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO lethe.leaders (name) VALUES ('scheduler');

CREATE FUNCTION lethe.assert_leader(leader_name text, leader_epoch bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM lethe.leaders WHERE name = leader_name AND epoch = leader_epoch FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % of % is over', leader_epoch, leader_name USING ERRCODE = 'LT001';
    END IF;
END $$;

-- The lock between intake (shared) and the closing of ticks (exclusive). One number, named once.
CREATE FUNCTION lethe.calendar_lock() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 5499812871;

-- Intake: first the shared lock, then the clock. Statements of one function run in order; in one SELECT
-- they would not have to. `received_at` never falls behind a tick that is closed already.
CREATE FUNCTION lethe.begin_intake(OUT received_at timestamptz, OUT calendar_version bigint)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(lethe.calendar_lock());
    SELECT max(version) INTO calendar_version FROM lethe.calendars;
    SELECT greatest(lethe.now(), max(closed_through)) INTO received_at FROM lethe.lanes;
END $$;
