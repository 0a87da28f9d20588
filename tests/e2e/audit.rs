//! The audit trail: what is on it, that it is sealed within seconds, and that every change of it is found and named.

use jiff::SignedDuration;
use lethe_audit::trail::{self, Report};
use lethe_audit::{Problem, Trust};
use lethe_db::Tx;
use lethe_testing::cli::{json, lethe, write};
use lethe_testing::wait::{becomes, eventually, seconds, stays};
use lethe_testing::{Publisher, Receiver, Reply, Request, SECONDS, Worker, World, seconds_with};
use tokio_postgres::error::SqlState;

/// Waits until nothing is left to be sealed.
pub(crate) async fn all_is_sealed(world: &World) {
    becomes("entries that are not sealed", seconds(20), 0, async || unsealed(world).await).await;
}

async fn unsealed(world: &World) -> i64 {
    world.one("SELECT count(*) FROM lethe.audit_unsealed", &[]).await
}

fn trust(world: &World) -> Trust {
    Trust::read([&world.files.certificate]).unwrap()
}

/// Adds `count` entries to the chain of a controller, or to the processor's own.
async fn add(world: &World, controller: Option<&str>, count: i32) {
    let sql = "INSERT INTO lethe.audit_entries (controller_id, request_key, event, details)
               SELECT $1, n, 'test.noted', jsonb_build_object('n', n, 'text', E'a \\u00e9 \"b\"') FROM generate_series(1, $2) n";
    world.db.session().await.unwrap().raw().execute(sql, &[&controller, &count]).await.unwrap();
}

#[tokio::test]
async fn every_step_is_on_the_trail_and_the_trail_is_sealed() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    let receiver = Receiver::start().await;
    receiver.script("/gone", [Reply::Status(500)]);
    // A cancellation that overtakes its request is remembered for one waiting period.
    let settings = seconds_with(&[
        ("LETHE_ERASURE_WAITING_PERIOD", "3s"),
        ("LETHE_CALLBACK_GIVE_UP", "300ms"),
        ("LETHE_RESULT_LIFETIME", "2s"),
    ]);
    let _fleet = Worker::fleet(&world, &settings).await;
    let publisher = Publisher::connect(&world).await;
    let erasure = Request::erasure("ada@example.com").callback(&receiver.url("/gone"));
    let access = Request::access("ada@example.com");
    let cancelled = Request::erasure("ada@example.com");
    publisher.cancel("acme", &cancelled.id).await;
    for request in [&erasure, &access, &cancelled] {
        publisher.request("acme", request).await;
    }
    // The same again is on the trail once.
    publisher.request("acme", &erasure).await;
    let of = async |id: &str| -> Vec<String> {
        let sql = "SELECT event FROM lethe.audit_entries
                    WHERE details->>'subject_request_id' = $1 OR strpos(requests::text, $1) > 0 ORDER BY entry_id";
        world.all(sql, &[&id]).await
    };
    let exhausted = "callback.exhausted";
    becomes("the life of an erasure", seconds(30), 6, async || of(&erasure.id).await.len()).await;
    let mut events = of(&erasure.id).await;
    assert_eq!(events.iter().filter(|one| *one == exhausted).count(), 3, "one for each status: {events:?}");
    events.retain(|one| one != exhausted);
    assert_eq!(events, ["requests.received", "requests.released", "requests.completed"]);
    let life = ["requests.received", "requests.released", "result.written", "requests.completed", "result.expired"];
    becomes("the life of an access", seconds(30), life.map(str::to_owned).to_vec(), async || of(&access.id).await)
        .await;
    assert_eq!(of(&cancelled.id).await, ["requests.received", "requests.cancelled"]);
    json(&world, &["controller", "rotate-secret", "acme"]).await;
    let of_controller = "SELECT event FROM lethe.audit_entries WHERE event LIKE 'controller.%' ORDER BY entry_id";
    assert_eq!(world.all::<String>(of_controller, &[]).await, ["controller.added", "controller.secret_rotated"]);
    for event in ["batch.closed", "batch.released", "batch.completed", "calendar.stored"] {
        let found: bool =
            world.one("SELECT EXISTS (SELECT FROM lethe.audit_entries WHERE event = $1)", &[&event]).await;
        assert!(found, "{event}");
    }

    all_is_sealed(&world).await;
    let report = json(&world, &["audit", "verify"]).await;
    assert_eq!(report["findings"], serde_json::json!([]), "{report}");
    assert!(report["entries"].as_i64().unwrap() > 15 && report["chains"] == 2, "{report}");
    let exported = lethe(&world, &["audit", "export", "--controller", "acme"]).await;
    let file = write(&world, "trail.jsonl", &exported.out);
    // Who looks for a request finds it by itself, with what the receipt of its erasure says.
    let told: Vec<serde_json::Value> = exported.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_erasure =
        |line: &&serde_json::Value| line["request"]["details"]["subject_request_id"] == erasure.id.as_str();
    let events: Vec<&str> =
        told.iter().filter(of_erasure).map(|line| line["request"]["event"].as_str().unwrap()).collect();
    assert_eq!(events, ["request.received", "request.released", "request.completed"]);
    let completed = &told.iter().rfind(of_erasure).unwrap()["request"]["details"];
    assert_eq!((&completed["profiles"], &completed["type"]), (&1.into(), &"erasure".into()), "{completed}");
    assert_eq!(completed["stores"][0]["rows_deleted"], 4, "{completed}");
    let report = json(&world, &["audit", "verify", "--file", &file]).await;
    let of_acme: i64 = world.one("SELECT count(*) FROM lethe.audit_seals WHERE chain = 'acme'", &[]).await;
    assert_eq!((&report["findings"], &report["entries"]), (&serde_json::json!([]), &of_acme.into()), "{report}");
}

