//! Profiles, identities and event batches, made in the database itself: ten million in minutes.

use lethe_domain::request::ControllerId;

use crate::bench::Bench;

/// Profiles of one controller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct People {
    /// Profiles; their mpids are 1, 2, 3, …
    pub(crate) profiles: u64,
    /// Event batches of each.
    pub(crate) event_batches: u64,
    /// Bytes of an event batch, about.
    pub(crate) bytes: u64,
}

/// The identities of a profile: types, and what stands before its number in their values.
pub(crate) const IDENTITIES: [(&str, &str, &str); 3] = [
    ("email", "person-", "@example.com"),
    ("controller_customer_id", "customer-", ""),
    ("ios_vendor_id", "5B1F6A70-0000-4000-8000-", ""),
];

/// The value of an identity of profile `number`.
pub(crate) fn identity(index: usize, number: u64) -> String {
    let (_, before, after) = IDENTITIES[index];
    format!("{before}{number}{after}")
}

/// Fills a new controller. The partitions are made anew without indexes, filled, and attached: PostgreSQL then builds
/// each index at once.
pub(crate) async fn fill(bench: &Bench, controller: &ControllerId, people: People) {
    let sql = "SELECT partition_no FROM lethe.controllers WHERE controller_id = $1";
    let number: i32 = bench.world.one(sql, &[controller]).await;
    let session = bench.world.db.session().await.unwrap();
    let settings = "SET statement_timeout = 0; SET maintenance_work_mem = '512MB'; SET synchronous_commit = off";
    session.batch_execute(settings).await.unwrap();
    let identities: Vec<String> =
        IDENTITIES.iter().map(|(kind, before, after)| format!("('{kind}', '{before}' || n || '{after}')")).collect();
    let People { profiles, event_batches, bytes } = people;
    let inserts = [
        ("profiles", format!("(controller_id, mpid, attributes) SELECT '{controller}', n, '{{\"city\":\"Ghent\"}}' FROM generate_series(1, {profiles}) n")),
        (
            "profile_identities",
            format!(
                "(controller_id, identity_type, identity_value, mpid)
                 SELECT '{controller}', kind, value, n FROM generate_series(1, {profiles}) n, LATERAL (VALUES {}) v (kind, value)",
                identities.join(", ")
            ),
        ),
        // Round after round, as event batches arrive: those of a profile lie scattered.
        (
            "event_batches",
            format!(
                "(controller_id, mpid, body)
                 SELECT '{controller}', n, {} FROM generate_series(1, {event_batches}) r, generate_series(1, {profiles}) n",
                body_of_a_batch(bytes)
            ),
        ),
    ];
    for (table, insert) in inserts {
        let child = format!("subject_data.{table}_p{number}");
        let fill = format!(
            "DROP TABLE {child};
             CREATE TABLE {child} (LIKE subject_data.{table} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS,
                                   CHECK (controller_id = '{controller}'));
             INSERT INTO {child} {insert};
             ALTER TABLE subject_data.{table} ATTACH PARTITION {child} FOR VALUES IN ('{controller}')"
        );
        session.batch_execute(&fill).await.unwrap();
        session.batch_execute(&format!("VACUUM ANALYZE {child}")).await.unwrap();
    }
    session
        .batch_execute("RESET statement_timeout; RESET maintenance_work_mem; RESET synchronous_commit")
        .await
        .unwrap();
}

/// An event batch as apps send them: some texts that recur, some that never do; about `bytes` long.
fn body_of_a_batch(bytes: u64) -> String {
    let event = r#"{"data":{"event_id":%s,"source_message_id":"%s","timestamp_unixtime_ms":17724429%s,"event_name":"Menu opened","custom_event_type":"navigation","custom_attributes":{"menu":"main"}},"event_type":"custom_event"}"#;
    let events = (bytes.saturating_sub(150) / 235).max(1);
    format!(
        "('{{\"mpid\":\"' || n || '\",\"events\":[' || (
             SELECT string_agg(format('{event}', n + r * e, md5((n * r * 31 + e)::text), 10000 + (n + e) % 89999), ',')
               FROM generate_series(1, {events}) e)
           || '],\"device_info\":{{\"platform\":\"iOS\",\"os_version\":\"17.4\",\"device_model\":\"iPhone15,2\"}},\"environment\":\"production\"}}')::json"
    )
}
