-- Callbacks: claims that miss nothing after a clock that was set back, endpoints that are given up, and what callbacks and
-- lists need of a request by itself.

-- What callbacks and status answers need of a request: its callback URLs and its group, sealed. Empty where it has neither;
-- NULL after the purge, and for requests that were received before this column was there.
ALTER TABLE lethe.requests ADD COLUMN sealed_reporting bytea;
-- Newest first, for the lists of one controller.
CREATE INDEX requests_of_controller ON lethe.requests (controller_id, request_key);

-- It goes with the sealed request, whoever removes that.
CREATE FUNCTION lethe.purge_reporting() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.sealed_reporting := NULL;
    RETURN NEW;
END $$;
CREATE TRIGGER purge_reporting BEFORE UPDATE OF sealed_request ON lethe.requests
    FOR EACH ROW WHEN (NEW.sealed_request IS NULL) EXECUTE FUNCTION lethe.purge_reporting();

ALTER TABLE lethe.endpoints
    -- When a claim last noted its place. In the future: the clock was set back since.
    ADD COLUMN claimed_at timestamptz NOT NULL DEFAULT '-infinity',
    -- The last answer of any kind, to the minute.
    ADD COLUMN last_answer_at timestamptz,
    -- The first and the last attempt without an answer since then.
    ADD COLUMN unanswered_since timestamptz,
    ADD COLUMN unanswered_at timestamptz,
    -- How long it was tried in vain: pauses in which nobody tried it do not count.
    ADD COLUMN unanswered_for interval NOT NULL DEFAULT '0',
    -- Since when its callbacks are given up as they reach the limit; NULL again with the next answer.
    ADD COLUMN given_up_at timestamptz;
CREATE INDEX endpoints_in_trouble ON lethe.endpoints (controller_id, endpoint_id) WHERE consecutive_failures > 0;

ALTER TABLE lethe.callbacks
    ADD COLUMN replayed_at timestamptz,
    -- Why it is exhausted.
    ADD COLUMN exhausted_because text;
-- What is not delivered, by endpoint and state, oldest first: for giving up, for lists and for replays.
CREATE INDEX callbacks_undelivered ON lethe.callbacks (endpoint_id, state, created_at) WHERE state <> 'delivered';

ALTER TABLE lethe.callback_attempts
    -- What exactly failed, where the class does not tell: words of the TLS and HTTP libraries, printable ASCII.
    ADD COLUMN reason text;

-- As before, and tells why.
CREATE OR REPLACE FUNCTION lethe.audit_callbacks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'callback.exhausted',
           json_build_object('subject_request_id', r.subject_request_id, 'callback_id', NEW.callback_id,
                             'request_status', NEW.request_status, 'attempts', NEW.attempts,
                             'because', NEW.exhausted_because)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $$;

-- Claims as `lethe.claim_callbacks` (which stays for couriers of the release before), with two differences. What lies before
-- the place of the last claim is looked at as soon as there is room for it, unless that took long the last time: so a claim
-- with room left has seen everything (docs/adr/0025-claims-that-know-their-place.md). And it returns the sealed request only
-- where what callbacks need was not sealed by itself.
CREATE FUNCTION lethe.claim_due_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds float8,
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
           r.controller_id, r.subject_request_id, r.api_version, r.sealed_reporting,
           CASE WHEN r.sealed_reporting IS NULL THEN r.sealed_request END, k.signature_algorithm,
           s.result_id, s.token_salt, s.lines, c.replays > 0
      FROM claimed c
      JOIN lethe.requests r ON r.request_key = c.request_key
      JOIN lethe.controllers k ON k.controller_id = r.controller_id
      LEFT JOIN lethe.results s ON s.request_key = c.request_key;
END $$;