#[tokio::test]
async fn the_trail_can_only_grow() {
    let world = World::new().await;
    add(&world, None, 1).await;
    for change in [
        "UPDATE lethe.audit_entries SET event = 'x.y'",
        "DELETE FROM lethe.audit_entries",
        "TRUNCATE lethe.audit_entries",
        "UPDATE lethe.audit_seals SET position = 2",
        "DELETE FROM lethe.audit_seals",
        "TRUNCATE lethe.audit_seals",
    ] {
        let refused = world.db.session().await.unwrap().batch_execute(change).await.unwrap_err();
        assert_eq!(refused.code().map(SqlState::code), Some("LT003"), "{change}");
    }
}

/// Does something to the trail that its triggers would refuse, verifies, and takes it back.
async fn after(world: &World, tampering: &str) -> Report {
    let tx = world.db.begin("tamper").await.unwrap();
    let free =
        "ALTER TABLE lethe.audit_entries DISABLE TRIGGER USER; ALTER TABLE lethe.audit_seals DISABLE TRIGGER USER;
                SET CONSTRAINTS ALL DEFERRED;";
    tx.batch_execute(&format!("{free}{tampering}")).await.unwrap_or_else(|error| panic!("{tampering}: {error}"));
    let report = trail::verify(&tx, trust(world), None).await.unwrap();
    tx.rollback().await;
    report
}

/// Entries of two chains in several groups of the sealer, all sealed; nobody works on them any more.
async fn a_sealed_world() -> World {
    let world = World::new().await;
    world.controller("acme").await;
    world.controller("zeta").await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    for _ in 0..3 {
        world
            .run(
                r#"INSERT INTO lethe.audit_entries (controller_id, event, details, requests)
                   VALUES ('acme', 'requests.noted', '{"columns":["subject_request_id"]}', '[["a"], ["b"], ["c"]]')"#,
            )
            .await;
        add(&world, Some("acme"), 3).await;
        add(&world, Some("zeta"), 2).await;
        add(&world, None, 1).await;
        all_is_sealed(&world).await;
    }
    scheduler.stop().await;
    world
}

