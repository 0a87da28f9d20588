-- Workers of an earlier release may go on while the schema is already that of a later one, as long as it holds what they use.
-- `lethe migrate` writes it, from what it was built with.
CREATE TABLE lethe.schema_support (
    only_row       boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- The schema version that a worker must have been built for, at least.
    oldest_workers integer NOT NULL
);
GRANT SELECT ON lethe.schema_support TO lethe_gateway;

-- For couriers of a release that no longer runs beside this one.
DROP FUNCTION lethe.claim_callbacks(bigint[], integer[], uuid, double precision, integer);
