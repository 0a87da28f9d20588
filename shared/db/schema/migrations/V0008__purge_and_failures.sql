-- What ends the personal data of requests, and what counts the failures of messages.

ALTER TABLE lethe.requests ADD COLUMN purged_at timestamptz;
CREATE INDEX requests_to_purge ON lethe.requests ((coalesce(completed_at, cancelled_at)))
    WHERE sealed_request IS NOT NULL AND status IN ('completed', 'cancelled');

-- Messages that failed, or that came again: by a keyed digest of queue, routing key and body. Counted here and not by
-- the broker, which cannot tell a poisonous message from a restart.
CREATE TABLE lethe.message_failures (
    message_digest  bytea PRIMARY KEY CHECK (octet_length(message_digest) = 32),
    queue           text NOT NULL,
    attempts        integer NOT NULL DEFAULT 1,
    last_cause      text,
    first_failed_at timestamptz NOT NULL DEFAULT lethe.now(),
    last_failed_at  timestamptz NOT NULL DEFAULT lethe.now()
);
CREATE INDEX message_failures_age ON lethe.message_failures (last_failed_at);

