-- The audit trail is written in the transaction of what it records (ADR 0011).

-- Requests enter it in sets (ADR 0040): one entry for all requests of a controller that a statement moves, of one slice, each
-- a line of values in the order of "columns". The lines stand in the order of the keys, two thousand at most.
CREATE OR REPLACE FUNCTION lethe.audit_new_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, event, details, requests, recorded_at)
    SELECT controller_id, 'requests.received',
           '{"columns":["subject_request_id","type","regulation","api_version","content_digest","approval","received_at","expected_completion_time"]}'::json,
           json_agg(line ORDER BY request_key), (SELECT lethe.now())
      FROM (SELECT n.controller_id, n.request_key,
                   (row_number() OVER (PARTITION BY n.controller_id ORDER BY n.request_key) - 1) / 2000 AS part,
                   json_build_array(n.subject_request_id, n.request_type, n.regulation, n.api_version,
                                    encode(n.content_digest, 'hex'), n.approval, n.received_at,
                                    n.expected_completion_time) AS line
              FROM new_rows n) AS told
     GROUP BY controller_id, part ORDER BY controller_id, part;
    RETURN NULL;
END $$;

-- The state machine once more, where nobody can get around it (docs/reference/state-machine.md); and each change of a status
-- enters the trail by the statement that makes it. What ends a request is told with all that a report may ask for later:
-- the rest is removed one day. Plans are kept: one that was made for a statement with one row must not compare each row of
-- a large one with each.
CREATE OR REPLACE FUNCTION lethe.audit_changed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_nestloop = off SET enable_seqscan = off AS $$
DECLARE
    illegal record;
BEGIN
    SELECT o.status AS before, n.status AS after INTO illegal
      FROM new_rows n LEFT JOIN old_rows o USING (request_key)
     WHERE n.status IS DISTINCT FROM o.status
       AND ((o.status, n.status) IN (('pending', 'in_progress'), ('pending', 'cancelled'), ('in_progress', 'completed')))
           IS NOT TRUE
     LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'a request cannot go from % to %', illegal.before, illegal.after USING ERRCODE = 'LT002';
    END IF;
    -- Of the slices that something is completed of, by their numbers: never all receipts there are.
    WITH receipts AS MATERIALIZED (
        SELECT u.request_key,
               json_agg(json_build_object('store', e.store, 'as_of', e.as_of, 'rows_deleted', u.rows_deleted,
                                          'rows_arrived', u.rows_arrived, 'verified_at', u.verified_at)
                        ORDER BY e.store) AS stores
          FROM lethe.slice_receipts e
         CROSS JOIN LATERAL unnest(e.request_keys, e.rows_deleted, e.rows_arrived, e.verified_at)
                            AS u (request_key, rows_deleted, rows_arrived, verified_at)
         WHERE e.slice_id = ANY (ARRAY (SELECT DISTINCT n.slice_id FROM new_rows n JOIN old_rows o USING (request_key)
                                         WHERE o.status <> 'completed' AND n.status = 'completed'))
           AND u.verified_at IS NOT NULL
         GROUP BY u.request_key)
    INSERT INTO lethe.audit_entries (controller_id, slice_id, event, details, requests, recorded_at)
    SELECT controller_id, slice_id, event,
           json_strip_nulls(json_build_object('batch_id', batch_id, 'slice_id', slice_id, 'columns', columns::json)),
           json_agg(line ORDER BY request_key), (SELECT lethe.now())
      FROM (SELECT n.controller_id, n.request_key, t.event, t.batch_id, t.slice_id, t.columns, t.line,
                   (row_number() OVER (PARTITION BY n.controller_id, t.event, t.batch_id, t.slice_id
                                       ORDER BY n.request_key) - 1) / 2000 AS part
              FROM new_rows n JOIN old_rows o USING (request_key) LEFT JOIN receipts USING (request_key)
              CROSS JOIN LATERAL (
                SELECT 'requests.approved', n.batch_id, NULL::bigint,
                       '["subject_request_id","lane","expected_completion_time"]',
                       json_build_array(n.subject_request_id, n.lane, n.expected_completion_time)
                 WHERE o.approval <> 'approved' AND n.approval = 'approved'
                UNION ALL
                SELECT 'requests.held_back', o.batch_id, NULL, '["subject_request_id"]',
                       json_build_array(n.subject_request_id)
                 WHERE o.approval <> 'needed' AND n.approval = 'needed'
                UNION ALL
                SELECT 'requests.cancelled', n.batch_id, NULL,
                       '["subject_request_id","type","regulation","api_version","content_digest","received_at","expected_completion_time","cancellation_received_at","cancelled_at"]',
                       json_build_array(n.subject_request_id, n.request_type, n.regulation, n.api_version,
                                        encode(n.content_digest, 'hex'), n.received_at, n.expected_completion_time,
                                        n.cancellation_received_at, n.cancelled_at)
                 WHERE o.status <> 'cancelled' AND n.status = 'cancelled'
                UNION ALL
                SELECT 'requests.released', n.batch_id, n.slice_id, '["subject_request_id"]',
                       json_build_array(n.subject_request_id)
                 WHERE o.status <> 'in_progress' AND n.status = 'in_progress'
                UNION ALL
                -- Profiles and receipts are told here: a certificate proves by this line what was done (ADR 0012).
                SELECT 'requests.completed', n.batch_id, n.slice_id,
                       '["subject_request_id","type","regulation","api_version","content_digest","lane","submitted_time","received_at","expected_completion_time","in_progress_at","completed_at","profiles","stores"]',
                       json_build_array(n.subject_request_id, n.request_type, n.regulation, n.api_version,
                                        encode(n.content_digest, 'hex'), n.lane, n.submitted_time, n.received_at,
                                        n.expected_completion_time, n.in_progress_at, n.completed_at,
                                        (SELECT coalesce(cardinality(d.named), 0) + coalesce(cardinality(d.at_receipt), 0)
                                                + coalesce(cardinality(d.at_release), 0)
                                           FROM lethe.request_details d
                                          WHERE d.week = n.details_week AND d.request_key = n.request_key),
                                        coalesce(receipts.stores, '[]'))
                 WHERE o.status <> 'completed' AND n.status = 'completed'
                UNION ALL
                SELECT 'requests.purged', n.batch_id, NULL, '["subject_request_id","content_digest"]',
                       json_build_array(n.subject_request_id, encode(n.content_digest, 'hex'))
                 WHERE o.details_week IS NOT NULL AND n.details_week IS NULL)
                AS t (event, batch_id, slice_id, columns, line)) AS told
     GROUP BY controller_id, event, batch_id, slice_id, columns, part
     ORDER BY min(request_key), event;
    RETURN NULL;
