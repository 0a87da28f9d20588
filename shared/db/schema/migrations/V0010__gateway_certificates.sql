-- What the gateway tells of the trail: to each controller of its own entries, for certificates of erasure.

GRANT SELECT ON lethe.audit_entries, lethe.audit_seals TO lethe_gateway;
ALTER TABLE lethe.audit_entries ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.audit_entries TO lethe_gateway USING (controller_id = lethe.acting_controller());
ALTER TABLE lethe.audit_seals ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON lethe.audit_seals TO lethe_gateway USING (chain = lethe.acting_controller());
