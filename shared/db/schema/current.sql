-- The schema as all migrations leave it. Made by `make schema`; a test holds it against them.

CREATE TABLE lethe.audit_entries (
    entry_id bigint NOT NULL GENERATED AS IDENTITY,
    controller_id text,
    request_key bigint,
    event text NOT NULL,
    details json NOT NULL DEFAULT '{}'::json,
    recorded_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    slice_id bigint,
    requests json,
    CONSTRAINT audit_entries_event_check CHECK ((event ~~ '_%._%'::text)),
    CONSTRAINT audit_entries_pkey PRIMARY KEY (entry_id)
);
CREATE INDEX audit_entries_of_slice ON lethe.audit_entries USING btree (slice_id) WHERE (event = 'requests.completed'::text);
CREATE TRIGGER announce AFTER INSERT ON lethe.audit_entries REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.announce_audit_entries();
CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON lethe.audit_entries FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();
ALTER TABLE lethe.audit_entries ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.audit_entries FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.audit_heads (
    chain text NOT NULL,
    "position" bigint NOT NULL,
    digest bytea NOT NULL,
    signature text NOT NULL,
    signed_at timestamp with time zone NOT NULL,
    CONSTRAINT audit_heads_digest_check CHECK ((octet_length(digest) = 32)),
    CONSTRAINT audit_heads_pkey PRIMARY KEY (chain)
);

CREATE TABLE lethe.audit_seals (
    chain text NOT NULL,
    "position" bigint NOT NULL,
    entry_id bigint NOT NULL,
    digest bytea NOT NULL,
    signature text,
    signed_at timestamp with time zone,
    lines integer NOT NULL,
    CONSTRAINT audit_seals_digest_check CHECK ((octet_length(digest) = 32)),
    CONSTRAINT audit_seals_entry_id_key UNIQUE (entry_id),
    CONSTRAINT audit_seals_pkey PRIMARY KEY (chain, "position"),
    CONSTRAINT audit_seals_position_check CHECK (("position" > 0))
);
CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON lethe.audit_seals FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();
ALTER TABLE lethe.audit_seals ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.audit_seals FOR ALL USING ((chain = lethe.acting_controller()));

CREATE TABLE lethe.audit_unsealed (
    entry_id bigint NOT NULL,
    CONSTRAINT audit_unsealed_pkey PRIMARY KEY (entry_id)
);

CREATE TABLE lethe.batch_totals (
    batch_id bigint NOT NULL,
    status text NOT NULL,
    total bigint NOT NULL,
    CONSTRAINT batch_totals_pkey PRIMARY KEY (batch_id, status)
);

CREATE TABLE lethe.batches (
    batch_id bigint NOT NULL GENERATED AS IDENTITY,
    lane text NOT NULL,
    tick_at timestamp with time zone NOT NULL,
    runs_at timestamp with time zone NOT NULL,
    calendar_version bigint NOT NULL,
    state text NOT NULL DEFAULT 'open'::text,
    opened_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    closed_at timestamp with time zone,
    cancellations_handled_at timestamp with time zone,
    released_at timestamp with time zone,
    completed_at timestamp with time zone,
    released_controller text NOT NULL DEFAULT ''::text,
    released_request bigint NOT NULL DEFAULT 0,
    CONSTRAINT batches_calendar_version_fkey FOREIGN KEY (calendar_version) REFERENCES lethe.calendars(version),
    CONSTRAINT batches_check CHECK ((runs_at >= tick_at)),
    CONSTRAINT batches_lane_fkey FOREIGN KEY (lane) REFERENCES lethe.lanes(lane),
    CONSTRAINT batches_lane_tick_at_runs_at_key UNIQUE (lane, tick_at, runs_at),
    CONSTRAINT batches_pkey PRIMARY KEY (batch_id),
    CONSTRAINT batches_state_check CHECK ((state = ANY (ARRAY['open'::text, 'closed'::text, 'released'::text, 'completed'::text])))
);
CREATE INDEX batches_unfinished ON lethe.batches USING btree (state, tick_at) WHERE (state <> 'completed'::text);
CREATE TRIGGER audit_moved AFTER UPDATE OF state ON lethe.batches FOR EACH ROW WHEN ((old.state <> new.state)) EXECUTE FUNCTION lethe.audit_batches();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.batches REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER guard_state BEFORE UPDATE OF state ON lethe.batches FOR EACH ROW WHEN ((old.state IS DISTINCT FROM new.state)) EXECUTE FUNCTION lethe.guard_batch_state();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.batches FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();

CREATE TABLE lethe.calendars (
    version bigint NOT NULL GENERATED AS IDENTITY,
    erasure_schedule text NOT NULL,
    expedited_schedule text NOT NULL,
    access_schedule text NOT NULL,
    waiting_period interval NOT NULL,
    completion_margin interval NOT NULL,
    stored_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    details_span interval NOT NULL DEFAULT '7 days'::interval,
    CONSTRAINT calendars_completion_margin_check CHECK ((completion_margin >= '00:00:00'::interval)),
    CONSTRAINT calendars_details_span_check CHECK ((details_span > '00:00:00'::interval)),
    CONSTRAINT calendars_pkey PRIMARY KEY (version),
    CONSTRAINT calendars_waiting_period_check CHECK ((waiting_period >= '00:00:00'::interval))
);
CREATE TRIGGER audit_stored AFTER INSERT ON lethe.calendars FOR EACH ROW EXECUTE FUNCTION lethe.audit_calendars();

CREATE TABLE lethe.callback_attempts (
    callback_id uuid NOT NULL,
    attempt integer NOT NULL,
    started_at timestamp with time zone NOT NULL,
    duration interval NOT NULL,
    status_code smallint,
    error_class text,
    reason text,
    CONSTRAINT callback_attempts_pkey PRIMARY KEY (callback_id, attempt)
);

CREATE TABLE lethe.callback_deltas (
    state text NOT NULL,
    delta bigint NOT NULL
);