END $$;

-- The trail stays, and says that the rest is gone.
CREATE OR REPLACE FUNCTION lethe.audit_removed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, event, details, requests, recorded_at)
    SELECT controller_id, 'requests.removed', '{"columns":["subject_request_id","status","content_digest"]}'::json,
           json_agg(line ORDER BY request_key), (SELECT lethe.now())
      FROM (SELECT o.controller_id, o.request_key,
                   (row_number() OVER (PARTITION BY o.controller_id ORDER BY o.request_key) - 1) / 2000 AS part,
                   json_build_array(o.subject_request_id, o.status, encode(o.content_digest, 'hex')) AS line
              FROM old_rows o) AS told
     GROUP BY controller_id, part ORDER BY controller_id, part;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION lethe.audit_batches() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (event, details)
    VALUES ('batch.' || NEW.state,
            jsonb_build_object('batch_id', NEW.batch_id, 'lane', NEW.lane, 'tick_at', NEW.tick_at,
                               'runs_at', NEW.runs_at, 'calendar_version', NEW.calendar_version));
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION lethe.audit_calendars() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (event, details) VALUES ('calendar.stored', to_jsonb(NEW));
    RETURN NULL;
END $$;

-- For each row: callbacks are updated with every claim, and hardly any of them ends so.
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

CREATE OR REPLACE FUNCTION lethe.audit_controllers() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, event, details)
    VALUES (NEW.controller_id,
            CASE WHEN TG_OP = 'INSERT' THEN 'controller.added'
                 WHEN OLD.api_secret_hash <> NEW.api_secret_hash THEN 'controller.secret_rotated'
                 ELSE 'controller.changed' END,
            jsonb_build_object('amqp_user', NEW.amqp_user, 'any_amqp_user', NEW.any_amqp_user,
                               'signature_algorithm', NEW.signature_algorithm,
                               'include_profile', NEW.include_profile, 'database_user', session_user));
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION lethe.audit_results() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key,
           CASE TG_OP WHEN 'INSERT' THEN 'result.written' ELSE 'result.expired' END,
           jsonb_build_object('subject_request_id', r.subject_request_id, 'result_id', NEW.result_id,
                              'lines', NEW.lines, 'size_bytes', NEW.size_bytes, 'expires_at', NEW.expires_at)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $$;

-- Entries are written unchained; the sealer finds the new ones here.
CREATE OR REPLACE FUNCTION lethe.announce_audit_entries() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_unsealed (entry_id) SELECT entry_id FROM new_rows;
    RETURN NULL;
END $$;

-- Entries, seals and heads are never changed.
CREATE OR REPLACE FUNCTION lethe.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $$;
