//! Requests enter the audit trail in sets: each change once, and an export tells of single requests what follows from the sets.

use lethe_testing::cli::{json, lethe, write};
use lethe_testing::{Worker, World};
use tokio_postgres::error::SqlState;

use crate::audit::all_is_sealed;

/// Requests of controllers, pending, in a batch that runs some time.
async fn pending(world: &World, controller: &str, count: i32) {
    let sql = "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, batch_id,
                                           content_digest, submitted_time, received_at, expected_completion_time)
               SELECT $1, gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', 1 + n % 2, sha256('x'), now(), now(), now()
                 FROM generate_series(1, $2) n";
    world.db.session().await.unwrap().raw().execute(sql, &[&controller, &count]).await.unwrap();
}

#[tokio::test]
async fn each_change_of_a_status_of_each_request_is_in_exactly_one_line_whatever_the_statements() {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("zeta").await;
    pending(&world, "acme", 4_100).await;
    pending(&world, "zeta", 7).await;
    for change in [
        // Those of both controllers, of several slices, and some that change in nothing that the trail tells of.
        "UPDATE lethe.requests SET status = 'in_progress', in_progress_at = now(), slice_id = 1 + request_key % 3
          WHERE request_key % 5 <> 0",
        "UPDATE lethe.requests SET status = 'cancelled', cancelled_at = now() WHERE request_key % 10 = 0",
        "UPDATE lethe.requests SET submitted_time = now()",
        // One statement that does two things.
        "UPDATE lethe.requests SET status = CASE WHEN status = 'pending' THEN 'cancelled' ELSE 'completed' END
          WHERE request_key % 7 = 0 AND status IN ('pending', 'in_progress')",
        "UPDATE lethe.requests SET status = 'completed' WHERE status = 'in_progress' AND request_key < 3000",
    ] {
        world.run(change).await;
    }
    world
        .run(
            "CREATE VIEW public.lines AS
             SELECT e.entry_id, e.controller_id, e.event, e.details, q.place, (q.line->>0)::uuid AS subject_request_id
               FROM lethe.audit_entries e CROSS JOIN json_array_elements(e.requests) WITH ORDINALITY AS q (line, place)",
        )
        .await;
    let lives = "SELECT DISTINCT life || ' ' || r.status
                   FROM lethe.requests r
                   JOIN (SELECT controller_id, subject_request_id, string_agg(event, ' ' ORDER BY entry_id) AS life
                           FROM lines GROUP BY 1, 2) told USING (controller_id, subject_request_id) ORDER BY 1";
    let wanted = [
        "requests.received pending",
        "requests.received requests.cancelled cancelled",
        "requests.received requests.released in_progress",
        "requests.received requests.released requests.completed completed",
    ];
    assert_eq!(world.all::<String>(lives, &[]).await, wanted);
    let untold = "SELECT count(*) FROM lethe.requests r WHERE NOT EXISTS (
                      SELECT FROM lines l WHERE l.subject_request_id = r.subject_request_id)";
    assert_eq!(world.one::<i64>(untold, &[]).await, 0);
    let longest = "SELECT max(json_array_length(requests)) FROM lethe.audit_entries";
    assert_eq!(world.one::<i32>(longest, &[]).await, 2_000, "a set is bounded");
    let mixed = "SELECT count(*) FROM lines l JOIN lethe.requests r USING (subject_request_id)
                  WHERE r.controller_id <> l.controller_id
                     OR l.event IN ('requests.released', 'requests.completed')
                        AND (l.details->>'slice_id')::bigint IS DISTINCT FROM r.slice_id";
    assert_eq!(world.one::<i64>(mixed, &[]).await, 0, "of one controller and one slice");
    let out_of_order = "SELECT count(*) FROM (
                            SELECT request_key < lag(request_key) OVER (PARTITION BY entry_id ORDER BY place) AS is_wrong
                              FROM lines JOIN lethe.requests USING (subject_request_id)) q WHERE is_wrong";
    assert_eq!(world.one::<i64>(out_of_order, &[]).await, 0, "in the order of the keys");

    // Nobody slips out of the comparison of before and after.
    let renamed = "UPDATE lethe.requests SET status = 'completed', request_key = DEFAULT WHERE status = 'pending'";
    let refused = world.db.session().await.unwrap().batch_execute(renamed).await.unwrap_err();
    assert_eq!(refused.code().map(SqlState::code), Some("LT002"));

    // More than the sealer takes at once.
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    all_is_sealed(&world).await;
    let exported = lethe(&world, &["audit", "export"]).await;
    let requests = exported.out.lines().filter(|line| line.starts_with(r#"{"request""#)).count();
    let in_sets = "SELECT sum(json_array_length(requests)) FROM lethe.audit_entries";
    assert_eq!(i64::try_from(requests).unwrap(), world.one::<i64>(in_sets, &[]).await);
    let file = write(&world, "trail.jsonl", &exported.out);
    let report = json(&world, &["audit", "verify", "--file", &file]).await;
    assert_eq!(report["findings"], serde_json::json!([]), "{report}");
    changed_lines(&world, &exported.out).await;
}

/// The trigger compares the rows before and after a statement, by a plan that is kept from the first one.
#[tokio::test]
async fn a_statement_with_many_requests_is_no_square_after_one_with_a_single_one() {
    let world = World::new().await;
    world.controller("acme").await;
    pending(&world, "acme", 20_000).await;
    let session = world.db.session().await.unwrap();
    // The square of 20,000 takes minutes.
    session.batch_execute("SET statement_timeout = '20s'").await.unwrap();
    for requests in ["request_key = 1", "request_key > 1"] {
        let change = format!("UPDATE lethe.requests SET status = 'in_progress', slice_id = 1 WHERE {requests}");
        session.batch_execute(&change).await.unwrap();
    }
    assert_eq!(world.told("requests.released").await, 20_000);
}

/// The first line of a kind with a time that is finer than what is signed.
fn finer(lines: &[&str], kind: &str, time: &str) -> String {
    let at = lines.iter().position(|line| line.starts_with(kind)).unwrap();
    let key = format!("\"{time}\":\"");
    let begin = lines[at].find(&key).unwrap() + key.len();
    let end = begin + lines[at][begin..].find('"').unwrap();
    let old: jiff::Timestamp = lines[at][begin..end].parse().unwrap();
    let new = old + jiff::SignedDuration::from_nanos(1);
    let changed = format!("{}{new}{}", &lines[at][..begin], &lines[at][end..]);
    let mut lines = lines.to_vec();
    lines[at] = &changed;
    lines.join("\n") + "\n"
}

/// What an export tells of single requests is not believed: it must follow from the sets.
async fn changed_lines(world: &World, export: &str) {
    let lines: Vec<&str> = export.lines().collect();
    let first = lines.iter().position(|line| line.starts_with(r#"{"request""#)).unwrap();
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        change(&mut lines);
        lines.join("\n") + "\n"
    };
    let changes = [
        with(&|lines| drop(lines.remove(first))),
        with(&|lines| lines.swap(first, first + 1)),
        with(&|lines| lines.insert(first, lines[first].clone())),
        with(&|lines| lines[first] = lines[first].replace("erasure", "access")),
    ];
    // There is one way to write a line.
    let forms = [
        with(&|lines| lines[first] = lines[first].replace("{\"chain\"", "{\"chain\":\"x\",\"chain\"")),
        with(&|lines| lines[first] = lines[first].replace("{\"chain\"", "{\"note\":\"x\",\"chain\"")),
        with(&|lines| lines[first - 1] = lines[first - 1].replace(", [\"", ",  [\"")),
        with(&|lines| lines[first] = lines[first].replace("\"line\":", "\"line\": ")),
        // Digests and signatures know microseconds.
        finer(&lines, r#"{"seal""#, "recorded_at"),
        finer(&lines, r#"{"head""#, "signed_at"),
    ];
    assert!(forms.iter().all(|changed| changed != export), "each is a change");
    for changed in forms {
        let file = write(world, "changed.jsonl", &changed);
        let verified = lethe(world, &["audit", "verify", "--file", &file]).await;
        assert_eq!(verified.code, Some(1), "{}{}", verified.out, verified.err);
    }
    for changed in changes {
        let file = write(world, "changed.jsonl", &changed);
        let verified = lethe(world, &["audit", "verify", "--output", "json", "--file", &file]).await;
        assert_eq!(verified.code, Some(1), "{}{}", verified.out, verified.err);
        let report: serde_json::Value = serde_json::from_str(&verified.out).unwrap();
        assert_eq!(report["findings"][0]["problem"], "unfolded", "{report}");
    }
}
