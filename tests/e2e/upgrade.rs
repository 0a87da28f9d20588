//! What is there goes along with the schema: migrations run on rows of before.

use lethe_db::Db;
use lethe_testing::servers;

/// The migrations, by number.
fn migrations() -> Vec<(i32, String)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/db/schema/migrations");
    let mut found = Vec::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some((number, _)) = name.strip_prefix('V').and_then(|rest| rest.split_once("__")) {
            found.push((number.parse().unwrap(), std::fs::read_to_string(&path).unwrap()));
        }
    }
    found.sort();
    found
}

/// Of each kind one, by its key: 1 completed and 2 in progress in one slice, 3 pending, 4 waiting for an approval, 5 cancelled,
/// 6 purged long ago.
const ROWS: &str = "
    INSERT INTO lethe.controllers (controller_id, api_key, api_secret_hash) VALUES ('acme', 'k', 'h');
    SELECT lethe.create_partitions('acme');
    INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
    VALUES ('acme', 'email', ' Ada@Example.com', 7), ('acme', 'other', 'back\\slash', 8);
    INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
    VALUES ('30 12 * * MON', '30 12 * * *', '5 0 * * MON,THU', '7 days', '10 days');
    INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version)
    SELECT 'erasure', t, t, 1 FROM (VALUES (now() - interval '3 days'), (now() + interval '7 days')) AS at (t) ORDER BY t;
    UPDATE lethe.batches SET state = 'closed' WHERE batch_id = 1;
    UPDATE lethe.batches SET state = 'released' WHERE batch_id = 1;
    INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                content_digest, sealed_request, sealed_reporting, submitted_time, received_at,
                                expected_completion_time, approval)
    SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure',
           CASE WHEN n IN (1, 2, 5, 6) THEN 1 WHEN n = 3 THEN 2 END, sha256('x'), convert_to('sealed ' || n, 'UTF8'),
           CASE WHEN n <> 3 THEN convert_to('reporting ' || n, 'UTF8') END, now(), now() - interval '8 days',
           now() + interval '10 years', CASE n WHEN 4 THEN 'needed' ELSE 'not_needed' END
      FROM generate_series(1, 6) AS n ORDER BY n;
    INSERT INTO lethe.request_mpids (request_key, mpid, source)
    VALUES (1, 7, 'receipt'), (1, 9, 'release'), (2, 8, 'receipt'), (3, 7, 'named'), (3, 8, 'receipt'), (5, 8, 'receipt');
    INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
    VALUES (1, 'acme', 'erasure', 2, 3, 1, 2);
    UPDATE lethe.requests SET status = 'in_progress', slice_id = 1 WHERE request_key IN (1, 2, 6);
    INSERT INTO lethe.erasure_receipts (request_key, store, as_of, rows_deleted, rows_arrived, verified_at)
    VALUES (1, 'postgres', now(), 14, 1, now());
    UPDATE lethe.requests SET status = 'completed', completed_at = now() - interval '2 days' WHERE request_key IN (1, 6);
    UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() - interval '20 days' WHERE request_key = 5;
    UPDATE lethe.requests SET sealed_request = NULL, purged_at = now() WHERE request_key = 6;";

#[tokio::test]
async fn details_receipts_and_keys_of_before_are_found_where_they_lie_now() {
    let name = servers::unique_name();
    let url = servers::create_empty_database(&name).await;
    let db = Db::new(&url, 1, "lethe-testing").unwrap();
    let session = db.session().await.unwrap();
    session.batch_execute("CREATE TABLE public.refinery_schema_history ()").await.unwrap();
    for (number, sql) in migrations() {
        if number == 27 {
            session.batch_execute(ROWS).await.unwrap();
        }
        let ran = session.batch_execute(&format!("BEGIN; {sql}; COMMIT")).await;
        ran.unwrap_or_else(|error| panic!("V{number:04}: {error:?}"));
    }
    let text = async |sql: &str| -> Vec<String> {
        let rows = session.raw().query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let details = "
        SELECT concat_ws(' ', r.request_key, convert_from(d.sealed_request, 'UTF8'), convert_from(d.sealed_reporting, 'UTF8'),
                         d.named, d.at_receipt, d.at_release)
          FROM lethe.requests r JOIN lethe.request_details d ON d.week = r.details_week AND d.request_key = r.request_key
         WHERE d.controller_id = r.controller_id ORDER BY r.request_key";
    assert_eq!(
        text(details).await,
        [
            "1 sealed 1 reporting 1 {7} {9}",
            "2 sealed 2 reporting 2 {8}",
            "3 sealed 3 {7} {8}",
            "4 sealed 4 reporting 4",
            "5 sealed 5 reporting 5 {8}",
        ]
    );
    assert_eq!(
        text("SELECT coalesce(details_week::text, 'none') FROM lethe.requests WHERE request_key = 6").await,
        ["none"]
    );
    let where_it_lies = "
        SELECT r.request_key::text FROM lethe.requests r JOIN lethe.detail_weeks w ON w.week = r.details_week
         WHERE CASE r.request_key WHEN 1 THEN r.completed_at WHEN 2 THEN now() - interval '2 days'
                                  WHEN 3 THEN now() + interval '8 days' WHEN 4 THEN r.received_at ELSE r.cancelled_at END
               <@ tstzrange(w.starts_at, w.ends_at) ORDER BY 1";
    assert_eq!(text(where_it_lies).await, ["1", "2", "3", "4", "5"], "by the end, or by when the batch runs");
    let receipts =
        "SELECT concat_ws(' ', slice_id, request_keys, rows_deleted, rows_arrived, failures) FROM lethe.slice_receipts";
    assert_eq!(text(receipts).await, ["1 {1,2} {14,0} {1,NULL} {NULL,NULL}"], "with a place for each member");
    assert_eq!(text("SELECT rows_deleted::text FROM lethe.erasure_receipts").await, ["14"]);
    let keys = "
        SELECT identity_type FROM subject_data.profile_identities
         WHERE by_sha256 = lethe.identity_key(identity_type, lethe.identity_sha256(identity_type, identity_value))
           AND by_sha1 = lethe.identity_key(identity_type, lethe.identity_sha1(identity_type, identity_value))
           AND by_md5 = lethe.identity_key(identity_type, lethe.identity_md5(identity_type, identity_value)) ORDER BY 1";
    assert_eq!(text(keys).await, ["email", "other"]);
    drop((session, db));
    servers::drop_database(&name).await;
}
