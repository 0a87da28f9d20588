-- Intake and the calendar.

-- The lock between intake (shared) and the closing of ticks (exclusive). One number, named once.
CREATE OR REPLACE FUNCTION lethe.calendar_lock() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 5499812871;

-- Intake: first the shared lock, then the clock. Statements of one function run in order; in one SELECT
-- they would not have to. `received_at` never falls behind a tick that is closed already.
CREATE OR REPLACE FUNCTION lethe.begin_intake(OUT received_at timestamptz, OUT calendar_version bigint)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(lethe.calendar_lock());
    SELECT max(version) INTO calendar_version FROM lethe.calendars;
    SELECT greatest(lethe.now(), max(closed_through)) INTO received_at FROM lethe.lanes;
END $$;
