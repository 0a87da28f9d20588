-- Claiming slices.

-- Claims the oldest due slice of the controller with the fewest leases in force, of those that are not paused and not
-- at_limit. Equals take turns: the search begins behind the one that was served last. It passes only controllers that have
-- work and cannot be served, and ends with the first that has no lease.
CREATE OR REPLACE FUNCTION lethe.claim_slice(wanted_stage text, lease_seconds float8, served_last text, at_limit text[])
RETURNS TABLE (slice_id bigint, controller_id text, lease_token uuid, attempts integer, started_at timestamptz,
               writers text[], paused_before boolean)
-- Plans are kept: one that was made for tables with next to nothing in them must not read them as a whole later.
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    instant   timestamptz := lethe.now();
    latest    timestamptz := instant + make_interval(secs => lease_seconds);
    -- A lease that ends later was given by a clock that was ahead, and counts as run out. What was renewed since the instant ends
    -- after latest: it lies no further off than a statement may take, which is a lease.
    absurd    timestamptz := latest + make_interval(secs => lease_seconds);
    passed    text[] := at_limit;
    place     text;
    wrapped   boolean;
    here      text;
    in_force  bigint;
    is_paused boolean;
    best      text;
    fewest    bigint;
    probes    boolean;
BEGIN
    LOOP
        best := NULL;
        fewest := NULL;
        place := served_last;
        wrapped := false;
        LOOP
            SELECT s.controller_id INTO here FROM lethe.slices s
             WHERE s.stage = wanted_stage AND s.state = 'ready' AND s.controller_id > place
             ORDER BY s.controller_id LIMIT 1;
            IF here IS NULL OR (wrapped AND here > served_last) THEN
                EXIT WHEN wrapped;
                wrapped := true;
                place := '';
                CONTINUE;
            END IF;
            place := here;
            CONTINUE WHEN here = ANY (passed);
            SELECT count(*) INTO in_force FROM lethe.slices s
             WHERE s.stage = wanted_stage AND s.controller_id = here AND s.state = 'ready' AND s.lease_token IS NOT NULL
               AND s.lease_expires_at > instant AND s.lease_expires_at <= absurd;
            CONTINUE WHEN in_force >= fewest;
            SELECT p.paused_at <= instant AND p.paused_until > instant INTO is_paused FROM lethe.pauses p
             WHERE p.stage = wanted_stage AND p.controller_id = here;
            -- After a pause one at a time shows whether it goes on.
            CONTINUE WHEN is_paused OR (is_paused IS NOT NULL AND in_force > 0);
            CONTINUE WHEN NOT EXISTS (
                SELECT FROM lethe.slices s
                 WHERE s.stage = wanted_stage AND s.controller_id = here AND s.state = 'ready'
                   AND s.next_attempt_at <= instant
                   AND (s.lease_expires_at IS NULL OR s.lease_expires_at <= instant OR s.lease_expires_at > absurd));
            best := here;
            fewest := in_force;
            probes := is_paused IS NOT NULL;
            EXIT WHEN in_force = 0;
        END LOOP;
        IF best IS NULL THEN
            RETURN;
        END IF;
        RETURN QUERY
        UPDATE lethe.slices c
           SET lease_token = gen_random_uuid(), lease_expires_at = latest, attempts = c.attempts + 1,
               -- The start of the execution is set by the first claim and kept by all others; whoever writes then is
               -- looked up after the clock was read.
               started_at = coalesce(c.started_at, instant),
               writers = CASE WHEN wanted_stage = 'erasure' AND c.writers IS NULL THEN lethe.writers(best)
                              ELSE c.writers END
         WHERE c.slice_id = (
            SELECT s.slice_id FROM lethe.slices s
             WHERE s.stage = wanted_stage AND s.controller_id = best AND s.state = 'ready' AND s.next_attempt_at <= instant
               AND (s.lease_expires_at IS NULL OR s.lease_expires_at <= instant OR s.lease_expires_at > absurd)
             ORDER BY s.next_attempt_at, s.slice_id LIMIT 1 FOR UPDATE SKIP LOCKED)
        RETURNING c.slice_id, c.controller_id, c.lease_token, c.attempts, c.started_at, c.writers, probes;
        IF FOUND THEN
            RETURN;
        END IF;
        -- Others were faster.
        passed := passed || best;
    END LOOP;
END $$;

-- Held, shared, by each transaction that erases.
CREATE OR REPLACE FUNCTION lethe.eraser_lock() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN 5499812872::bigint;

-- The transactions, prepared ones too, that write to a controller's tables. The time of receipt of a row is computed before its
-- partition is known and locked: so whoever holds the parent, and neither holds a partition nor waits for one, counts as well.
-- Whoever waits for another controller's partition does not: that wait may be long, and is nobody else's.
-- A session's transaction is called by its number and its process, "3/17/4242", a prepared one by its xid, "prepared/740":
-- so it is called after a restart as well. Erasures of ours only remove rows, and hold a lock that says so: they do not count,
-- or the slices of a controller would wait for each other.
CREATE OR REPLACE FUNCTION lethe.writers(of_controller text) RETURNS text[] LANGUAGE sql VOLATILE AS $$
    WITH locks AS MATERIALIZED (
        SELECT locktype, relation, transactionid, virtualtransaction, pid, granted FROM pg_locks
         WHERE pid IS DISTINCT FROM pg_backend_pid()
           AND (locktype = 'transactionid' AND pid IS NULL
                OR locktype = 'advisory' AND objsubid = 1 AND granted
                   AND classid::bigint << 32 | objid::bigint = lethe.eraser_lock()
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                OR locktype = 'relation' AND mode = 'RowExclusiveLock'
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))),
    held AS MATERIALIZED (
        SELECT relation, granted,
               coalesce(virtualtransaction || '/' || pid,
                        'prepared/' || (SELECT min(x.transactionid::text) FROM locks x
                                         WHERE x.locktype = 'transactionid'
                                           AND x.virtualtransaction = l.virtualtransaction)) AS writer
          FROM locks l
         WHERE locktype = 'relation'
           AND NOT EXISTS (SELECT FROM locks e
                            WHERE e.locktype = 'advisory' AND e.virtualtransaction = l.virtualtransaction)),
    tables AS MATERIALIZED (
        SELECT to_regclass('subject_data.' || name)::oid AS parent,
               to_regclass(format('subject_data.%s_p%s', name, c.partition_no))::oid AS partition
          FROM unnest(ARRAY['profiles', 'profile_identities', 'event_batches']) AS name
          JOIN lethe.controllers c ON c.controller_id = of_controller)
    SELECT coalesce(array_agg(DISTINCT h.writer), '{}')
      FROM held h JOIN tables t ON h.relation IN (t.parent, t.partition)
     WHERE h.relation = t.partition
        OR (h.granted AND NOT EXISTS (SELECT FROM held o JOIN pg_inherits i ON i.inhrelid = o.relation
                                       WHERE i.inhparent = t.parent AND o.writer = h.writer))
$$;
