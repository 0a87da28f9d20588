-- A publication FOR ALL TABLES refuses to delete from tables whose rows nothing identifies. The key takes the place of the
-- index on (mpid, id), so it costs next to nothing (docs/adr/0036-a-key-for-event-batches.md). New partitions get it with
-- LIKE … INCLUDING ALL.
ALTER TABLE subject_data.event_batches ADD PRIMARY KEY (controller_id, mpid, id);
DROP INDEX subject_data.event_batches_mpid_id_idx;
