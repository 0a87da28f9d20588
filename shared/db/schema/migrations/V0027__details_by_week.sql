-- What is personal in requests lies apart, by the week in which it is needed, and is dropped with it (ADR 0042). Workers of earlier
-- releases look for it in lethe.requests: they are stopped before.

CREATE TABLE lethe.detail_weeks (
    week      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    starts_at timestamptz NOT NULL,
    ends_at   timestamptz NOT NULL,
    UNIQUE (starts_at, ends_at),
    CHECK (starts_at < ends_at)
);

-- The profiles that a request names, that it matched as it was received, and those that were found as it was released.
CREATE TABLE lethe.request_details (
    week             bigint NOT NULL,
    request_key      bigint NOT NULL,
    controller_id    text NOT NULL,
    sealed_request   bytea NOT NULL,
    sealed_reporting bytea,
    named            bigint[],
    at_receipt       bigint[],
    at_release       bigint[],
    PRIMARY KEY (week, request_key)
) PARTITION BY LIST (week);
-- What is sealed does not become shorter.
ALTER TABLE lethe.request_details ALTER COLUMN sealed_request SET STORAGE EXTERNAL,
                                  ALTER COLUMN sealed_reporting SET STORAGE EXTERNAL;

-- Which week has the details; null once they were purged by themselves.
ALTER TABLE lethe.requests ADD COLUMN details_week bigint;

-- How long a week is: a calendar is what intake goes by.
ALTER TABLE lethe.calendars ADD COLUMN details_span interval NOT NULL DEFAULT '7 days'
                            CHECK (details_span > '0');

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

CREATE TRIGGER hold_weeks AFTER INSERT ON lethe.request_details REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.hold_weeks();

GRANT SELECT ON lethe.detail_weeks TO lethe_gateway;
GRANT SELECT, INSERT ON lethe.request_details TO lethe_gateway;
ALTER TABLE lethe.request_details ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.request_details TO lethe_gateway USING (controller_id = lethe.acting_controller());
REVOKE EXECUTE ON FUNCTION lethe.week_of(timestamptz), lethe.open_week(timestamptz), lethe.drop_week(bigint, interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lethe.open_week(timestamptz) TO lethe_gateway;

-- What there is moves, to the week in which each has ended or will run. The triggers of requests have nothing to tell of that.
CREATE TEMPORARY TABLE moving ON COMMIT DROP AS
SELECT r.request_key, coalesce(r.completed_at, r.cancelled_at, b.runs_at + interval '1 day', r.received_at) AS instant,
       NULL::bigint AS week
  FROM lethe.requests r LEFT JOIN lethe.batches b USING (batch_id) WHERE r.sealed_request IS NOT NULL;
DO $$
DECLARE
    one record;
BEGIN
    FOR one IN SELECT DISTINCT date_bin('7 days', instant, timestamptz '1970-01-05 00:00:00+00') AS starts_at FROM moving ORDER BY 1
    LOOP
        UPDATE moving m SET week = w.week FROM lethe.week_of(one.starts_at) w
         WHERE m.instant >= one.starts_at AND m.instant < one.starts_at + interval '7 days';
    END LOOP;
END $$;
ALTER TABLE lethe.requests DISABLE TRIGGER USER;
ALTER TABLE lethe.request_details DISABLE TRIGGER USER;
INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, sealed_reporting, named, at_receipt, at_release)
SELECT v.week, r.request_key, r.controller_id, r.sealed_request, r.sealed_reporting, m.named, m.at_receipt, m.at_release
  FROM moving v JOIN lethe.requests r USING (request_key)
 CROSS JOIN LATERAL (
    SELECT array_agg(mpid ORDER BY mpid) FILTER (WHERE source = 'named') AS named,
           array_agg(mpid ORDER BY mpid) FILTER (WHERE source = 'receipt') AS at_receipt,
           array_agg(mpid ORDER BY mpid) FILTER (WHERE source = 'release') AS at_release
      FROM lethe.request_mpids WHERE request_key = r.request_key) m;
-- Nothing personal stays in the rows: a column that is dropped is only hidden. The versions of before go with the next vacuum.
UPDATE lethe.requests r SET details_week = v.week, sealed_request = NULL, sealed_reporting = NULL
  FROM moving v WHERE v.request_key = r.request_key;
ALTER TABLE lethe.request_details ENABLE TRIGGER USER;
ALTER TABLE lethe.requests ENABLE TRIGGER USER;
DO $$
BEGIN
    IF EXISTS (SELECT FROM lethe.requests r WHERE r.sealed_request IS NOT NULL)
       OR EXISTS (SELECT FROM moving WHERE week IS NULL) THEN
        RAISE EXCEPTION 'not all requests have found a week for their details';
    END IF;
