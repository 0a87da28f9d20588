//! Years of data, made in SQL: requests that have ended, with batches, callbacks and endpoints, as the workers would have left
//! them.

use lethe::request::ControllerId;

use crate::world::World;

/// What is made.
#[derive(Clone, Copy, Debug)]
pub struct History {
    /// Requests that are completed, each with three delivered callbacks.
    pub requests: u32,
    /// Batches that they are spread over.
    pub batches: u32,
    /// Endpoints that their callbacks are spread over.
    pub endpoints: u32,
}

/// The statements that make a history, one after the other; a placeholder for each number, in the order of the fields, and one
/// for the controller. Purged long ago: no sealed request, no profiles.
const STATEMENTS: [&str; 8] = [
    "INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
     SELECT '30 12 * * MON', '30 12 * * *', '5 0 * * MON,THU', '7 days', '2 days'
      WHERE NOT EXISTS (SELECT FROM lethe.calendars) AND {requests} + {batches} + {endpoints} >= 0 AND '{controller}' <> ''",
    "INSERT INTO lethe.endpoints (controller_id, scheme, host, port)
     SELECT '{controller}', 'https', 'host-' || n || '.example.com', 443 FROM generate_series(1, {endpoints}) AS n
     ON CONFLICT DO NOTHING",
    "INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state, closed_at, released_at, completed_at)
     SELECT 'erasure', t, t, (SELECT max(version) FROM lethe.calendars), 'completed', t, t, t
       FROM generate_series(1, {batches}) AS n, LATERAL (SELECT lethe.now() - interval '40 days' - n * interval '1 hour' AS t) at",
    "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status, lane,
                                 batch_id, content_digest, submitted_time, received_at, expected_completion_time)
     SELECT '{controller}', gen_random_uuid(), '3.0', 'gdpr', 'erasure', 'pending', 'erasure', b.batch_id,
            sha256(n::text::bytea), b.tick_at, b.tick_at, b.tick_at
       FROM generate_series(0, {requests} - 1) AS n
       JOIN (SELECT batch_id, tick_at, row_number() OVER (ORDER BY batch_id DESC) - 1 AS place FROM lethe.batches
              WHERE state = 'completed' ORDER BY batch_id DESC LIMIT {batches}) b ON b.place = n % {batches}",
    "INSERT INTO lethe.slices (batch_id, controller_id, stage, state, request_count, mpid_count, completed_at, first_request,
                               last_request)
     SELECT batch_id, '{controller}', 'erasure', 'completed', count(*), count(*), lethe.now(), min(request_key),
            max(request_key)
       FROM lethe.requests WHERE status = 'pending' AND controller_id = '{controller}'
        AND batch_id IN (SELECT batch_id FROM lethe.batches WHERE state = 'completed') GROUP BY batch_id",
    "UPDATE lethe.requests r SET status = 'in_progress', in_progress_at = s.completed_at, slice_id = s.slice_id
       FROM lethe.slices s WHERE s.batch_id = r.batch_id AND r.status = 'pending' AND s.state = 'completed'
        AND r.request_key BETWEEN s.first_request AND s.last_request",
    "UPDATE lethe.requests r
        SET status = 'completed', completed_at = b.runs_at + interval '1 minute', purged_at = b.runs_at + interval '1 minute'
       FROM lethe.batches b WHERE b.batch_id = r.batch_id AND r.status = 'in_progress' AND b.state = 'completed'",
    "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                  expected_completion_time, state, attempts, next_attempt_at, created_at, finished_at)
     SELECT gen_random_uuid(), r.request_key, 0, s.n, e.first + r.request_key % e.count,
            (ARRAY['pending', 'in_progress', 'completed'])[s.n + 1], r.expected_completion_time, 'delivered', 1,
            r.completed_at, r.completed_at, r.completed_at
       FROM lethe.requests r, generate_series(0, 2) AS s (n),
            (SELECT min(endpoint_id) AS first, count(*) FROM lethe.endpoints WHERE controller_id = '{controller}') e
      WHERE r.status = 'completed' AND r.controller_id = '{controller}'
        AND NOT EXISTS (SELECT FROM lethe.callbacks c WHERE c.request_key = r.request_key)",
];

impl History {
    /// Makes it, for one controller, and lets PostgreSQL look at what it has.
    pub async fn make(self, world: &World, controller: &ControllerId) {
        let session = world.db.session().await.unwrap();
        session.batch_execute("SET statement_timeout = 0; SET synchronous_commit = off").await.unwrap();
        for statement in STATEMENTS {
            let statement = statement
                .replace("{requests}", &self.requests.to_string())
                .replace("{batches}", &self.batches.to_string())
                .replace("{endpoints}", &self.endpoints.to_string())
                .replace("{controller}", controller.as_str());
            session.batch_execute(&statement).await.unwrap();
        }
        session.batch_execute("VACUUM (ANALYZE) lethe.requests, lethe.callbacks, lethe.endpoints").await.unwrap();
        session.batch_execute("ANALYZE; RESET statement_timeout; RESET synchronous_commit").await.unwrap();
    }
}
