-- The audit trail: what was done, for whom, when. Entries are written in the transaction of what they record, so that
-- neither exists without the other, and are never changed. They hold no personal data.

CREATE TABLE lethe.audit_entries (
    entry_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- NULL: the processor's own doing, for no controller in particular.
    controller_id text REFERENCES lethe.controllers,
    request_key   bigint REFERENCES lethe.requests,
    event         text NOT NULL CHECK (event ~ '^[a-z_]+\.[a-z_]+$'),
    details       jsonb NOT NULL DEFAULT '{}',
    recorded_at   timestamptz NOT NULL DEFAULT lethe.now()
);
