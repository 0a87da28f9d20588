-- Receipts by slice and store (ADR 0043): one row, with a place for each request of the slice.

CREATE TABLE lethe.slice_receipts (
    slice_id     bigint NOT NULL,
    store        text NOT NULL,
    as_of        timestamptz NOT NULL,
    -- In order. The same places of the others are of the same requests.
    request_keys bigint[] NOT NULL,
    rows_deleted bigint[] NOT NULL,
    rows_arrived bigint[] NOT NULL,
    verified_at  timestamptz[] NOT NULL,
    failures     text[] NOT NULL,
    PRIMARY KEY (slice_id, store),
    CHECK (cardinality(request_keys) = ALL (ARRAY[cardinality(rows_deleted), cardinality(rows_arrived),
                                                  cardinality(verified_at), cardinality(failures)])),
    CHECK (array_position(rows_deleted, NULL) IS NULL)
);

INSERT INTO lethe.slice_receipts (slice_id, store, as_of, request_keys, rows_deleted, rows_arrived, verified_at, failures)
SELECT r.slice_id, e.store, min(e.as_of), array_agg(r.request_key ORDER BY r.request_key),
       array_agg(e.rows_deleted ORDER BY r.request_key), array_agg(e.rows_arrived ORDER BY r.request_key),
       array_agg(e.verified_at ORDER BY r.request_key), array_agg(e.failure ORDER BY r.request_key)
  FROM lethe.erasure_receipts e JOIN lethe.requests r USING (request_key)
 WHERE r.slice_id IS NOT NULL GROUP BY r.slice_id, e.store;
-- Of slices that are worked on: every member has a place.
UPDATE lethe.slice_receipts e
   SET request_keys = q.request_keys, rows_deleted = q.rows_deleted, rows_arrived = q.rows_arrived,
       verified_at = q.verified_at, failures = q.failures
  FROM (SELECT s.slice_id, o.store, array_agg(m.request_key ORDER BY m.request_key) AS request_keys,
               array_agg(coalesce(u.rows_deleted, 0) ORDER BY m.request_key) AS rows_deleted,
               array_agg(u.rows_arrived ORDER BY m.request_key) AS rows_arrived,
               array_agg(u.verified_at ORDER BY m.request_key) AS verified_at,
               array_agg(u.failure ORDER BY m.request_key) AS failures
          FROM lethe.slices s
          JOIN lethe.slice_receipts o USING (slice_id)
          JOIN lethe.slice_members m USING (slice_id)
          LEFT JOIN lethe.erasure_receipts u ON u.request_key = m.request_key AND u.store = o.store
         WHERE s.state = 'ready' GROUP BY s.slice_id, o.store) q
 WHERE e.slice_id = q.slice_id AND e.store = q.store;

DROP TABLE lethe.erasure_receipts;
-- One by one, of those with whom something was done.
CREATE VIEW lethe.erasure_receipts AS
    SELECT s.slice_id, u.request_key, s.store, s.as_of, u.rows_deleted, u.rows_arrived, u.verified_at, u.failure
      FROM lethe.slice_receipts s
     CROSS JOIN LATERAL unnest(s.request_keys, s.rows_deleted, s.rows_arrived, s.verified_at, s.failures)
                        AS u (request_key, rows_deleted, rows_arrived, verified_at, failure)
     WHERE u.rows_deleted > 0 OR u.verified_at IS NOT NULL OR u.failure IS NOT NULL;

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
