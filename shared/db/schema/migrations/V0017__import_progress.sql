-- How far a file of event batches was imported, so that a second run of the same file doubles nothing. An event batch has
-- no name of its own: two that are equal may both be true.

CREATE TABLE lethe.import_progress (
    import_id     uuid PRIMARY KEY,
    controller_id text NOT NULL REFERENCES lethe.controllers,
    -- The file's content, unpacked, up to the end of the last line that was stored: its length, its lines, its digest.
    -- A file is known by this: it may be packed, renamed, mended behind it, or have grown.
    bytes         bigint NOT NULL CHECK (bytes > 0),
    lines         bigint NOT NULL CHECK (lines > 0),
    sha256        bytea NOT NULL CHECK (length(sha256) = 32),
    stored_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX import_progress_by_controller ON lethe.import_progress (controller_id, stored_at);
CREATE INDEX import_progress_by_age ON lethe.import_progress (stored_at);
COMMENT ON TABLE lethe.import_progress IS 'How far files of event batches were imported; kept for 90 days.';

-- When a line of an import replaced the profile, which makes it data that was received then. `updated_at` cannot say so: a
-- controller's own SQL sets it as well, on a profile that an erasure has to take.
ALTER TABLE subject_data.profiles ADD COLUMN replaced_at timestamptz;