CREATE TABLE lethe.callback_totals (
    state text NOT NULL,
    total bigint NOT NULL,
    CONSTRAINT callback_totals_pkey PRIMARY KEY (state)
);

CREATE TABLE lethe.callbacks (
    callback_id uuid NOT NULL,
    request_key bigint NOT NULL,
    url_no smallint NOT NULL,
    sequence smallint NOT NULL,
    endpoint_id bigint NOT NULL,
    request_status text NOT NULL,
    expected_completion_time timestamp with time zone NOT NULL,
    state text NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    retrying_for interval NOT NULL DEFAULT '00:00:00'::interval,
    next_attempt_at timestamp with time zone NOT NULL,
    lease_token uuid,
    lease_expires_at timestamp with time zone,
    created_at timestamp with time zone NOT NULL,
    finished_at timestamp with time zone,
    replays integer NOT NULL DEFAULT 0,
    replayed_at timestamp with time zone,
    exhausted_because text,
    CONSTRAINT callbacks_pkey PRIMARY KEY (callback_id),
    CONSTRAINT callbacks_request_key_url_no_sequence_key UNIQUE (request_key, url_no, sequence),
    CONSTRAINT callbacks_request_status_check CHECK ((request_status = ANY (ARRAY['pending'::text, 'in_progress'::text, 'completed'::text, 'cancelled'::text]))),
    CONSTRAINT callbacks_state_check CHECK ((state = ANY (ARRAY['waiting'::text, 'ready'::text, 'delivered'::text, 'exhausted'::text])))
);
CREATE INDEX callbacks_due ON lethe.callbacks USING btree (endpoint_id, next_attempt_at) WHERE (state = 'ready'::text);
CREATE INDEX callbacks_undelivered ON lethe.callbacks USING btree (endpoint_id, state, created_at) WHERE (state <> 'delivered'::text);
CREATE TRIGGER audit_exhausted AFTER UPDATE OF state ON lethe.callbacks FOR EACH ROW WHEN (((old.state <> 'exhausted'::text) AND (new.state = 'exhausted'::text))) EXECUTE FUNCTION lethe.audit_callbacks();
CREATE TRIGGER count_changed AFTER UPDATE ON lethe.callbacks REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();
CREATE TRIGGER count_new AFTER INSERT ON lethe.callbacks REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();
CREATE TRIGGER count_nothing AFTER TRUNCATE ON lethe.callbacks FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_nothing();
CREATE TRIGGER count_removed AFTER DELETE ON lethe.callbacks REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_callbacks();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.callbacks REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.callbacks FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
ALTER TABLE lethe.callbacks ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.callbacks FOR ALL USING ((EXISTS ( SELECT
   FROM lethe.requests r
  WHERE (r.request_key = callbacks.request_key))));

CREATE TABLE lethe.clock (
    only_row boolean NOT NULL DEFAULT true,
    shift interval NOT NULL DEFAULT '00:00:00'::interval,
    drift interval NOT NULL DEFAULT '00:00:00'::interval,
    CONSTRAINT clock_only_row_check CHECK (only_row),
    CONSTRAINT clock_pkey PRIMARY KEY (only_row)
);

CREATE TABLE lethe.controllers (
    controller_id text NOT NULL,
    partition_no integer NOT NULL GENERATED AS IDENTITY,
    amqp_user text,
    any_amqp_user boolean NOT NULL DEFAULT false,
    api_key text NOT NULL,
    api_secret_hash text NOT NULL,
    signature_algorithm text NOT NULL DEFAULT 'rsa-pkcs1v15'::text,
    include_profile boolean NOT NULL DEFAULT true,
    created_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    CONSTRAINT controllers_api_key_key UNIQUE (api_key),
    CONSTRAINT controllers_check CHECK ((NOT (any_amqp_user AND (amqp_user IS NOT NULL)))),
    CONSTRAINT controllers_controller_id_check CHECK ((controller_id ~ '^[A-Za-z0-9_-]{1,64}$'::text)),
    CONSTRAINT controllers_partition_no_key UNIQUE (partition_no),
    CONSTRAINT controllers_pkey PRIMARY KEY (controller_id),
    CONSTRAINT controllers_signature_algorithm_check CHECK ((signature_algorithm = ANY (ARRAY['rsa-pkcs1v15'::text, 'rsa-pss'::text, 'ecdsa-p256'::text])))
);
CREATE TRIGGER audit_added AFTER INSERT ON lethe.controllers FOR EACH ROW EXECUTE FUNCTION lethe.audit_controllers();
CREATE TRIGGER audit_changed AFTER UPDATE OF api_secret_hash, amqp_user, any_amqp_user, signature_algorithm, include_profile ON lethe.controllers FOR EACH ROW EXECUTE FUNCTION lethe.audit_controllers();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.controllers FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();

CREATE TABLE lethe.detail_weeks (
    week bigint NOT NULL GENERATED AS IDENTITY,
    starts_at timestamp with time zone NOT NULL,
    ends_at timestamp with time zone NOT NULL,
    CONSTRAINT detail_weeks_check CHECK ((starts_at < ends_at)),
    CONSTRAINT detail_weeks_pkey PRIMARY KEY (week),
    CONSTRAINT detail_weeks_starts_at_ends_at_key UNIQUE (starts_at, ends_at)
);

