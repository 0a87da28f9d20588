-- The audit trail is written in the transaction of what it records (ADR 0011).

CREATE OR REPLACE FUNCTION lethe.audit_new_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, 'request.received',
           json_build_object('subject_request_id', n.subject_request_id, 'type', n.request_type,
                             'regulation', n.regulation, 'api_version', n.api_version,
                             'content_digest', encode(n.content_digest, 'hex'), 'approval', n.approval,
                             'received_at', n.received_at, 'expected_completion_time', n.expected_completion_time),
           instant.now
      FROM new_rows n CROSS JOIN (SELECT lethe.now()) AS instant (now)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;

-- Each entry with what it takes to follow the request from there. The profiles are counted at completion: the purge
-- removes them, and the certificate tells their number.
CREATE OR REPLACE FUNCTION lethe.audit_changed_requests() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details, recorded_at)
    SELECT n.controller_id, n.request_key, told.event, told.details, instant.now
      FROM new_rows n JOIN old_rows o USING (request_key)
      CROSS JOIN (SELECT lethe.now()) AS instant (now)
      CROSS JOIN LATERAL (
        SELECT 'request.approved',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', n.batch_id, 'lane', n.lane,
                                 'expected_completion_time', n.expected_completion_time)
         WHERE o.approval <> 'approved' AND n.approval = 'approved'
        UNION ALL
        SELECT 'request.held_back',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', o.batch_id)
         WHERE o.approval <> 'needed' AND n.approval = 'needed'
        UNION ALL
        SELECT 'request.cancelled',
               json_build_object('subject_request_id', n.subject_request_id,
                                 'received_at', n.cancellation_received_at)
         WHERE o.status <> 'cancelled' AND n.status = 'cancelled'
        UNION ALL
        SELECT 'request.released',
               json_build_object('subject_request_id', n.subject_request_id, 'batch_id', n.batch_id,
                                 'slice_id', n.slice_id)
         WHERE o.status <> 'in_progress' AND n.status = 'in_progress'
        UNION ALL
        SELECT 'request.completed',
               json_build_object('subject_request_id', n.subject_request_id, 'type', n.request_type,
                                 'completed_at', n.completed_at, 'content_digest', encode(n.content_digest, 'hex'),
                                 'profiles', (SELECT count(*) FROM lethe.request_mpids m
                                               WHERE m.request_key = n.request_key))
         WHERE o.status <> 'completed' AND n.status = 'completed'
        UNION ALL
        SELECT 'request.purged',
               json_build_object('subject_request_id', n.subject_request_id,
                                 'content_digest', encode(n.content_digest, 'hex'))
         WHERE o.sealed_request IS NOT NULL AND n.sealed_request IS NULL) AS told (event, details)
     ORDER BY n.request_key;
    RETURN NULL;
END $$;

-- The trail stays, and says that the rest is gone.
CREATE OR REPLACE FUNCTION lethe.audit_removed_requests() RETURNS trigger
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