#[tokio::test]
async fn whatever_is_changed_removed_or_moved_is_found_and_named() {
    let world = a_sealed_world().await;
    let clean = after(&world, "").await;
    assert_eq!((clean.findings.len(), clean.unsealed, clean.chains), (0, 0, 3), "{:?}", clean.findings);
    let entry = async |position: i64| -> i64 {
        world.one("SELECT entry_id FROM lethe.audit_seals WHERE chain = 'acme' AND position = $1", &[&position]).await
    };
    let (fifth, sixth, last) = (entry(5).await, entry(6).await, entry(13).await);
    let at = |position, entry_id, problem| (Some(position), entry_id, problem);
    let set = |what: &str| format!("UPDATE lethe.audit_entries SET {what} WHERE entry_id = {fifth}");
    let set_of = |lines: &str| format!("UPDATE lethe.audit_entries SET requests = {lines} WHERE entry_id = {sixth}");
    let swap = |columns: &str, mixed: &str| {
        format!(
            "CREATE TEMP TABLE two ON COMMIT DROP AS SELECT * FROM lethe.audit_seals WHERE chain = 'acme' AND position IN (5, 6);
             DELETE FROM lethe.audit_seals WHERE entry_id IN ({fifth}, {sixth});
             INSERT INTO lethe.audit_seals ({columns}) SELECT {mixed} FROM two"
        )
    };
    let cases = [
        (set("details = (details::jsonb || '{\"n\": 99}')::json"), at(5, Some(fifth), Problem::Changed)),
        (set("details = '{}'"), at(5, Some(fifth), Problem::Changed)),
        (set("event = 'test.denied'"), at(5, Some(fifth), Problem::Changed)),
        (set("recorded_at = recorded_at + interval '1 microsecond'"), at(5, Some(fifth), Problem::Changed)),
        (set("request_key = NULL"), at(5, Some(fifth), Problem::Changed)),
        (set("controller_id = 'zeta'"), at(5, Some(fifth), Problem::Misplaced)),
        (set_of("'[[\"a\"], [\"x\"], [\"c\"]]'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("'[[\"a\"], [\"b\"]]'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("'[[\"a\"], [\"b\"], [\"c\"], [\"c\"]]'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("'[[\"b\"], [\"a\"], [\"c\"]]'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("'[]'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("'{}'"), at(6, Some(sixth), Problem::Changed)),
        (set_of("NULL"), at(6, Some(sixth), Problem::Changed)),
        (format!("DELETE FROM lethe.audit_entries WHERE entry_id = {fifth}"), at(5, Some(fifth), Problem::Removed)),
        (
            format!("DELETE FROM lethe.audit_entries WHERE entry_id = {fifth}; DELETE FROM lethe.audit_seals WHERE entry_id = {fifth}"),
            at(6, None, Problem::Missing { from: 5 }),
        ),
        // Two change places: their entries alone, or with their digests.
        (
            swap("chain, position, entry_id, lines, digest", "chain, 11 - position, entry_id, lines, (SELECT digest FROM two o WHERE o.position = 11 - two.position)"),
            at(5, Some(sixth), Problem::Changed),
        ),
        (swap("chain, position, entry_id, lines, digest", "chain, 11 - position, entry_id, lines, digest"), at(5, Some(sixth), Problem::Changed)),
        (
            format!("DELETE FROM lethe.audit_entries WHERE entry_id = {last}; DELETE FROM lethe.audit_seals WHERE entry_id = {last}"),
            at(13, None, Problem::Truncated { ends_at: 12 }),
        ),
        ("DELETE FROM lethe.audit_heads WHERE chain = 'acme'".to_owned(), (None, None, Problem::NoHead)),
        ("UPDATE lethe.audit_heads SET position = 12 WHERE chain = 'acme'".to_owned(), at(12, None, Problem::ForgedHead)),
        (
            "UPDATE lethe.audit_heads h SET position = s.position, digest = s.digest, signature = s.signature, signed_at = s.signed_at
               FROM lethe.audit_seals s WHERE h.chain = 'acme' AND s.chain = 'acme' AND s.position = 9".to_owned(),
            at(10, None, Problem::Unsigned),
        ),
        (
            "DELETE FROM lethe.audit_entries WHERE controller_id = 'acme'; DELETE FROM lethe.audit_seals WHERE chain = 'acme';
             DELETE FROM lethe.audit_heads WHERE chain = 'acme'".to_owned(),
            (None, None, Problem::NoTrail),
        ),
    ];
    for (tampering, wanted) in cases {
        let report = after(&world, &tampering).await;
        let found: Vec<_> =
            report.findings.iter().map(|one| (one.position, one.entry_id, one.problem.clone())).collect();
        assert_eq!(found, [wanted], "{tampering}");
        assert_eq!(report.findings[0].chain, "acme", "{tampering}");
    }
}

/// Changes an entry and recomputes every digest that follows, as whoever owns the database can.
async fn rewrite(tx: &Tx, position: i64) {
    tx.batch_execute(
        "ALTER TABLE lethe.audit_entries DISABLE TRIGGER USER; ALTER TABLE lethe.audit_seals DISABLE TRIGGER USER",
    )
    .await
    .unwrap();
    let sql = format!(
        "UPDATE lethe.audit_entries SET details = '{{}}'
          WHERE entry_id = (SELECT entry_id FROM lethe.audit_seals WHERE chain = 'acme' AND position = {position})"
    );
    tx.batch_execute(&sql).await.unwrap();
    let mut previous = lethe_domain::audit_chain::GENESIS;
    for row in lethe_db::audit::page(tx, ("", 0), Some("acme"), 100).await.unwrap() {
        previous = row.entry.unwrap().digest(&previous, row.head.position);
        let digest: &[u8] = &previous;
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&digest, &row.head.position];
        tx.raw()
            .execute("UPDATE lethe.audit_seals SET digest = $1 WHERE chain = 'acme' AND position = $2", &params)
            .await
            .unwrap();
    }
    let digest: &[u8] = &previous;
    tx.raw().execute("UPDATE lethe.audit_heads SET digest = $1 WHERE chain = 'acme'", &[&digest]).await.unwrap();
    tx.batch_execute(
        "ALTER TABLE lethe.audit_entries ENABLE TRIGGER USER; ALTER TABLE lethe.audit_seals ENABLE TRIGGER USER",
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn a_rewritten_chain_is_not_ours_and_is_not_continued() {
    let world = a_sealed_world().await;
    let tx = world.db.begin("tamper").await.unwrap();
    rewrite(&tx, 7).await;
    let report = trail::verify(&tx, trust(&world), None).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    let Problem::Forged { from } = report.findings[0].problem else { panic!("{:?}", report.findings) };
    let until = report.findings[0].position.unwrap();
    assert!(from <= 7 && (7..13).contains(&until), "the group in which it was rewritten: {from} to {until}");
    // A sealer that went on would sign it.
    add(&world, Some("acme"), 3).await;
    add(&world, Some("zeta"), 1).await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    eventually("it is noticed", seconds(10), async || scheduler.log().contains("is not ours")).await;
    becomes("the others go on", seconds(10), 3, async || unsealed(&world).await).await;
    stays("it is not continued", seconds(1), async || unsealed(&world).await == 3).await;
    let verified = lethe(&world, &["audit", "verify", "--output", "json"]).await;
    assert_eq!(verified.code, Some(1));
    let report: serde_json::Value = serde_json::from_str(&verified.out).unwrap();
    assert_eq!((&report["findings"][0]["problem"], &report["unsealed"]), (&"forged".into(), &3.into()), "{report}");
    let of_zeta = lethe(&world, &["audit", "verify", "--controller", "zeta"]).await;
    assert_eq!(of_zeta.code, Some(0), "{}{}", of_zeta.out, of_zeta.err);
}

/// Takes the last places of a chain away with their entries, and leaves what was signed at the end of the first group.
async fn cut_back(world: &World, chain: &str) {
    world
        .run(&format!(
            "BEGIN;
             ALTER TABLE lethe.audit_entries DISABLE TRIGGER USER; ALTER TABLE lethe.audit_seals DISABLE TRIGGER USER;
             WITH kept AS (
                 SELECT * FROM lethe.audit_seals WHERE chain = '{chain}' AND signature IS NOT NULL ORDER BY position LIMIT 1),
             gone AS (
                 DELETE FROM lethe.audit_seals s USING kept
                  WHERE s.chain = kept.chain AND s.position > kept.position RETURNING s.entry_id),
             entries AS (DELETE FROM lethe.audit_entries e USING gone WHERE e.entry_id = gone.entry_id)
             UPDATE lethe.audit_heads h
                SET position = kept.position, digest = kept.digest, signature = kept.signature, signed_at = kept.signed_at
               FROM kept WHERE h.chain = kept.chain;
             ALTER TABLE lethe.audit_entries ENABLE TRIGGER USER; ALTER TABLE lethe.audit_seals ENABLE TRIGGER USER;
             COMMIT"
        ))
        .await;
}

#[tokio::test]
async fn a_chain_that_a_failover_has_cut_back_goes_on_and_says_so() {
    let world = World::new().await;
    world.controller("acme").await;
    let scheduler = Worker::start(&world, "scheduler", &[]).await;
    for _ in 0..3 {
        add(&world, Some("acme"), 4).await;
        all_is_sealed(&world).await;
    }
    let end = async || world.one::<i64>("SELECT position FROM lethe.audit_heads WHERE chain = 'acme'", &[]).await;
    let before = end().await;
    // In the server that had more, somebody has taken it away.
    cut_back(&world, "acme").await;
    let after = end().await;
    assert!(after < before, "{after} of {before}");
    add(&world, Some("acme"), 1).await;
    eventually("it is noticed", seconds(10), async || scheduler.log().contains("is not ours")).await;
    assert_eq!(end().await, after, "it is not continued");
    // Another server may never have had it.
    let sessions = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name LIKE 'scheduler%'";
    assert!(world.one::<i64>(sessions, &[]).await > 0);
    eventually("it is continued", seconds(90), async || end().await > after).await;
    all_is_sealed(&world).await;
    let told = "SELECT details::jsonb - 'digest' - 'database_user' FROM lethe.audit_entries
                 WHERE controller_id = 'acme' AND event = 'trail.cut_back'";
    let told: serde_json::Value = world.one(told, &[]).await;
    assert_eq!(told, serde_json::json!({"from": before, "to": after}));
    let verified = lethe(&world, &["audit", "verify"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.out, verified.err);
    scheduler.stop().await;
}

#[tokio::test]
async fn the_tail_that_is_not_sealed_is_told_and_guarded() {
    let world = a_sealed_world().await;
    add(&world, Some("acme"), 3).await;
    let report = after(&world, "").await;
    assert_eq!((report.findings.len(), report.unsealed), (0, 3), "a tail is no finding");
    let newest = "(SELECT max(entry_id) FROM lethe.audit_entries)";
    let hidden = after(&world, &format!("DELETE FROM lethe.audit_unsealed WHERE entry_id = {newest}")).await;
    assert!(hidden.findings[0].problem == Problem::Unchained && hidden.findings.len() == 1, "{:?}", hidden.findings);
    let removed = after(&world, &format!("DELETE FROM lethe.audit_entries WHERE entry_id = {newest}")).await;
    assert!(removed.findings[0].problem == Problem::Vanished && removed.findings.len() == 1, "{:?}", removed.findings);
}

#[tokio::test]
async fn an_export_is_verified_without_the_database() {
    let world = a_sealed_world().await;
    let export = lethe(&world, &["audit", "export"]).await.out;
    let lines: Vec<&str> = export.lines().collect();
    let verify = async |text: String| {
        let file = write(&world, "trail.jsonl", text);
        lethe(&world, &["audit", "verify", "--file", &file]).await
    };
    let good = verify(export.clone()).await;
    assert_eq!(good.code, Some(0), "{}{}", good.out, good.err);
    for (index, line) in lines.iter().enumerate() {
        let rest = [&lines[..index], &lines[index + 1..]].concat().join("\n");
        assert_eq!(verify(rest).await.code, Some(1), "without line {index}: {line}");
    }
    let changed = verify(export.replacen("\"n\": 2", "\"n\": 3", 1)).await;
    assert_eq!(changed.code, Some(1));
    assert!(changed.out.contains("was changed"), "{}", changed.out);
}

#[tokio::test]
async fn two_schedulers_and_late_commits_make_one_chain() {
    let world = World::new().await;
    world.controller("acme").await;
    let first = Worker::start(&world, "scheduler", SECONDS).await;
    let second = Worker::start(&world, "scheduler", SECONDS).await;
    // An entry with an early number that commits late.
    let late = world.db.begin("late").await.unwrap();
    late.batch_execute("INSERT INTO lethe.audit_entries (controller_id, event) VALUES ('acme', 'test.late')")
        .await
        .unwrap();
    let writers: Vec<_> = (0..4)
        .map(|_| {
            let db = world.db.clone();
            tokio::spawn(async move {
                for _ in 0..50 {
                    let tx = db.begin("write").await.unwrap();
                    tx.batch_execute(
                        "INSERT INTO lethe.audit_entries (controller_id, event) VALUES ('acme', 'test.noted')",
                    )
                    .await
                    .unwrap();
                    tokio::task::yield_now().await;
                    tx.commit().await.unwrap();
                }
            })
        })
        .collect();
    let sealed = async || world.one::<i64>("SELECT count(*) FROM lethe.audit_seals WHERE chain = 'acme'", &[]).await;
    eventually("sealing is under way", seconds(20), async || sealed().await > 20).await;
    // Whichever leads; the lease of a dead one lasts, and the clock does not wait for it.
    first.kill().await;
    world.set_clock(world.now().await + SignedDuration::from_secs(16)).await;
    for writer in writers {
        writer.await.unwrap();
    }
    becomes("sealed entries", seconds(20), 201, sealed).await;
    late.commit().await.unwrap();
    becomes("the late one as well", seconds(20), 202, sealed).await;
    let last = "SELECT e.event FROM lethe.audit_seals s JOIN lethe.audit_entries e USING (entry_id)
                 WHERE s.chain = 'acme' ORDER BY s.position DESC LIMIT 1";
    assert_eq!(world.one::<String>(last, &[]).await, "test.late");
    second.stop().await;
    let report = after(&world, "").await;
    assert_eq!(report.findings.len(), 0, "{:?}", report.findings);
}
