-- Requests enter the trail in sets (ADR 0040).

-- In the order in which workers lock these tables.
-- The guard of the statuses looks at a statement once, and not at each row.
DROP TRIGGER guard_status ON lethe.requests;
DROP FUNCTION lethe.guard_request_status();

-- What was verified is told with the completion.
DROP TRIGGER audit_verified ON lethe.erasure_receipts;
DROP TRIGGER audit_verified_at_once ON lethe.erasure_receipts;
DROP FUNCTION lethe.audit_receipts();

-- The certificate of an erasure finds the set by the slice: the index for it is built beside the workers, after this. A
-- column, since beside row-level security only plain comparisons choose rows of an index; the details say the same.
ALTER TABLE lethe.audit_entries ADD COLUMN slice_id bigint, ADD COLUMN requests json;
-- It is read as a whole, and compressing it would cost more than it saves.
ALTER TABLE lethe.audit_entries ALTER COLUMN requests SET STORAGE EXTERNAL;
DROP INDEX lethe.audit_entries_completed;

-- How many lines the digest covers. Without a default, so that the sealer of an earlier release, which would leave the lines
-- out of its digests, seals nothing at all.
ALTER TABLE lethe.audit_seals ADD COLUMN lines integer NOT NULL DEFAULT 0;
ALTER TABLE lethe.audit_seals ALTER COLUMN lines DROP DEFAULT;

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
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_nestloop = off AS $$
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
    INSERT INTO lethe.audit_entries (controller_id, slice_id, event, details, requests, recorded_at)
    SELECT controller_id, slice_id, event,
           json_strip_nulls(json_build_object('batch_id', batch_id, 'slice_id', slice_id, 'columns', columns::json)),
           json_agg(line ORDER BY request_key), (SELECT lethe.now())
      FROM (SELECT n.controller_id, n.request_key, t.event, t.batch_id, t.slice_id, t.columns, t.line,
                   (row_number() OVER (PARTITION BY n.controller_id, t.event, t.batch_id, t.slice_id
                                       ORDER BY n.request_key) - 1) / 2000 AS part
              FROM new_rows n JOIN old_rows o USING (request_key)
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
                                        (SELECT count(*) FROM lethe.request_mpids m WHERE m.request_key = n.request_key),
                                        coalesce((SELECT json_agg(json_build_object(
                                                             'store', e.store, 'as_of', e.as_of, 'rows_deleted', e.rows_deleted,
                                                             'rows_arrived', e.rows_arrived, 'verified_at', e.verified_at)
                                                         ORDER BY e.store)
                                                    FROM lethe.erasure_receipts e
                                                   WHERE e.request_key = n.request_key AND e.verified_at IS NOT NULL), '[]'))
                 WHERE o.status <> 'completed' AND n.status = 'completed'
                UNION ALL
                SELECT 'requests.purged', n.batch_id, NULL, '["subject_request_id","content_digest"]',
                       json_build_array(n.subject_request_id, encode(n.content_digest, 'hex'))
                 WHERE o.sealed_request IS NOT NULL AND n.sealed_request IS NULL)
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