CREATE TABLE lethe.early_cancellations (
    controller_id text NOT NULL,
    subject_request_id uuid NOT NULL,
    received_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT early_cancellations_controller_id_fkey FOREIGN KEY (controller_id) REFERENCES lethe.controllers(controller_id),
    CONSTRAINT early_cancellations_pkey PRIMARY KEY (controller_id, subject_request_id)
);
CREATE INDEX early_cancellations_expiry ON lethe.early_cancellations USING btree (expires_at);
ALTER TABLE lethe.early_cancellations ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.early_cancellations FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.endpoints (
    endpoint_id bigint NOT NULL GENERATED AS IDENTITY,
    controller_id text NOT NULL,
    scheme text NOT NULL,
    host text NOT NULL,
    port integer NOT NULL,
    consecutive_failures integer NOT NULL DEFAULT 0,
    open_until timestamp with time zone,
    last_nudged_at timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    in_flight uuid[] NOT NULL DEFAULT '{}'::uuid[],
    claimed_until timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    looked_back_at timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    claimed_at timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    last_answer_at timestamp with time zone,
    unanswered_since timestamp with time zone,
    unanswered_at timestamp with time zone,
    unanswered_for interval NOT NULL DEFAULT '00:00:00'::interval,
    given_up_at timestamp with time zone,
    CONSTRAINT endpoints_controller_id_fkey FOREIGN KEY (controller_id) REFERENCES lethe.controllers(controller_id),
    CONSTRAINT endpoints_controller_id_scheme_host_port_key UNIQUE (controller_id, scheme, host, port),
    CONSTRAINT endpoints_pkey PRIMARY KEY (endpoint_id)
);
CREATE INDEX endpoints_in_trouble ON lethe.endpoints USING btree (controller_id, endpoint_id) WHERE (consecutive_failures > 0);
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.endpoints FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
ALTER TABLE lethe.endpoints ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.endpoints FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.import_progress (
    import_id uuid NOT NULL,
    controller_id text NOT NULL,
    bytes bigint NOT NULL,
    lines bigint NOT NULL,
    sha256 bytea NOT NULL,
    stored_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT import_progress_bytes_check CHECK ((bytes > 0)),
    CONSTRAINT import_progress_controller_id_fkey FOREIGN KEY (controller_id) REFERENCES lethe.controllers(controller_id),
    CONSTRAINT import_progress_lines_check CHECK ((lines > 0)),
    CONSTRAINT import_progress_pkey PRIMARY KEY (import_id),
    CONSTRAINT import_progress_sha256_check CHECK ((length(sha256) = 32))
);
CREATE INDEX import_progress_by_age ON lethe.import_progress USING btree (stored_at);
CREATE INDEX import_progress_by_controller ON lethe.import_progress USING btree (controller_id, stored_at);

CREATE TABLE lethe.installation (
    only_row boolean NOT NULL DEFAULT true,
    master_key_fingerprint bytea NOT NULL,
    recorded_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    CONSTRAINT installation_master_key_fingerprint_check CHECK ((octet_length(master_key_fingerprint) = 32)),
    CONSTRAINT installation_only_row_check CHECK (only_row),
    CONSTRAINT installation_pkey PRIMARY KEY (only_row)
);

CREATE TABLE lethe.lanes (
    lane text NOT NULL,
    closed_through timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    CONSTRAINT lanes_lane_check CHECK ((lane = ANY (ARRAY['erasure'::text, 'expedited'::text, 'access'::text]))),
    CONSTRAINT lanes_pkey PRIMARY KEY (lane)
);

CREATE TABLE lethe.leaders (
    name text NOT NULL,
    epoch bigint NOT NULL DEFAULT 0,
    holder uuid,
    expires_at timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    known_clock timestamp with time zone,
    agreed_clock timestamp with time zone,
    agreements bigint NOT NULL DEFAULT 0,
    CONSTRAINT leaders_pkey PRIMARY KEY (name)
);
CREATE UNIQUE INDEX leaders_term ON lethe.leaders USING btree (name, epoch);

CREATE TABLE lethe.message_failures (
    message_digest bytea NOT NULL,
    queue text NOT NULL,
    attempts integer NOT NULL DEFAULT 1,
    last_cause text,
    first_failed_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    last_failed_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    CONSTRAINT message_failures_message_digest_check CHECK ((octet_length(message_digest) = 32)),
    CONSTRAINT message_failures_pkey PRIMARY KEY (message_digest)
);
CREATE INDEX message_failures_age ON lethe.message_failures USING btree (last_failed_at);

CREATE TABLE lethe.past_requests (
    controller_id text NOT NULL,
    subject_request_id uuid NOT NULL,
    request_key bigint NOT NULL,
    api_version text NOT NULL,
    request_type text NOT NULL,
    status text NOT NULL,
    content_digest bytea NOT NULL,
    received_at timestamp with time zone NOT NULL,
    expected_completion_time timestamp with time zone NOT NULL,
    ended_at timestamp with time zone NOT NULL,
    cancellation_received_at timestamp with time zone,
    CONSTRAINT past_requests_content_digest_check CHECK ((octet_length(content_digest) = 32)),
    CONSTRAINT past_requests_pkey PRIMARY KEY (controller_id, subject_request_id),
    CONSTRAINT past_requests_status_check CHECK ((status = ANY (ARRAY['completed'::text, 'cancelled'::text])))
);
CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON lethe.past_requests FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_change();
ALTER TABLE lethe.past_requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.past_requests FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.pauses (
    stage text NOT NULL,
    controller_id text NOT NULL,
    failures integer NOT NULL DEFAULT 1,
    class text NOT NULL,
    since timestamp with time zone NOT NULL,
    paused_at timestamp with time zone NOT NULL,
    paused_until timestamp with time zone NOT NULL,
    CONSTRAINT pauses_pkey PRIMARY KEY (stage, controller_id),
    CONSTRAINT pauses_stage_check CHECK ((stage = ANY (ARRAY['erasure'::text, 'compilation'::text])))
);

CREATE TABLE lethe.request_deltas (
    batch_id bigint,
    request_type text NOT NULL,
    status text NOT NULL,
    delta bigint NOT NULL
);

CREATE TABLE lethe.request_details (
    week bigint NOT NULL,
    request_key bigint NOT NULL,
    controller_id text NOT NULL,
    sealed_request bytea NOT NULL,
    sealed_reporting bytea,
    named bigint[],
    at_receipt bigint[],
    at_release bigint[],
    CONSTRAINT request_details_pkey PRIMARY KEY (week, request_key)
) PARTITION BY LIST (week);
CREATE TRIGGER hold_weeks AFTER INSERT ON lethe.request_details REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.hold_weeks();
ALTER TABLE lethe.request_details ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.request_details FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.request_totals (
    request_type text NOT NULL,
    status text NOT NULL,
    total bigint NOT NULL,
    CONSTRAINT request_totals_pkey PRIMARY KEY (request_type, status)
);

