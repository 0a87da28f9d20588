-- What is personal in requests lies apart, by the week in which it is needed, and goes with it (ADR 0042).

-- The week of an instant, opened where there is none; as long as the latest calendar says. Its partition is built aside and
-- attached, as all are. An instant that is too far off is moved near: what has not ended as its week is over goes on to another
-- one.
CREATE OR REPLACE FUNCTION lethe.week_of(instant timestamptz,
                                         OUT week bigint, OUT starts_at timestamptz, OUT ends_at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    wanted timestamptz := least(instant, lethe.now() + interval '2 years');
    span   interval := (SELECT c.details_span FROM lethe.calendars c ORDER BY c.version DESC LIMIT 1);
BEGIN
    FOR attempt IN 1 .. 10 LOOP
        SELECT w.week, w.starts_at, w.ends_at INTO week_of.week, week_of.starts_at, week_of.ends_at
          FROM lethe.detail_weeks w WHERE wanted >= w.starts_at AND wanted < w.ends_at ORDER BY w.week LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
        -- From a Monday on.
        starts_at := date_bin(coalesce(span, '7 days'), wanted, timestamptz '1970-01-05 00:00:00+00');
        ends_at := starts_at + coalesce(span, '7 days');
        -- Whoever opens the same one is waited for.
        INSERT INTO lethe.detail_weeks AS w (starts_at, ends_at) VALUES (week_of.starts_at, week_of.ends_at)
        ON CONFLICT ON CONSTRAINT detail_weeks_starts_at_ends_at_key DO NOTHING RETURNING w.week INTO week_of.week;
        EXIT WHEN FOUND;
    END LOOP;
    EXECUTE format('CREATE TABLE lethe.request_details_w%s (LIKE lethe.request_details INCLUDING ALL, CHECK (week = %s))',
                   week, week);
    EXECUTE format('ALTER TABLE lethe.request_details ATTACH PARTITION lethe.request_details_w%s FOR VALUES IN (%s)',
                   week, week);
END $$;

-- The same for intake, whose requests are to run, and for the gateway, which may make no tables but these: no week of the past,
-- and none of a length of its own.
CREATE OR REPLACE FUNCTION lethe.open_week(instant timestamptz,
                                           OUT week bigint, OUT starts_at timestamptz, OUT ends_at timestamptz)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT w.week, w.starts_at, w.ends_at FROM lethe.week_of(greatest(instant, lethe.now())) w
$$;

-- Whoever adds details holds their week: it cannot go before that is committed, and who drops it sees what was added. And
-- nobody adds details that no request of that controller has there.
CREATE OR REPLACE FUNCTION lethe.hold_weeks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    held integer;
BEGIN
    PERFORM 1 FROM lethe.detail_weeks w WHERE w.week IN (SELECT n.week FROM new_rows n) ORDER BY w.week FOR KEY SHARE;
    GET DIAGNOSTICS held = ROW_COUNT;
    IF held < (SELECT count(DISTINCT n.week) FROM new_rows n) THEN
        -- As for a week whose partition is gone already.
        RAISE EXCEPTION 'a week of details has been dropped' USING ERRCODE = 'check_violation';
    END IF;
    IF EXISTS (SELECT FROM new_rows n
                WHERE (SELECT count(*) FROM lethe.requests r
                        WHERE r.request_key = n.request_key AND r.controller_id = n.controller_id
                          AND r.details_week = n.week) = 0)
    THEN
        RAISE EXCEPTION 'details of no request' USING ERRCODE = 'LT003';
    END IF;
    RETURN NULL;
END $$;

-- Drops a week with all that is personal in it, once the retention has passed since its end, and says so on the trail of each
-- controller; the number of requests, or null where no such week is due. What is still needed was moved before: where something
-- has not, nothing is dropped.
CREATE OR REPLACE FUNCTION lethe.drop_week(which bigint, retention interval) RETURNS bigint
-- A week is read as a whole, and each of its requests by its key: never all requests there are.
LANGUAGE plpgsql SET enable_seqscan = on SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    dropped lethe.detail_weeks;
    total   bigint;
BEGIN
    -- The table is locked against everybody for as long as its drop takes. Whoever reads it for long is not waited for: all others
    -- would wait as well. Asked first, and given back: to read a week in vain takes long.
    BEGIN
        PERFORM set_config('lock_timeout', '200ms', true);
        EXECUTE format('LOCK TABLE lethe.request_details_w%s IN ACCESS EXCLUSIVE MODE', which);
        RAISE EXCEPTION 'given back' USING ERRCODE = 'LT004';
    EXCEPTION
        WHEN SQLSTATE 'LT004' THEN NULL;
        WHEN undefined_table THEN RETURN NULL;
    END;
    -- First the week, which waits for those who hold it; the next statements see what they have added.
    DELETE FROM lethe.detail_weeks w WHERE w.week = which AND w.ends_at <= lethe.now() - retention
    RETURNING w.* INTO dropped;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF EXISTS (SELECT FROM lethe.request_details d JOIN lethe.requests r ON r.request_key = d.request_key
                WHERE d.week = which AND r.details_week = which
                  AND (r.status IN ('pending', 'in_progress')
                       OR (SELECT count(*) FROM lethe.callbacks c
                            WHERE c.request_key = d.request_key AND c.state IN ('waiting', 'ready')) > 0))
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
    PERFORM set_config('lock_timeout', '200ms', true);
    EXECUTE format('DROP TABLE lethe.request_details_w%s', which);
    RETURN total;
END $$;
