-- Nothing counts all of history any more, nothing that is listed is searched for, and the clock is doubted
-- (docs/adr/0032-a-loop-that-waits-for-nobody.md, docs/adr/0033-a-clock-that-is-doubted.md).

-- The clock. What a database's clock would show that went ahead by itself; only tests set it. The shift is what tests, demo
-- and fault suite agree on: the guard judges the clock without it.
ALTER TABLE lethe.clock ADD COLUMN drift interval NOT NULL DEFAULT '0';
CREATE FUNCTION lethe.wall_clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT clock_timestamp() + drift FROM lethe.clock
$$;
CREATE OR REPLACE FUNCTION lethe.now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT clock_timestamp() + drift + shift FROM lethe.clock
$$;

-- The last clock that a leader believed, and what an operator agreed to.
ALTER TABLE lethe.leaders
    ADD COLUMN known_clock timestamptz,
    ADD COLUMN agreed_clock timestamptz,
    ADD COLUMN agreements bigint NOT NULL DEFAULT 0;

-- The lead is renewed while its transactions are under way: with the epoch in a key, a renewal changes no key, and does not
-- wait for whoever holds FOR KEY SHARE; whoever takes over changes the epoch, and does.
CREATE UNIQUE INDEX leaders_term ON lethe.leaders (name, epoch);
CREATE OR REPLACE FUNCTION lethe.assert_leader(leader_name text, leader_epoch bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM lethe.leaders WHERE name = leader_name AND epoch = leader_epoch FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % of % is over', leader_epoch, leader_name USING ERRCODE = 'LT001';
    END IF;
END $$;

-- Totals. Each statement that changes requests or callbacks adds the difference as rows of its own, so that nobody waits for
-- anybody else's row; the leader folds them. A total is what was folded and what was not, read in one statement.
CREATE TABLE lethe.request_totals (
    request_type text NOT NULL,
    status       text NOT NULL,
    total        bigint NOT NULL,
    PRIMARY KEY (request_type, status)
);
CREATE TABLE lethe.batch_totals (
    batch_id bigint NOT NULL,
    status   text NOT NULL,
    total    bigint NOT NULL,
    PRIMARY KEY (batch_id, status)
);
CREATE TABLE lethe.callback_totals (
    state text PRIMARY KEY,
    total bigint NOT NULL
);
CREATE TABLE lethe.request_deltas (
    batch_id     bigint,
    request_type text NOT NULL,
    status       text NOT NULL,
    delta        bigint NOT NULL
);
CREATE TABLE lethe.callback_deltas (
    state text NOT NULL,
    delta bigint NOT NULL
);

-- Nothing but their content tells them apart, which a publication FOR ALL TABLES has to be told
-- (docs/adr/0036-a-key-for-event-batches.md).
ALTER TABLE lethe.request_deltas REPLICA IDENTITY FULL;
ALTER TABLE lethe.callback_deltas REPLICA IDENTITY FULL;

-- What stays as it was cancels out. They run with the rights of the owner: whoever may add a request may not change a total
-- by hand.
CREATE FUNCTION lethe.count_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, count(*) FROM new_rows GROUP BY 1, 2, 3;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, sum(difference)
          FROM (SELECT batch_id, request_type, status, 1 AS difference FROM new_rows
                UNION ALL
                SELECT batch_id, request_type, status, -1 FROM old_rows) AS moved
         GROUP BY 1, 2, 3 HAVING sum(difference) <> 0;
    ELSE
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, -count(*) FROM old_rows GROUP BY 1, 2, 3;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_new AFTER INSERT ON lethe.requests
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();
CREATE TRIGGER count_changed AFTER UPDATE ON lethe.requests
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();
CREATE TRIGGER count_removed AFTER DELETE ON lethe.requests
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();

CREATE FUNCTION lethe.count_callbacks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lethe.callback_deltas (state, delta) SELECT state, count(*) FROM new_rows GROUP BY 1;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO lethe.callback_deltas (state, delta)
        SELECT state, sum(difference)
          FROM (SELECT state, 1 AS difference FROM new_rows UNION ALL SELECT state, -1 FROM old_rows) AS moved
         GROUP BY 1 HAVING sum(difference) <> 0;
    ELSE
        INSERT INTO lethe.callback_deltas (state, delta) SELECT state, -count(*) FROM old_rows GROUP BY 1;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_new AFTER INSERT ON lethe.callbacks
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();
CREATE TRIGGER count_changed AFTER UPDATE ON lethe.callbacks
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();
CREATE TRIGGER count_removed AFTER DELETE ON lethe.callbacks
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();

-- Only whoever sets a database up anew empties a table as a whole.
CREATE FUNCTION lethe.count_nothing() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_TABLE_NAME = 'requests' THEN
        DELETE FROM lethe.request_totals;
        DELETE FROM lethe.batch_totals;
        DELETE FROM lethe.request_deltas;
    ELSE
        DELETE FROM lethe.callback_totals;
        DELETE FROM lethe.callback_deltas;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER count_nothing AFTER TRUNCATE ON lethe.requests
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_nothing();
CREATE TRIGGER count_nothing AFTER TRUNCATE ON lethe.callbacks
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_nothing();

-- Lists. Keys of requests grow with their receipt, so the primary key lists the latest ones, and `requests_of_controller`
-- (V0015) those of one controller. No index names the status (docs/adr/0024-changes-in-place.md): what is pending or completed is
-- found by its batch, what is in progress by its slice.
DROP INDEX lethe.requests_listed;
CREATE INDEX requests_cancelled ON lethe.requests (request_key) WHERE cancelled_at IS NOT NULL;
CREATE INDEX requests_cancelled_of_controller ON lethe.requests (controller_id, request_key)
    WHERE cancelled_at IS NOT NULL;
DROP INDEX lethe.requests_awaiting_approval;
CREATE INDEX requests_awaiting_approval ON lethe.requests (request_key)
    WHERE approval = 'needed' AND cancelled_at IS NULL;
CREATE INDEX slices_open_latest ON lethe.slices (last_request) WHERE state = 'ready';

-- The purge walks in the order of the key, and goes on where it was.
DROP INDEX lethe.requests_to_purge, lethe.requests_cancelled_to_purge;
CREATE INDEX requests_to_purge ON lethe.requests (batch_id, request_key) WHERE sealed_request IS NOT NULL;
CREATE INDEX requests_cancelled_to_purge ON lethe.requests (cancelled_at, request_key)
    WHERE sealed_request IS NOT NULL AND cancelled_at IS NOT NULL;

-- Bytes of an expired result that could not be deleted are tried again later, and hold up no other.
ALTER TABLE lethe.results
    ADD COLUMN delete_after timestamptz NOT NULL DEFAULT '-infinity',
    ADD COLUMN delete_tries integer NOT NULL DEFAULT 0;
DROP INDEX lethe.results_to_delete;
CREATE INDEX results_to_delete ON lethe.results (delete_after) WHERE expired_at IS NOT NULL AND object_path IS NOT NULL;
