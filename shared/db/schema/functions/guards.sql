-- What no statement gets around: the state machines, and the end of records.

-- Every request begins as pending.
CREATE OR REPLACE FUNCTION lethe.guard_request_birth() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a request begins as pending, not as %', NEW.status USING ERRCODE = 'LT002';
END $$;

-- Of batches once more the state machine; that of requests stands with the trail, in the same trigger.
CREATE OR REPLACE FUNCTION lethe.guard_batch_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.state, NEW.state) NOT IN (('open', 'closed'), ('closed', 'released'), ('released', 'completed')) THEN
        RAISE EXCEPTION 'a batch cannot go from % to %', OLD.state, NEW.state USING ERRCODE = 'LT002';
    END IF;
    RETURN NEW;
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

-- An intake that met the removal of the same request finds neither: it is tried again, and finds what stays. The plan is kept:
-- one that was made while there were no past requests must not read all of them later.
CREATE OR REPLACE FUNCTION lethe.refuse_past_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    IF EXISTS (SELECT FROM new_rows n JOIN lethe.past_requests p USING (controller_id, subject_request_id)) THEN
        RAISE EXCEPTION 'a request of this id has ended, and its records are being removed' USING ERRCODE = '40001';
    END IF;
    RETURN NULL;
END $$;
