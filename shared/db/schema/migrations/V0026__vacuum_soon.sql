-- What was erased leaves the tables of subject data soon. Partitions that are there are changed after this, some at a time.

-- What was erased lies in the table until a vacuum: that comes once a thousandth of the rows is dead, and not only with a fifth,
-- which a weekly batch would take months to reach.
CREATE OR REPLACE FUNCTION lethe.vacuum_soon(partition regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s SET (autovacuum_vacuum_scale_factor = 0.001, toast.autovacuum_vacuum_scale_factor = 0.001)',
                   partition);
END $$;

-- The partitions of a controller are built aside and attached: CREATE TABLE … PARTITION OF would lock the
-- parent against every other controller's work.
CREATE OR REPLACE FUNCTION lethe.create_partitions(new_controller text) RETURNS void LANGUAGE plpgsql AS $$
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
END $$;
