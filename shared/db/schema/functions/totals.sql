-- Totals are kept, not counted (ADR 0032).

-- What stays as it was cancels out. They run with the rights of the owner: whoever may add a request may not change a total
-- by hand.
CREATE OR REPLACE FUNCTION lethe.count_requests() RETURNS trigger
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

CREATE OR REPLACE FUNCTION lethe.count_callbacks() RETURNS trigger
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

-- Only whoever sets a database up anew empties a table as a whole.
CREATE OR REPLACE FUNCTION lethe.count_nothing() RETURNS trigger
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
