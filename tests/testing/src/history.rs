//! Years of data, made in SQL: requests that have ended, with batches, callbacks and endpoints, as the workers would have left
//! them.

use lethe_domain::request::ControllerId;

use crate::world::World;

/// What is made.
#[derive(Clone, Copy, Debug)]
pub struct History {
    /// Requests that are completed, each with three callbacks that are delivered; one in a thousand was given up.
    pub requests: u32,
    /// Batches that they are spread over.
    pub batches: u32,
    /// Endpoints that their callbacks are spread over.
    pub endpoints: u32,
}

/// The statements that make a history, one after the other. Without triggers: the trail would be several times as large as what is
/// asked about here, and as long in the making. What the triggers keep is made at the end. Everything was purged long ago.
const STATEMENTS: [&str; 9] = [
    "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
     SELECT '30 12 * * MON', '30 12 * * *', '5 0 * * MON,THU', '7 days', '2 days'
      WHERE NOT EXISTS (SELECT FROM lethe.calendars)",
    "INSERT INTO lethe.endpoints (controller_id, scheme, host, port)
     SELECT '{controller}', 'https', 'host-' || n || '.example.com', 443 FROM generate_series(1, {endpoints}) AS n
     ON CONFLICT DO NOTHING",
    // What is made before it, at a size that was smaller, is younger.
    "CREATE TEMPORARY TABLE made AS
     SELECT coalesce(max(batch_id), 0) AS last, least(min(tick_at), date_trunc('minute', now()) - interval '40 days') AS oldest
       FROM lethe.batches",
    "INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state, closed_at, released_at, completed_at)
     SELECT 'erasure', t, t, (SELECT max(version) FROM lethe.calendars), 'completed', t, t, t
       FROM generate_series(1, {batches}) AS n, made,
            LATERAL (SELECT made.oldest - n * interval '1 minute' AS t) at",
    "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status, lane, batch_id,
                                 content_digest, submitted_time, received_at, expected_completion_time, in_progress_at,
                                 completed_at)
     SELECT '{controller}', gen_random_uuid(), '3.0', 'gdpr', 'erasure', 'completed', 'erasure', b.batch_id,
            sha256(n::text::bytea), b.tick_at, b.tick_at, b.tick_at, b.tick_at, b.tick_at
       FROM generate_series(0, {requests} - 1) AS n
       JOIN (SELECT batch_id, tick_at, row_number() OVER (ORDER BY batch_id) - 1 AS place
               FROM lethe.batches, made WHERE batch_id > made.last) b ON b.place = n / (({requests} - 1) / {batches} + 1)
      ORDER BY n",
    "INSERT INTO lethe.slices (batch_id, controller_id, stage, state, request_count, mpid_count, completed_at, first_request,
                               last_request)
     SELECT batch_id, controller_id, 'erasure', 'completed', count(*), count(*), min(completed_at), min(request_key),
            max(request_key)
       FROM lethe.requests, made WHERE batch_id > made.last GROUP BY batch_id, controller_id, request_key / 250",
    "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                  expected_completion_time, state, attempts, next_attempt_at, created_at, finished_at)
     SELECT gen_random_uuid(), r.request_key, 0, s.n, e.first + r.request_key % e.count,
            (ARRAY['pending', 'in_progress', 'completed'])[s.n + 1], r.expected_completion_time,
            CASE WHEN r.request_key % 1000 = 0 THEN 'exhausted' ELSE 'delivered' END, 1, r.completed_at, r.completed_at,
            r.completed_at
       FROM made, lethe.requests r, generate_series(0, 2) AS s (n),
            (SELECT min(endpoint_id) AS first, count(*) FROM lethe.endpoints WHERE controller_id = '{controller}') e
      WHERE r.batch_id > made.last",
    "INSERT INTO lethe.request_deltas (batch_id, request_type, status, delta)
     SELECT batch_id, request_type, status, count(*) FROM lethe.requests, made WHERE batch_id > made.last GROUP BY 1, 2, 3",
    "INSERT INTO lethe.callback_deltas (state, delta)
     SELECT state, count(*) FROM lethe.callbacks JOIN lethe.requests USING (request_key), made
      WHERE batch_id > made.last GROUP BY 1",
];

impl History {
    /// Makes it, for one controller, and lets PostgreSQL look at what it has.
    pub async fn make(self, world: &World, controller: &ControllerId) {
        let session = world.db.session().await.unwrap();
        let quick = "SET statement_timeout = 0; SET synchronous_commit = off; SET session_replication_role = replica";
        session.batch_execute(quick).await.unwrap();
        for statement in STATEMENTS {
            let statement = statement
                .replace("{requests}", &self.requests.to_string())
                .replace("{batches}", &self.batches.to_string())
                .replace("{endpoints}", &self.endpoints.to_string())
                .replace("{controller}", controller.as_str());
            session.batch_execute(&statement).await.unwrap();
        }
        session.batch_execute("DROP TABLE made").await.unwrap();
        session.batch_execute("VACUUM (ANALYZE)").await.unwrap();
        let usual = "RESET statement_timeout; RESET synchronous_commit; RESET session_replication_role";
        session.batch_execute(usual).await.unwrap();
    }
}
