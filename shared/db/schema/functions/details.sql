-- What is personal in requests lies apart, by the week in which it is needed, and goes with it (ADR 0042).

-- The week of an instant, opened where there is none. Its partition is built aside and attached, as all are. An instant that is
-- too far off is moved near: what has not ended as its week is over goes on to another one. The gateway calls this as well, and
-- may make no tables.
CREATE OR REPLACE FUNCTION lethe.open_week(instant timestamptz, span interval,
                                           OUT week bigint, OUT starts_at timestamptz, OUT ends_at timestamptz)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted timestamptz := least(instant, lethe.now() + interval '2 years');
BEGIN
    FOR attempt IN 1 .. 10 LOOP
        SELECT w.week, w.starts_at, w.ends_at INTO open_week.week, open_week.starts_at, open_week.ends_at
          FROM lethe.detail_weeks w WHERE wanted >= w.starts_at AND wanted < w.ends_at ORDER BY w.week LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
        -- From a Monday on.
        starts_at := date_bin(span, wanted, timestamptz '1970-01-05 00:00:00+00');
        ends_at := starts_at + span;
        -- Whoever opens the same one is waited for.
        INSERT INTO lethe.detail_weeks AS w (starts_at, ends_at) VALUES (open_week.starts_at, open_week.ends_at)
        ON CONFLICT ON CONSTRAINT detail_weeks_starts_at_ends_at_key DO NOTHING RETURNING w.week INTO open_week.week;
        EXIT WHEN FOUND;
    END LOOP;
    EXECUTE format('CREATE TABLE lethe.request_details_w%s (LIKE lethe.request_details INCLUDING ALL, CHECK (week = %s))',
                   week, week);
    EXECUTE format('ALTER TABLE lethe.request_details ATTACH PARTITION lethe.request_details_w%s FOR VALUES IN (%s)',
                   week, week);
END $$;

-- Whoever adds details holds their week: it cannot go before that is committed, and who drops it sees what was added.
CREATE OR REPLACE FUNCTION lethe.hold_weeks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    held integer;
BEGIN
    PERFORM 1 FROM lethe.detail_weeks w WHERE w.week IN (SELECT n.week FROM new_rows n) ORDER BY w.week FOR KEY SHARE;
    GET DIAGNOSTICS held = ROW_COUNT;
    IF held < (SELECT count(DISTINCT n.week) FROM new_rows n) THEN
        RAISE EXCEPTION 'a week of details has been dropped' USING ERRCODE = '40001';
    END IF;
    RETURN NULL;
END $$;

-- Drops a week with all that is personal in it, and says so on the trail of each controller; the number of requests, or null
-- where there is no such week. What has not ended was moved before: where something has not, nothing is dropped.
CREATE OR REPLACE FUNCTION lethe.drop_week(which bigint) RETURNS bigint
-- A week is read as a whole, and each of its requests by its key: never all requests there are.
LANGUAGE plpgsql SET enable_seqscan = on SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    dropped lethe.detail_weeks;
    total   bigint;
BEGIN
    -- First the week, which waits for those who hold it; the next statements see what they have added.
    DELETE FROM lethe.detail_weeks w WHERE w.week = which RETURNING w.* INTO dropped;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF EXISTS (SELECT FROM lethe.request_details d JOIN lethe.requests r ON r.request_key = d.request_key
                WHERE d.week = which AND r.status IN ('pending', 'in_progress'))
    THEN
        RAISE EXCEPTION 'details of week % are needed', which USING ERRCODE = 'LT003';
    END IF;
    WITH told AS (
        INSERT INTO lethe.audit_entries (controller_id, event, details)
        SELECT d.controller_id, 'details.dropped',
               json_build_object('week', which, 'starts_at', dropped.starts_at, 'ends_at', dropped.ends_at,
                                 'requests', count(*))
          FROM lethe.request_details d WHERE d.week = which GROUP BY d.controller_id ORDER BY d.controller_id
        RETURNING (details ->> 'requests')::bigint AS requests)
    SELECT coalesce(sum(requests), 0) INTO total FROM told;
    -- The table is locked against everybody for as long as this takes. Whoever reads it for long is not waited for: all others
    -- would wait as well.
    PERFORM set_config('lock_timeout', '200ms', true);
    EXECUTE format('DROP TABLE lethe.request_details_w%s', which);
    RETURN total;
END $$;
