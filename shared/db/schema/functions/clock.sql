-- The one clock, and who leads by it.

-- The clock of everything: PostgreSQL's, plus a shift that is zero in production and that tests move.
CREATE OR REPLACE FUNCTION lethe.now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT clock_timestamp() + drift + shift FROM lethe.clock
$$;

-- PostgreSQL's clock without the shift, plus a drift that only tests set: what the clock guard judges by (ADR 0033).
CREATE OR REPLACE FUNCTION lethe.wall_clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT clock_timestamp() + drift FROM lethe.clock
$$;

-- Fails unless the epoch is that of the leader, whose row stays locked until the transaction ends.
CREATE OR REPLACE FUNCTION lethe.assert_leader(leader_name text, leader_epoch bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM lethe.leaders WHERE name = leader_name AND epoch = leader_epoch FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % of % is over', leader_epoch, leader_name USING ERRCODE = 'LT001';
    END IF;
END $$;
