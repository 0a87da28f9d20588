-- Records of finished requests end as well, and the retention ends whatever is undelivered
-- (docs/adr/0034-an-end-for-everything.md).

-- What was there before the totals were kept. Both are read as of one instant, so nobody has to wait meanwhile.
INSERT INTO lethe.request_totals (request_type, status, total)
SELECT request_type, status, sum(n)
  FROM (SELECT request_type, status, count(*) AS n FROM lethe.requests GROUP BY 1, 2
        UNION ALL
        SELECT request_type, status, -delta FROM lethe.request_deltas) AS counted
 GROUP BY 1, 2 HAVING sum(n) <> 0;
INSERT INTO lethe.batch_totals (batch_id, status, total)
SELECT batch_id, status, sum(n)
  FROM (SELECT batch_id, status, count(*) AS n FROM lethe.requests WHERE batch_id IS NOT NULL GROUP BY 1, 2
        UNION ALL
        SELECT batch_id, status, -delta FROM lethe.request_deltas WHERE batch_id IS NOT NULL) AS counted
 GROUP BY 1, 2 HAVING sum(n) <> 0;
INSERT INTO lethe.callback_totals (state, total)
SELECT state, sum(n)
  FROM (SELECT state, count(*) AS n FROM lethe.callbacks GROUP BY 1
        UNION ALL
        SELECT state, -delta FROM lethe.callback_deltas) AS counted
 GROUP BY 1 HAVING sum(n) <> 0;

-- What stays of a request for good: its repetition is always known.
CREATE TABLE lethe.past_requests (
    controller_id            text NOT NULL,
    subject_request_id       uuid NOT NULL,
    -- As on the audit trail.
    request_key              bigint NOT NULL,
    api_version              text NOT NULL,
    request_type             text NOT NULL,
    status                   text NOT NULL CHECK (status IN ('completed', 'cancelled')),
    content_digest           bytea NOT NULL CHECK (octet_length(content_digest) = 32),
    received_at              timestamptz NOT NULL,
    expected_completion_time timestamptz NOT NULL,
    ended_at                 timestamptz NOT NULL,
    cancellation_received_at timestamptz,
    PRIMARY KEY (controller_id, subject_request_id)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON lethe.past_requests
    FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();
GRANT SELECT ON lethe.past_requests TO lethe_gateway;
ALTER TABLE lethe.past_requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.past_requests TO lethe_gateway USING (controller_id = lethe.acting_controller());

-- An intake that met the removal of the same request finds neither: it is tried again, and finds what stays. The plan is kept:
-- one that was made while there were no past requests must not read all of them later.
CREATE FUNCTION lethe.refuse_past_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    IF EXISTS (SELECT FROM new_rows n JOIN lethe.past_requests p USING (controller_id, subject_request_id)) THEN
        RAISE EXCEPTION 'a request of this id has ended, and its records are being removed' USING ERRCODE = '40001';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER never_again AFTER INSERT ON lethe.requests
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_past_requests();

-- Rows are removed by the retention of records only, which says so in its transaction; and then only what is over.
CREATE OR REPLACE FUNCTION lethe.refuse_removal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_TABLE_NAME IN ('requests', 'callbacks', 'slices', 'batches')
       AND current_setting('lethe.removing_records', true) = 'on'
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'rows of % are never removed', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $$;

CREATE FUNCTION lethe.guard_removal() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    needed boolean;
BEGIN
    CASE TG_TABLE_NAME
    WHEN 'requests' THEN
        -- Ended, purged, and kept as a past request.
        needed := EXISTS (
            SELECT FROM old_rows o
             WHERE o.sealed_request IS NOT NULL
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
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.requests
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.callbacks
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.slices
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.batches
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();

-- The trail stays, and says that the rest is gone.
CREATE FUNCTION lethe.audit_removed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT o.controller_id, o.request_key, 'request.removed',
           json_build_object('subject_request_id', o.subject_request_id, 'status', o.status,
                             'content_digest', encode(o.content_digest, 'hex')),
           instant.now
      FROM old_rows o CROSS JOIN (SELECT lethe.now()) AS instant (now)
     ORDER BY o.request_key;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_removed AFTER DELETE ON lethe.requests
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_removed_requests();