END $$;

DROP TABLE lethe.request_mpids;
DROP TRIGGER purge_reporting ON lethe.requests;
DROP FUNCTION lethe.purge_reporting();
DROP INDEX lethe.requests_to_purge, lethe.requests_cancelled_to_purge;
CREATE OR REPLACE VIEW lethe.slice_members AS
    SELECT s.slice_id, r.request_key, r.subject_request_id, r.request_type, r.status, r.details_week
      FROM lethe.slices s
      JOIN lethe.requests r ON r.batch_id = s.batch_id AND r.controller_id = s.controller_id
                           AND r.request_key BETWEEN s.first_request AND s.last_request AND r.slice_id = s.slice_id;
ALTER TABLE lethe.requests DROP COLUMN sealed_request, DROP COLUMN sealed_reporting, DROP COLUMN purged_at;
CREATE INDEX requests_cancelled_to_purge ON lethe.requests (cancelled_at, request_key)
    WHERE cancelled_at IS NOT NULL AND details_week IS NOT NULL;

-- The trigger that tells of profiles and of the purge follows with the receipts (V0028): until then no request can be changed.

-- Claims the due callbacks of endpoints, of each as many as are wanted, within its limit and its breaker. A claim goes on from
-- the place of the last one; what lies before it is looked at as soon as there is room for it, unless that took long the last
-- time: so a claim with room left has seen everything (ADR 0025). The sealed request comes along only if what callbacks need
-- was not sealed by itself.
CREATE OR REPLACE FUNCTION lethe.claim_due_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds float8,
                                          endpoint_limit integer)
RETURNS TABLE (callback_id uuid, endpoint_id bigint, url_no smallint, request_status text,
               expected_completion_time timestamptz, attempt integer, started_at timestamptz, controller_id text,
               subject_request_id uuid, api_version text, sealed_reporting bytea, sealed_request bytea,
               signature_algorithm text, result_id uuid, token_salt bytea, lines bigint, replay boolean)