CREATE TABLE lethe.requests (
    request_key bigint NOT NULL GENERATED AS IDENTITY,
    controller_id text NOT NULL,
    subject_request_id uuid NOT NULL,
    api_version text NOT NULL,
    regulation text,
    request_type text NOT NULL,
    status text NOT NULL,
    lane text NOT NULL,
    batch_id bigint,
    slice_id bigint,
    content_digest bytea NOT NULL,
    group_digest bytea,
    submitted_time timestamp with time zone NOT NULL,
    received_at timestamp with time zone NOT NULL,
    expected_completion_time timestamp with time zone NOT NULL,
    approval text NOT NULL DEFAULT 'not_needed'::text,
    approved_at timestamp with time zone,
    in_progress_at timestamp with time zone,
    completed_at timestamp with time zone,
    cancelled_at timestamp with time zone,
    cancellation_received_at timestamp with time zone,
    details_week bigint,
    CONSTRAINT requests_api_version_check CHECK ((api_version = ANY (ARRAY['1.0'::text, '2.0'::text, '3.0'::text]))),
    CONSTRAINT requests_approval_check CHECK ((approval = ANY (ARRAY['not_needed'::text, 'needed'::text, 'approved'::text]))),
    CONSTRAINT requests_content_digest_check CHECK ((octet_length(content_digest) = 32)),
    CONSTRAINT requests_controller_id_subject_request_id_key UNIQUE (controller_id, subject_request_id),
    CONSTRAINT requests_lane_check CHECK ((lane = ANY (ARRAY['erasure'::text, 'expedited'::text, 'access'::text]))),
    CONSTRAINT requests_pkey PRIMARY KEY (request_key),
    CONSTRAINT requests_regulation_check CHECK ((regulation = ANY (ARRAY['gdpr'::text, 'ccpa'::text]))),
    CONSTRAINT requests_request_type_check CHECK ((request_type = ANY (ARRAY['erasure'::text, 'access'::text, 'portability'::text]))),
    CONSTRAINT requests_status_check CHECK ((status = ANY (ARRAY['pending'::text, 'in_progress'::text, 'completed'::text, 'cancelled'::text])))
);
CREATE INDEX requests_awaiting_approval ON lethe.requests USING btree (request_key) WHERE ((approval = 'needed'::text) AND (cancelled_at IS NULL));
CREATE INDEX requests_cancelled ON lethe.requests USING btree (request_key) WHERE (cancelled_at IS NOT NULL);
CREATE INDEX requests_cancelled_of_controller ON lethe.requests USING btree (controller_id, request_key) WHERE (cancelled_at IS NOT NULL);
CREATE INDEX requests_cancelled_to_purge ON lethe.requests USING btree (cancelled_at, request_key) WHERE ((cancelled_at IS NOT NULL) AND (details_week IS NOT NULL));
CREATE INDEX requests_of_batch ON lethe.requests USING btree (batch_id, controller_id, request_key);
CREATE INDEX requests_of_controller ON lethe.requests USING btree (controller_id, request_key);
CREATE INDEX requests_of_group ON lethe.requests USING btree (controller_id, group_digest, request_key) WHERE (group_digest IS NOT NULL);
CREATE TRIGGER audit_changed AFTER UPDATE ON lethe.requests REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_changed_requests();
CREATE TRIGGER audit_received AFTER INSERT ON lethe.requests REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_new_requests();
CREATE TRIGGER audit_removed AFTER DELETE ON lethe.requests REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.audit_removed_requests();
CREATE TRIGGER count_changed AFTER UPDATE ON lethe.requests REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();
CREATE TRIGGER count_new AFTER INSERT ON lethe.requests REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();
CREATE TRIGGER count_nothing AFTER TRUNCATE ON lethe.requests FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_nothing();
CREATE TRIGGER count_removed AFTER DELETE ON lethe.requests REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.count_requests();
CREATE TRIGGER guard_birth BEFORE INSERT ON lethe.requests FOR EACH ROW WHEN ((new.status <> 'pending'::text)) EXECUTE FUNCTION lethe.guard_request_birth();
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.requests REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER never_again AFTER INSERT ON lethe.requests REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_past_requests();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.requests FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();
ALTER TABLE lethe.requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.requests FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE lethe.results (
    result_id uuid NOT NULL,
    request_key bigint NOT NULL,
    token_salt bytea NOT NULL,
    token_sha256 bytea NOT NULL,
    object_path text,
    media_type text NOT NULL,
    size_bytes bigint NOT NULL,
    lines bigint NOT NULL,
    wrapped_key bytea,
    expiry_day date NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    expired_at timestamp with time zone,
    downloads integer NOT NULL DEFAULT 0,
    delete_after timestamp with time zone NOT NULL DEFAULT '-infinity'::timestamp with time zone,
    delete_tries integer NOT NULL DEFAULT 0,
    CONSTRAINT results_pkey PRIMARY KEY (result_id),
    CONSTRAINT results_request_key_fkey FOREIGN KEY (request_key) REFERENCES lethe.requests(request_key),
    CONSTRAINT results_request_key_key UNIQUE (request_key),
    CONSTRAINT results_token_sha256_key UNIQUE (token_sha256)
);
CREATE INDEX results_to_delete ON lethe.results USING btree (delete_after) WHERE ((expired_at IS NOT NULL) AND (object_path IS NOT NULL));
CREATE INDEX results_unexpired ON lethe.results USING btree (expires_at) WHERE (expired_at IS NULL);
CREATE TRIGGER audit_expired AFTER UPDATE OF expired_at ON lethe.results FOR EACH ROW WHEN (((old.expired_at IS NULL) AND (new.expired_at IS NOT NULL))) EXECUTE FUNCTION lethe.audit_results();
CREATE TRIGGER audit_written AFTER INSERT ON lethe.results FOR EACH ROW EXECUTE FUNCTION lethe.audit_results();
ALTER TABLE lethe.results ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.results FOR ALL USING ((EXISTS ( SELECT
   FROM lethe.requests r
  WHERE (r.request_key = results.request_key))));

