-- A request changes its status three times. As long as no index names what changes, not even in its condition, PostgreSQL
-- writes the new version into the same page and leaves all indexes alone; otherwise it adds to each of them, and the one on
-- the controller's id of a request, which is random, costs a page of its own each time (docs/adr/0024-changes-in-place.md).

-- How far a batch is released: what comes later in this order is pending, cancelled, or back with the operator.
ALTER TABLE lethe.batches
    ADD COLUMN released_controller text NOT NULL DEFAULT '',
    ADD COLUMN released_request bigint NOT NULL DEFAULT 0;

-- A slice names its requests by their range: all of them lie between these two, of its batch and its controller.
ALTER TABLE lethe.slices
    ADD COLUMN first_request bigint,
    ADD COLUMN last_request bigint;
UPDATE lethe.slices s SET first_request = q.first, last_request = q.last
  FROM (SELECT slice_id, min(request_key) AS first, max(request_key) AS last
          FROM lethe.requests WHERE slice_id IS NOT NULL GROUP BY slice_id) q
 WHERE s.slice_id = q.slice_id;
ALTER TABLE lethe.slices
    ALTER COLUMN first_request SET NOT NULL,
    ALTER COLUMN last_request SET NOT NULL,
    ADD CHECK (first_request <= last_request);

DROP INDEX lethe.requests_of_batch, lethe.requests_all_of_batch, lethe.requests_of_slice, lethe.requests_awaiting_approval,
           lethe.requests_to_purge;
CREATE INDEX requests_of_batch ON lethe.requests (batch_id, controller_id, request_key);
CREATE INDEX requests_awaiting_approval ON lethe.requests (request_key) WHERE approval = 'needed';
CREATE INDEX requests_to_purge ON lethe.requests (batch_id) WHERE sealed_request IS NOT NULL;
CREATE INDEX requests_cancelled_to_purge ON lethe.requests (cancelled_at)
    WHERE sealed_request IS NOT NULL AND cancelled_at IS NOT NULL;

CREATE VIEW lethe.slice_members AS
    SELECT s.slice_id, r.request_key, r.subject_request_id, r.request_type, r.status
      FROM lethe.slices s
      JOIN lethe.requests r ON r.batch_id = s.batch_id AND r.controller_id = s.controller_id
                           AND r.request_key BETWEEN s.first_request AND s.last_request AND r.slice_id = s.slice_id;

-- Room for the new versions.
ALTER TABLE lethe.requests SET (fillfactor = 50);
ALTER TABLE lethe.erasure_receipts SET (fillfactor = 50);

-- A regular expression was more than half of the work of writing an entry.
ALTER TABLE lethe.audit_entries
    DROP CONSTRAINT audit_entries_event_check,
    ADD CONSTRAINT audit_entries_event_check CHECK (event LIKE '_%._%');

-- A receipt may be opened and verified by one statement: where nothing was deleted.
CREATE OR REPLACE FUNCTION lethe.audit_receipts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
        SELECT r.controller_id, n.request_key, 'erasure.verified',
               json_build_object('subject_request_id', r.subject_request_id, 'store', n.store, 'as_of', n.as_of,
                                 'rows_deleted', n.rows_deleted, 'rows_arrived', n.rows_arrived,
                                 'verified_at', n.verified_at),
               instant.now
          FROM new_rows n
          JOIN lethe.requests r USING (request_key)
          CROSS JOIN (SELECT lethe.now()) AS instant (now)
         WHERE n.verified_at IS NOT NULL
         ORDER BY n.request_key, n.store;
    ELSE
        INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
        SELECT r.controller_id, n.request_key, 'erasure.verified',
               json_build_object('subject_request_id', r.subject_request_id, 'store', n.store, 'as_of', n.as_of,
                                 'rows_deleted', n.rows_deleted, 'rows_arrived', n.rows_arrived,
                                 'verified_at', n.verified_at),
               instant.now
          FROM new_rows n
          JOIN old_rows o USING (request_key, store)
          JOIN lethe.requests r USING (request_key)
          CROSS JOIN (SELECT lethe.now()) AS instant (now)
         WHERE o.verified_at IS NULL AND n.verified_at IS NOT NULL
         ORDER BY n.request_key, n.store;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_verified_at_once AFTER INSERT ON lethe.erasure_receipts
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_receipts();