-- Plans are kept: one that was made for tables with next to nothing in them must not read them as a whole later.
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    instant timestamptz;
BEGIN
    -- In key order, as everyone who locks several of them does. What is in flight is counted under these locks.
    PERFORM 1 FROM lethe.endpoints e WHERE e.endpoint_id = ANY (endpoints)
      ORDER BY e.endpoint_id FOR NO KEY UPDATE;
    instant := lethe.now();
    RETURN QUERY
    WITH rooms AS MATERIALIZED (
        SELECT e.endpoint_id, held.ids, held.oldest, looks.back,
               -- What lies before the place, if there is room for it.
               NOT looks.back AND e.looked_back_at <= instant AS may_look,
               CASE WHEN looks.back THEN '-infinity' ELSE e.claimed_until END AS since,
               -- A breaker that was open lets one through to probe.
               least(asked.wanted, CASE WHEN e.open_until IS NULL THEN endpoint_limit ELSE 1 END - held.in_force) AS room
          FROM unnest(endpoints, wanted) AS asked (endpoint_id, wanted)
          JOIN lethe.endpoints e ON e.endpoint_id = asked.endpoint_id
         CROSS JOIN LATERAL (
            -- Every two seconds, for what no claim has had room for. And where the clock was set back.
            SELECT e.looked_back_at NOT BETWEEN instant - interval '2 s' AND instant + interval '1 minute'
                   OR greatest(e.claimed_until, e.claimed_at) > instant) AS looks (back)
         CROSS JOIN LATERAL (
            SELECT array_agg(c.callback_id) AS ids, min(c.next_attempt_at) AS oldest,
                   (count(*) FILTER (WHERE c.lease_expires_at > instant))::integer AS in_force
              FROM lethe.callbacks c
             WHERE c.callback_id = ANY (e.in_flight) AND c.lease_token IS NOT NULL) held
         WHERE e.open_until IS NULL OR e.open_until <= instant),
    claimed AS (
        UPDATE lethe.callbacks c
           SET lease_token = token, lease_expires_at = instant + make_interval(secs => lease_seconds),
               attempts = attempts + 1
         WHERE c.callback_id = ANY (ARRAY (
            SELECT due.callback_id FROM rooms
             CROSS JOIN LATERAL (
                SELECT ahead_or_behind.callback_id FROM (
                    SELECT ahead.callback_id FROM (
                        SELECT d.callback_id FROM lethe.callbacks d
                         WHERE d.endpoint_id = rooms.endpoint_id AND d.state = 'ready'
                           AND d.next_attempt_at BETWEEN rooms.since AND instant
                           AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                         ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) ahead
                    -- Read only where the first part leaves room.
                    UNION ALL
                    SELECT behind.callback_id FROM (
                        SELECT d.callback_id FROM lethe.callbacks d
                         WHERE rooms.may_look AND d.endpoint_id = rooms.endpoint_id AND d.state = 'ready'
                           AND d.next_attempt_at < rooms.since
                           AND (d.lease_expires_at IS NULL OR d.lease_expires_at <= instant)
                         ORDER BY d.next_attempt_at LIMIT greatest(rooms.room, 0) FOR UPDATE SKIP LOCKED) behind
                ) ahead_or_behind LIMIT greatest(rooms.room, 0)) due))
        RETURNING c.callback_id, c.endpoint_id, c.request_key, c.url_no, c.request_status, c.expected_completion_time,
                  c.attempts, c.replays, c.next_attempt_at),
    places AS (
        SELECT rooms.*, taken.new_ids, taken.new_oldest,
               rooms.back OR rooms.may_look AND coalesce(cardinality(taken.new_ids), 0) < rooms.room AS looked,
               lethe.now() - instant AS took
          FROM rooms LEFT JOIN (
                SELECT c.endpoint_id, array_agg(c.callback_id) AS new_ids, min(c.next_attempt_at) AS new_oldest
                  FROM claimed c GROUP BY c.endpoint_id) taken ON taken.endpoint_id = rooms.endpoint_id
         WHERE rooms.room > 0),
    remembered AS (
        UPDATE lethe.endpoints e
           SET in_flight = coalesce(places.ids || places.new_ids, '{}'),
               -- Whatever becomes due is due now; some seconds are left to those who have not committed yet.
               claimed_until = least(places.oldest, places.new_oldest, instant - interval '5 s'),
               claimed_at = instant,
               -- One that took long is not repeated soon: a twentieth of the time is spent on it at most.
               looked_back_at = CASE WHEN places.looked
                                     THEN lethe.now() + least(20 * places.took, interval '50 s')
                                     ELSE e.looked_back_at END
          FROM places
         WHERE e.endpoint_id = places.endpoint_id
           -- What found nothing, and cost nothing, is not worth a write.
           AND (places.new_ids IS NOT NULL OR places.back OR places.looked AND places.took > interval '1 ms'))
    SELECT c.callback_id, c.endpoint_id, c.url_no, c.request_status, c.expected_completion_time, c.attempts, instant,
           r.controller_id, r.subject_request_id, r.api_version, d.sealed_reporting,
           CASE WHEN d.sealed_reporting IS NULL THEN d.sealed_request END, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      LEFT JOIN LATERAL (SELECT * FROM lethe.request_details x
                          WHERE x.week = r.details_week AND x.request_key = r.request_key OFFSET 0) d ON true
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;

CREATE OR REPLACE FUNCTION lethe.guard_removal() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    needed boolean;
BEGIN
    CASE TG_TABLE_NAME
    WHEN 'requests' THEN
        -- Ended, purged, and kept as a past request.
        needed := EXISTS (
            SELECT FROM old_rows o
             WHERE EXISTS (SELECT FROM lethe.detail_weeks w WHERE w.week = o.details_week)
                OR NOT EXISTS (SELECT FROM lethe.past_requests p
                                WHERE p.controller_id = o.controller_id AND p.subject_request_id = o.subject_request_id
                                  AND p.request_key = o.request_key AND p.content_digest = o.content_digest
                                  AND p.status = o.status));
    WHEN 'callbacks' THEN
        needed := EXISTS (
            SELECT FROM old_rows o
             WHERE o.state NOT IN ('delivered', 'exhausted')
                OR EXISTS (SELECT FROM lethe.requests r WHERE r.request_key = o.request_key));
    WHEN 'slices' THEN
        needed := EXISTS (
            SELECT FROM old_rows o
             WHERE o.state <> 'completed' OR EXISTS (SELECT FROM lethe.requests r WHERE r.batch_id = o.batch_id));
    ELSE
        needed := EXISTS (
            SELECT FROM old_rows o
             WHERE o.state <> 'completed' OR EXISTS (SELECT FROM lethe.requests r WHERE r.batch_id = o.batch_id));
    END CASE;
    IF needed THEN
        RAISE EXCEPTION 'rows of % are needed', TG_TABLE_NAME USING ERRCODE = 'LT003';
    END IF;
    RETURN NULL;
END $$;