CREATE TABLE lethe.schema_support (
    only_row boolean NOT NULL DEFAULT true,
    oldest_workers integer NOT NULL,
    CONSTRAINT schema_support_only_row_check CHECK (only_row),
    CONSTRAINT schema_support_pkey PRIMARY KEY (only_row)
);

CREATE TABLE lethe.slice_receipts (
    slice_id bigint NOT NULL,
    store text NOT NULL,
    as_of timestamp with time zone NOT NULL,
    request_keys bigint[] NOT NULL,
    rows_deleted bigint[] NOT NULL,
    rows_arrived bigint[] NOT NULL,
    verified_at timestamp with time zone[] NOT NULL,
    failures text[] NOT NULL,
    CONSTRAINT slice_receipts_check CHECK ((cardinality(request_keys) = ALL (ARRAY[cardinality(rows_deleted), cardinality(rows_arrived), cardinality(verified_at), cardinality(failures)]))),
    CONSTRAINT slice_receipts_pkey PRIMARY KEY (slice_id, store),
    CONSTRAINT slice_receipts_rows_deleted_check CHECK ((array_position(rows_deleted, NULL::bigint) IS NULL))
);

CREATE TABLE lethe.slices (
    slice_id bigint NOT NULL GENERATED AS IDENTITY,
    batch_id bigint NOT NULL,
    controller_id text NOT NULL,
    stage text NOT NULL,
    state text NOT NULL DEFAULT 'ready'::text,
    request_count integer NOT NULL,
    mpid_count integer NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    lease_token uuid,
    lease_expires_at timestamp with time zone,
    next_attempt_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    last_nudged_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    nudges integer NOT NULL DEFAULT 0,
    started_at timestamp with time zone,
    last_error text,
    created_at timestamp with time zone NOT NULL DEFAULT lethe.now(),
    completed_at timestamp with time zone,
    first_request bigint NOT NULL,
    last_request bigint NOT NULL,
    writers text[],
    needs_operator boolean NOT NULL DEFAULT false,
    CONSTRAINT slices_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES lethe.batches(batch_id),
    CONSTRAINT slices_check CHECK ((first_request <= last_request)),
    CONSTRAINT slices_controller_id_fkey FOREIGN KEY (controller_id) REFERENCES lethe.controllers(controller_id),
    CONSTRAINT slices_pkey PRIMARY KEY (slice_id),
    CONSTRAINT slices_request_count_check CHECK ((request_count > 0)),
    CONSTRAINT slices_stage_check CHECK ((stage = ANY (ARRAY['erasure'::text, 'compilation'::text]))),
    CONSTRAINT slices_state_check CHECK ((state = ANY (ARRAY['ready'::text, 'completed'::text])))
);
CREATE INDEX slices_leased ON lethe.slices USING btree (stage, controller_id) WHERE ((state = 'ready'::text) AND (lease_token IS NOT NULL));
CREATE INDEX slices_of_batch ON lethe.slices USING btree (batch_id);
CREATE INDEX slices_of_the_operator ON lethe.slices USING btree (controller_id) WHERE ((state = 'ready'::text) AND needs_operator);
CREATE INDEX slices_open ON lethe.slices USING btree (next_attempt_at, stage) WHERE (state = 'ready'::text);
CREATE INDEX slices_open_latest ON lethe.slices USING btree (last_request) WHERE (state = 'ready'::text);
CREATE INDEX slices_open_of_batch ON lethe.slices USING btree (batch_id) WHERE (state = 'ready'::text);
CREATE INDEX slices_open_of_controller ON lethe.slices USING btree (stage, controller_id, next_attempt_at, slice_id) WHERE (state = 'ready'::text);
CREATE TRIGGER guard_removal AFTER DELETE ON lethe.slices REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION lethe.guard_removal();
CREATE TRIGGER never_removed BEFORE DELETE ON lethe.slices FOR EACH STATEMENT EXECUTE FUNCTION lethe.refuse_removal();

CREATE TABLE subject_data.event_batches (
    id bigint NOT NULL DEFAULT nextval('subject_data.event_batch_id'::regclass),
    controller_id text NOT NULL,
    mpid bigint NOT NULL,
    received_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    body json NOT NULL,
    CONSTRAINT event_batches_body_check CHECK (((body)::text !~ '[\n\r]'::text)),
    CONSTRAINT event_batches_pkey PRIMARY KEY (controller_id, mpid, id)
) PARTITION BY LIST (controller_id);

