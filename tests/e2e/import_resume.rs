//! An import that ended early is gone on with, and doubles nothing (contract 8, ADR 0038).

use lethe_domain::request::ControllerId;
use lethe_stores::import::{EventBatchLine, ImportError, LineEnd, Progress, event_batches_of_file, known};
use lethe_testing::World;
use lethe_testing::cli::{json, lethe, start, write};
use lethe_testing::wait::{eventually, seconds};
use serde_json::json;

/// The statement that stores this line of event batches waits while the advisory lock 42 is held elsewhere.
async fn gate_at(world: &World, n: i64) {
    world
        .run(&format!(
            "CREATE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF (NEW.body ->> 'n')::bigint = {n} THEN PERFORM pg_advisory_xact_lock(42); END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER gate BEFORE INSERT ON subject_data.event_batches_p1 FOR EACH ROW EXECUTE FUNCTION public.gate()"
        ))
        .await;
}

/// Closes it, until the end of the transaction.
async fn gate(world: &World) -> lethe_db::Tx {
    let gate = world.db.begin("gate").await.unwrap();
    gate.batch_execute("SELECT pg_advisory_xact_lock(42)").await.unwrap();
    gate
}

async fn waits_at_the_gate(world: &World) {
    let waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted)";
    eventually("the import stands at the gate", seconds(15), async || world.one(waiting, &[]).await).await;
}

fn batches(numbers: std::ops::RangeInclusive<i64>) -> String {
    let lines: Vec<String> = numbers.map(|n| format!("{{\"mpid\":7,\"n\":{n}}}\n")).collect();
    lines.concat()
}

/// How many event batches there are, and how many different ones.
async fn counted(world: &World) -> (i64, i64) {
    let count = |what: &str| format!("SELECT count({what}) FROM subject_data.event_batches");
    (world.one(&count("*"), &[]).await, world.one(&count("DISTINCT body ->> 'n'"), &[]).await)
}

const SMALL_GROUPS: [&str; 2] = ["--group", "100"];

#[tokio::test]
async fn an_import_that_is_killed_or_interrupted_is_gone_on_with_and_doubles_nothing() {
    let world = World::new().await;
    world.controller("acme").await;
    gate_at(&world, 450).await;
    let file = write(&world, "batches.jsonl", batches(1..=1_000));
    let import = [&["import", "event-batches", file.as_str(), "--controller", "acme"][..], &SMALL_GROUPS].concat();

    let gate = gate(&world).await;
    let mut killed = start(&world, &import);
    waits_at_the_gate(&world).await;
    killed.start_kill().unwrap();
    killed.wait().await.unwrap();
    gate.rollback().await;
    let sessions = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'lethe')";
    eventually("PostgreSQL sees that it is gone", seconds(10), async || world.one(sessions, &[]).await).await;
    assert_eq!(counted(&world).await, (400, 400), "the group that was under way is not there");
    let gate = self::gate(&world).await;

    // A second run, by Ctrl-C: the group under way is finished and the last line named.
    let interrupted = start(&world, &[&import[..], &["--resume"]].concat());
    waits_at_the_gate(&world).await;
    let pid = interrupted.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    gate.rollback().await;
    let output = interrupted.wait_with_output().await.unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    let (stored, different) = counted(&world).await;
    assert!((500..1_000).contains(&stored) && stored == different, "{stored} {different}");
    assert_eq!(output.status.code(), Some(1));
    for part in ["interrupted", &format!("the lines up to {stored} are stored"), &format!("--from-line {}", stored + 1)]
    {
        assert!(error.contains(part), "{part}: {error}");
    }

    let summary = json(&world, &[&import[..], &["--resume"]].concat()).await;
    assert_eq!((&summary["resumed_after_line"], &summary["lines"]), (&json!(stored), &json!(1_000 - stored)));
    assert_eq!(counted(&world).await, (1_000, 1_000));
    let summary = json(&world, &[&import[..], &["--resume"]].concat()).await;
    assert_eq!((&summary["lines"], counted(&world).await), (&json!(0), (1_000, 1_000)));
    // Packed it is the same file, and one that has grown goes on as well.
    write(&world, "batches.jsonl", batches(1..=1_100));
    assert!(std::process::Command::new("gzip").args(["-f", &file]).status().unwrap().success());
    let packed = format!("{file}.gz");
    let grown = json(&world, &["import", "event-batches", &packed, "--controller", "acme", "--resume"]).await;
    assert_eq!((&grown["lines"], counted(&world).await), (&json!(100), (1_100, 1_100)));
}

/// With `--resume` the import stops, says why, and stores nothing.
async fn nothing_is_known(world: &World, import: &[&str]) {
    let before = counted(world).await;
    let ran = lethe(world, &[import, &["--resume"]].concat()).await;
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    assert!(ran.err.contains("is not known") && ran.err.contains("omit --resume"), "{}", ran.err);
    assert_eq!(counted(world).await, before);
}

#[tokio::test]
async fn a_file_that_is_not_recognised_is_not_begun_anew() {
    let world = World::new().await;
    world.controller("acme").await;
    let file = write(&world, "batches.jsonl", batches(1..=30));
    let import = ["import", "event-batches", file.as_str(), "--controller", "acme"];
    nothing_is_known(&world, &import).await;
    assert_eq!(json(&world, &import).await["lines"], 30);
    // A line that is stored was changed: what the database has is not in the file any more.
    write(&world, "batches.jsonl", batches(1..=40).replace("\"n\":5}", "\"n\":500}"));
    nothing_is_known(&world, &import).await;
    assert_eq!(counted(&world).await, (30, 30));
}

#[tokio::test]
async fn a_run_that_was_told_where_to_begin_takes_the_place_of_an_earlier_one() {
    let world = World::new().await;
    world.controller("acme").await;
    let broken = batches(1..=30).replace("{\"mpid\":7,\"n\":11}", "{}").replace("{\"mpid\":7,\"n\":21}", "{}");
    let file = write(&world, "batches.jsonl", &broken);
    let import = ["import", "event-batches", file.as_str(), "--controller", "acme"];
    assert_eq!(lethe(&world, &import).await.code, Some(1));
    assert_eq!(lethe(&world, &[&import[..], &["--from-line", "12"]].concat()).await.code, Some(1));
    assert_eq!(counted(&world).await, (19, 19), "up to 10, and from 12 to 20");
    // Line 11 is mended as well, which the second run has passed over: its record does not know the file any more, and by
    // that of the first one the lines from 12 on would come again.
    write(&world, "batches.jsonl", batches(1..=30));
    nothing_is_known(&world, &import).await;
    assert_eq!(json(&world, &[&import[..], &["--from-line", "21"]].concat()).await["lines"], 10);
    assert_eq!(json(&world, &[&import[..], &["--resume"]].concat()).await["lines"], 0);
    assert_eq!(counted(&world).await, (29, 29));
}

#[tokio::test]
async fn a_file_that_was_mended_is_gone_on_with_at_the_line() {
    let world = World::new().await;
    let acme: ControllerId = world.controller("acme").await;
    world.controller("other").await;
    let good = batches(1..=300);
    let bad = good.replace("{\"mpid\":7,\"n\":250}", "{\"n\":250}");
    let file = write(&world, "batches.jsonl", bad);
    let import = [&["import", "event-batches", file.as_str(), "--controller", "acme"][..], &SMALL_GROUPS].concat();
    let ran = lethe(&world, &import).await;
    assert!(
        ran.err.contains("line 250 of")
            && ran.err.contains("mpid is required")
            && ran.err.contains("--from-line 250 (or --resume)"),
        "{}",
        ran.err
    );
    assert_eq!(world.rows_of(&acme, 7).await.2, 249);
    std::fs::write(&file, &good).unwrap();
    let resumed = [&import[..], &["--resume"]].concat();
    assert_eq!(json(&world, &resumed).await["resumed_after_line"], 249);
    assert_eq!(counted(&world).await, (300, 300));
    // Another controller's import of the same file is another import.
    let theirs = ["import", "event-batches", file.as_str(), "--controller", "other"];
    nothing_is_known(&world, &theirs).await;
    let theirs = json(&world, &theirs).await;
    assert_eq!((&theirs["lines"], &theirs["batches_without_profile"]), (&json!(300), &json!(300)));
    let both = lethe(&world, &[&resumed[..], &["--from-line", "3"]].concat()).await;
    assert_eq!(both.code, Some(64), "one or the other: {}", both.err);
}

#[tokio::test]
async fn two_runs_that_go_on_at_once_cannot_store_the_same_lines() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let line = |n: i64| EventBatchLine::parse(&json!({"mpid": 7, "n": n}).to_string()).unwrap();
    let end = |number: u64| LineEnd { number, bytes: number * 10, sha256: vec![7; 32] };
    let mut first = Progress::default();
    event_batches_of_file(&world.db, &acme, &[line(1)], &end(1), &mut first).await.unwrap();
    let mut second = known(&world.db, &acme).await.unwrap().pop().expect("the run is recorded");
    event_batches_of_file(&world.db, &acme, &[line(2)], &end(2), &mut first).await.unwrap();
    let refused = event_batches_of_file(&world.db, &acme, &[line(2)], &end(2), &mut second).await;
    assert!(matches!(refused, Err(ImportError::Overtaken)), "{refused:?}");
    assert_eq!(counted(&world).await, (2, 2));
    // A record is not kept for ever.
    world.run("UPDATE lethe.import_progress SET stored_at = stored_at - interval '91 days'").await;
    assert!(known(&world.db, &acme).await.unwrap().is_empty());
    assert_eq!(world.one::<i64>("SELECT count(*) FROM lethe.import_progress", &[]).await, 0);
}