CREATE TABLE subject_data.profile_identities (
    controller_id text NOT NULL,
    identity_type text NOT NULL,
    identity_value text NOT NULL,
    mpid bigint NOT NULL,
    by_sha256 uuid NOT NULL GENERATED ALWAYS AS ((encode(SUBSTRING(sha256(decode(replace(((identity_type || ' '::text) || encode(sha256(decode(replace(
CASE identity_type
    WHEN 'email'::text THEN lower((btrim(identity_value, ' 	
'::text) COLLATE "C"))
    ELSE btrim(identity_value, ' 	
'::text)
END, '\'::text, '\\'::text), 'escape'::text)), 'hex'::text)), '\'::text, '\\'::text), 'escape'::text)) FROM 1 FOR 16), 'hex'::text))::uuid) STORED,
    by_sha1 uuid NOT NULL GENERATED ALWAYS AS ((encode(SUBSTRING(sha256(decode(replace(((identity_type || ' '::text) || encode(public.digest(decode(replace(
CASE identity_type
    WHEN 'email'::text THEN lower((btrim(identity_value, ' 	
'::text) COLLATE "C"))
    ELSE btrim(identity_value, ' 	
'::text)
END, '\'::text, '\\'::text), 'escape'::text), 'sha1'::text), 'hex'::text)), '\'::text, '\\'::text), 'escape'::text)) FROM 1 FOR 16), 'hex'::text))::uuid) STORED,
    by_md5 uuid NOT NULL GENERATED ALWAYS AS ((encode(SUBSTRING(sha256(decode(replace(((identity_type || ' '::text) || md5(decode(replace(
CASE identity_type
    WHEN 'email'::text THEN lower((btrim(identity_value, ' 	
'::text) COLLATE "C"))
    ELSE btrim(identity_value, ' 	
'::text)
END, '\'::text, '\\'::text), 'escape'::text))), '\'::text, '\\'::text), 'escape'::text)) FROM 1 FOR 16), 'hex'::text))::uuid) STORED,
    CONSTRAINT profile_identities_pkey PRIMARY KEY (controller_id, mpid, by_sha256)
) PARTITION BY LIST (controller_id);
CREATE INDEX profile_identities_by_md5_mpid_controller_id_idx ON ONLY subject_data.profile_identities USING btree (by_md5) INCLUDE (mpid, controller_id);
CREATE INDEX profile_identities_by_sha1_mpid_controller_id_idx ON ONLY subject_data.profile_identities USING btree (by_sha1) INCLUDE (mpid, controller_id);
CREATE INDEX profile_identities_by_sha256_mpid_controller_id_idx ON ONLY subject_data.profile_identities USING btree (by_sha256) INCLUDE (mpid, controller_id);
ALTER TABLE subject_data.profile_identities ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON subject_data.profile_identities FOR ALL USING ((controller_id = lethe.acting_controller()));

CREATE TABLE subject_data.profiles (
    controller_id text NOT NULL,
    mpid bigint NOT NULL,
    attributes jsonb NOT NULL DEFAULT '{}'::jsonb,
    audiences jsonb NOT NULL DEFAULT '[]'::jsonb,
    created_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    replaced_at timestamp with time zone,
    CONSTRAINT profiles_pkey PRIMARY KEY (controller_id, mpid)
) PARTITION BY LIST (controller_id);

CREATE VIEW lethe.erasure_receipts AS
 SELECT s.slice_id,
    u.request_key,
    s.store,
    s.as_of,
    u.rows_deleted,
    u.rows_arrived,
    u.verified_at,
    u.failure
   FROM (lethe.slice_receipts s
     CROSS JOIN LATERAL UNNEST(s.request_keys, s.rows_deleted, s.rows_arrived, s.verified_at, s.failures) u(request_key, rows_deleted, rows_arrived, verified_at, failure))
  WHERE ((u.rows_deleted > 0) OR (u.verified_at IS NOT NULL) OR (u.failure IS NOT NULL));

CREATE VIEW lethe.slice_members AS
 SELECT s.slice_id,
    r.request_key,
    r.subject_request_id,
    r.request_type,
    r.status,
    r.details_week
   FROM (lethe.slices s
     JOIN lethe.requests r ON (((r.batch_id = s.batch_id) AND (r.controller_id = s.controller_id) AND ((r.request_key >= s.first_request) AND (r.request_key <= s.last_request)) AND (r.slice_id = s.slice_id))));

CREATE OR REPLACE FUNCTION lethe.acting_controller()
 RETURNS text
 LANGUAGE sql
 STABLE PARALLEL SAFE
RETURN NULLIF(current_setting('lethe.controller_id'::text, true), ''::text);

CREATE OR REPLACE FUNCTION lethe.add_callbacks(keys bigint[], new_status text, new_sequence smallint)
 RETURNS SETOF bigint
 LANGUAGE plpgsql
AS $function$
DECLARE
    instant timestamptz;
BEGIN
    -- In key order, as everyone who locks several of them does.
    PERFORM 1 FROM lethe.callbacks
      WHERE request_key = ANY (keys) AND sequence = new_sequence - 1
      ORDER BY callback_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    instant := lethe.now();
    RETURN QUERY
    WITH added AS (
        INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                     expected_completion_time, state, next_attempt_at, created_at)
        SELECT gen_random_uuid(), p.request_key, p.url_no, new_sequence, p.endpoint_id, new_status,
               r.expected_completion_time,
               CASE WHEN p.state IN ('delivered', 'exhausted') OR p.replays > 0 THEN 'ready' ELSE 'waiting' END,
               instant, instant
          FROM lethe.callbacks p JOIN lethe.requests r USING (request_key)
         WHERE p.request_key = ANY (keys) AND p.sequence = new_sequence - 1
        RETURNING endpoint_id, state)
    SELECT DISTINCT endpoint_id FROM added WHERE state = 'ready';
END $function$;

CREATE OR REPLACE FUNCTION lethe.announce_audit_entries()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO lethe.audit_unsealed (entry_id) SELECT entry_id FROM new_rows;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.assert_leader(leader_name text, leader_epoch bigint)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    PERFORM 1 FROM lethe.leaders WHERE name = leader_name AND epoch = leader_epoch FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'epoch % of % is over', leader_epoch, leader_name USING ERRCODE = 'LT001';
    END IF;
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_batches()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO lethe.audit_entries (event, details)
    VALUES ('batch.' || NEW.state,
            jsonb_build_object('batch_id', NEW.batch_id, 'lane', NEW.lane, 'tick_at', NEW.tick_at,
                               'runs_at', NEW.runs_at, 'calendar_version', NEW.calendar_version));
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_calendars()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO lethe.audit_entries (event, details) VALUES ('calendar.stored', to_jsonb(NEW));
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_callbacks()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'callback.exhausted',
           json_build_object('subject_request_id', r.subject_request_id, 'callback_id', NEW.callback_id,
                             'request_status', NEW.request_status, 'attempts', NEW.attempts,
                             'because', NEW.exhausted_because)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_changed_requests()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_nestloop TO 'off'
 SET enable_seqscan TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_controllers()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_new_requests()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_removed_requests()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.audit_results()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key,
           CASE TG_OP WHEN 'INSERT' THEN 'result.written' ELSE 'result.expired' END,
           jsonb_build_object('subject_request_id', r.subject_request_id, 'result_id', NEW.result_id,
                              'lines', NEW.lines, 'size_bytes', NEW.size_bytes, 'expires_at', NEW.expires_at)
      FROM lethe.requests r WHERE r.request_key = NEW.request_key;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.begin_intake(OUT received_at timestamp with time zone, OUT calendar_version bigint)
 RETURNS record
 LANGUAGE plpgsql
AS $function$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(lethe.calendar_lock());
    SELECT max(version) INTO calendar_version FROM lethe.calendars;
    SELECT greatest(lethe.now(), max(closed_through)) INTO received_at FROM lethe.lanes;
END $function$;

CREATE OR REPLACE FUNCTION lethe.calendar_lock()
 RETURNS bigint
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
RETURN '5499812871'::bigint;

CREATE OR REPLACE FUNCTION lethe.claim_due_callbacks(endpoints bigint[], wanted integer[], token uuid, lease_seconds double precision, endpoint_limit integer)
 RETURNS TABLE(callback_id uuid, endpoint_id bigint, url_no smallint, request_status text, expected_completion_time timestamp with time zone, attempt integer, started_at timestamp with time zone, controller_id text, subject_request_id uuid, api_version text, sealed_reporting bytea, sealed_request bytea, signature_algorithm text, result_id uuid, token_salt bytea, lines bigint, replay boolean)
 LANGUAGE plpgsql
 SET enable_seqscan TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.claim_slice(wanted_stage text, lease_seconds double precision, served_last text, at_limit text[])
 RETURNS TABLE(slice_id bigint, controller_id text, lease_token uuid, attempts integer, started_at timestamp with time zone, writers text[], paused_before boolean)
 LANGUAGE plpgsql
 SET enable_seqscan TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.count_callbacks()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lethe.callback_deltas (state, delta) SELECT state, count(*) FROM new_rows GROUP BY 1;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO lethe.callback_deltas (state, delta)
        SELECT state, sum(difference)
          FROM (SELECT state, 1 AS difference FROM new_rows UNION ALL SELECT state, -1 FROM old_rows) AS moved
         GROUP BY 1 HAVING sum(difference) <> 0;
    ELSE
        INSERT INTO lethe.callback_deltas (state, delta) SELECT state, -count(*) FROM old_rows GROUP BY 1;
    END IF;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.count_nothing()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_TABLE_NAME = 'requests' THEN
        DELETE FROM lethe.request_totals;
        DELETE FROM lethe.batch_totals;
        DELETE FROM lethe.request_deltas;
    ELSE
        DELETE FROM lethe.callback_totals;
        DELETE FROM lethe.callback_deltas;
    END IF;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.count_requests()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, count(*) FROM new_rows GROUP BY 1, 2, 3;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, sum(difference)
          FROM (SELECT batch_id, request_type, status, 1 AS difference FROM new_rows
                UNION ALL
                SELECT batch_id, request_type, status, -1 FROM old_rows) AS moved
         GROUP BY 1, 2, 3 HAVING sum(difference) <> 0;
    ELSE
        INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
        SELECT batch_id, request_type, status, -count(*) FROM old_rows GROUP BY 1, 2, 3;
    END IF;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.create_partitions(new_controller text)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
DECLARE
    parent text;
    child  text;
    no     integer;
BEGIN
    SELECT partition_no INTO STRICT no FROM lethe.controllers WHERE controller_id = new_controller;
    FOREACH parent IN ARRAY ARRAY['profiles', 'profile_identities', 'event_batches'] LOOP
        child := format('%s_p%s', parent, no);
        IF to_regclass('subject_data.' || child) IS NOT NULL THEN
            CONTINUE;
        END IF;
        EXECUTE format('CREATE TABLE subject_data.%I (LIKE subject_data.%I INCLUDING ALL, CHECK (controller_id = %L))',
                       child, parent, new_controller);
        PERFORM lethe.vacuum_soon(('subject_data.' || child)::regclass);
        EXECUTE format('ALTER TABLE subject_data.%I ATTACH PARTITION subject_data.%I FOR VALUES IN (%L)',
                       parent, child, new_controller);
    END LOOP;
END $function$;

CREATE OR REPLACE FUNCTION lethe.drop_week(which bigint, retention interval)
 RETURNS bigint
 LANGUAGE plpgsql
 SET enable_seqscan TO 'on'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.eraser_lock()
 RETURNS bigint
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE
RETURN '5499812872'::bigint;

CREATE OR REPLACE FUNCTION lethe.find_api_key(wanted text)
 RETURNS TABLE(controller_id text, api_secret_hash text, signature_algorithm text)
 LANGUAGE sql
 STABLE SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    SELECT c.controller_id, c.api_secret_hash, c.signature_algorithm FROM lethe.controllers c WHERE c.api_key = wanted
$function$;

CREATE OR REPLACE FUNCTION lethe.find_result(wanted bytea)
 RETURNS TABLE(result_id uuid, controller_id text, subject_request_id uuid, request_type text, object_path text, media_type text, size_bytes bigint, wrapped_key bytea, expiry_day date, expired boolean)
 LANGUAGE sql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    SELECT s.result_id, r.controller_id, r.subject_request_id, r.request_type, s.object_path, s.media_type,
           s.size_bytes, s.wrapped_key, s.expiry_day, s.expires_at <= lethe.now() OR s.expired_at IS NOT NULL
      FROM lethe.results s JOIN lethe.requests r USING (request_key) WHERE s.token_sha256 = wanted
$function$;

CREATE OR REPLACE FUNCTION lethe.guard_batch_state()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF (OLD.state, NEW.state) NOT IN (('open', 'closed'), ('closed', 'released'), ('released', 'completed')) THEN
        RAISE EXCEPTION 'a batch cannot go from % to %', OLD.state, NEW.state USING ERRCODE = 'LT002';
    END IF;
    RETURN NEW;
END $function$;

CREATE OR REPLACE FUNCTION lethe.guard_removal()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.guard_request_birth()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION 'a request begins as pending, not as %', NEW.status USING ERRCODE = 'LT002';
END $function$;

CREATE OR REPLACE FUNCTION lethe.hold_weeks()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.identity_key(identity_type text, digest bytea)
 RETURNS uuid
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$
    SELECT encode(substring(sha256(convert_to(identity_type || ' ' || encode(digest, 'hex'), 'UTF8')) FOR 16), 'hex')::uuid
$function$;

CREATE OR REPLACE FUNCTION lethe.identity_md5(identity_type text, value text)
 RETURNS bytea
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$
    SELECT decode(md5(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8')), 'hex')
$function$;

CREATE OR REPLACE FUNCTION lethe.identity_sha1(identity_type text, value text)
 RETURNS bytea
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$
    SELECT lethe.sha1(lethe.normalise_identity(identity_type, value))
$function$;

CREATE OR REPLACE FUNCTION lethe.identity_sha256(identity_type text, value text)
 RETURNS bytea
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$
    SELECT sha256(convert_to(lethe.normalise_identity(identity_type, value), 'UTF8'))
$function$;

CREATE OR REPLACE FUNCTION lethe.normalise_identity(identity_type text, value text)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$
    SELECT CASE identity_type
        WHEN 'email' THEN lower(btrim(value, E' \t\n\r\f\x0B') COLLATE "C")
        ELSE btrim(value, E' \t\n\r\f\x0B') END
$function$;

CREATE OR REPLACE FUNCTION lethe.now()
 RETURNS timestamp with time zone
 LANGUAGE sql
 PARALLEL SAFE
AS $function$
    SELECT clock_timestamp() + drift + shift FROM lethe.clock
$function$;

CREATE OR REPLACE FUNCTION lethe.open_week(instant timestamp with time zone, OUT week bigint, OUT starts_at timestamp with time zone, OUT ends_at timestamp with time zone)
 RETURNS record
 LANGUAGE sql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    SELECT w.week, w.starts_at, w.ends_at FROM lethe.week_of(greatest(instant, lethe.now())) w
$function$;

CREATE OR REPLACE FUNCTION lethe.record_download(wanted bytea, first_byte bigint, last_byte bigint, most integer)
 RETURNS SETOF bigint
 LANGUAGE sql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
AS $function$
    WITH counted AS (
        UPDATE lethe.results s SET downloads = s.downloads + 1
         WHERE s.token_sha256 = wanted AND s.downloads < most
        RETURNING s.result_id, s.request_key, s.size_bytes)
    INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
    SELECT r.controller_id, r.request_key, 'result.downloaded',
           jsonb_build_object('result_id', c.result_id, 'first_byte', first_byte, 'last_byte', last_byte,
                              'size_bytes', c.size_bytes)
      FROM counted c JOIN lethe.requests r USING (request_key)
    RETURNING entry_id
$function$;

CREATE OR REPLACE FUNCTION lethe.refuse_change()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $function$;

CREATE OR REPLACE FUNCTION lethe.refuse_past_requests()
 RETURNS trigger
 LANGUAGE plpgsql
 SECURITY DEFINER
 SET search_path TO 'pg_catalog', 'pg_temp'
 SET enable_seqscan TO 'off'
 SET enable_hashjoin TO 'off'
 SET enable_mergejoin TO 'off'
AS $function$
BEGIN
    IF EXISTS (SELECT FROM new_rows n JOIN lethe.past_requests p USING (controller_id, subject_request_id)) THEN
        RAISE EXCEPTION 'a request of this id has ended, and its records are being removed' USING ERRCODE = '40001';
    END IF;
    RETURN NULL;
END $function$;

CREATE OR REPLACE FUNCTION lethe.refuse_removal()
 RETURNS trigger
 LANGUAGE plpgsql
AS $function$
BEGIN
    IF TG_TABLE_NAME IN ('requests', 'callbacks', 'slices', 'batches')
       AND current_setting('lethe.removing_records', true) = 'on'
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'rows of % are never removed', TG_TABLE_NAME USING ERRCODE = 'LT003';
END $function$;

CREATE OR REPLACE FUNCTION lethe.release_successors(finished uuid[])
 RETURNS void
 LANGUAGE plpgsql
 SET enable_seqscan TO 'off'
AS $function$
BEGIN
    UPDATE lethe.callbacks c
       SET state = 'ready', next_attempt_at = (SELECT lethe.now())
      -- In key order, as everyone who locks several of them does.
      FROM (SELECT next.callback_id
              FROM lethe.callbacks done
              JOIN lethe.callbacks next
                ON next.request_key = done.request_key AND next.url_no = done.url_no AND next.sequence = done.sequence + 1
             WHERE done.callback_id = ANY (finished) AND next.state = 'waiting'
             ORDER BY next.callback_id FOR UPDATE OF next) ready
     WHERE c.callback_id = ready.callback_id;
END $function$;

CREATE OR REPLACE FUNCTION lethe.sha1(value text)
 RETURNS bytea
 LANGUAGE sql
 IMMUTABLE PARALLEL SAFE STRICT
AS $function$SELECT public.digest(convert_to(value, 'UTF8'), 'sha1')$function$;

CREATE OR REPLACE FUNCTION lethe.vacuum_soon(partition regclass)
 RETURNS void
 LANGUAGE plpgsql
AS $function$
BEGIN
    EXECUTE format('ALTER TABLE %s SET (autovacuum_vacuum_scale_factor = 0.001, toast.autovacuum_vacuum_scale_factor = 0.001)',
                   partition);
END $function$;

CREATE OR REPLACE FUNCTION lethe.wall_clock()
 RETURNS timestamp with time zone
 LANGUAGE sql
 PARALLEL SAFE
AS $function$
    SELECT clock_timestamp() + drift FROM lethe.clock
$function$;

CREATE OR REPLACE FUNCTION lethe.week_of(instant timestamp with time zone, OUT week bigint, OUT starts_at timestamp with time zone, OUT ends_at timestamp with time zone)
 RETURNS record
 LANGUAGE plpgsql
AS $function$
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
END $function$;

CREATE OR REPLACE FUNCTION lethe.writers(of_controller text)
 RETURNS text[]
 LANGUAGE sql
AS $function$
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
$function$;
