//! The command line repeats no value of a person: not on its outputs, not in its reports (guarantee 6).

use lethe_db::{Db, DbError};
use lethe_testing::cli::{Ran, json, lethe, write};
use lethe_testing::{Request, Worker, World, servers};
use serde_json::json;

const CANARY: &str = "canary";

fn check(what: &str, ran: &Ran) {
    assert!(!ran.out.contains(CANARY) && !ran.err.contains(CANARY), "{what}: {}{}", ran.out, ran.err);
}

/// Lines that cannot be taken, each with the canary where it fails.
const PROFILES: [&str; 16] = [
    r#"{"mpid":"canary"}"#,
    r#"{"mpid":{"canary":1}}"#,
    r#"{"canary":"canary"}"#,
    r#"{"canary":1,"canary":2}"#,
    r#"{"mpid":1,"identities":"canary"}"#,
    r#"{"mpid":1,"identities":{"canary@example.com":"canary"}}"#,
    r#"{"mpid":1,"identities":{"email":{"canary":"canary"}}}"#,
    r#"{"mpid":1,"identities":{"email":["canary",["canary"]]}}"#,
    r#"{"mpid":1,"identities":{"other":"canary\u0000"}}"#,
    r#"{"mpid":1,"identities":{"email":"canary","email":"canary"}}"#,
    r#"{"mpid":1,"attributes":{"canary":"\ud83d"}}"#,
    r#"{"mpid":1,"audiences":["canary",1e200000]}"#,
    r#"{"mpid":1,"attributes":{"canary":1,"canary":1}}"#,
    r#"{"mpid":1,"attributes":{"canary":canary}}"#,
    r#""canary""#,
    "[\"canary\"]",
];

#[tokio::test]
async fn the_import_names_lines_fields_and_rules_only() {
    let world = World::new().await;
    world.controller("acme").await;
    world.run("ALTER TABLE subject_data.profiles_p1 ADD CONSTRAINT small CHECK (mpid < 100)").await;
    world.run("ALTER TABLE subject_data.event_batches_p1 ADD CONSTRAINT small CHECK (mpid < 100)").await;
    let refused = r#"{"mpid":100,"identities":{"email":"canary@example.com"},"attributes":{"a":"canary"}}"#;
    for line in PROFILES.into_iter().chain([refused]) {
        let file = write(&world, "profiles.jsonl", line);
        let ran = lethe(&world, &["import", "profiles", &file, "--controller", "acme"]).await;
        assert!(ran.code == Some(1) && ran.err.contains("line 1 of"), "{line}: {}", ran.err);
        check(line, &ran);
    }
    let all = PROFILES.into_iter().chain([refused]).collect::<Vec<_>>();
    for (what, count) in [("profiles", all.len()), ("event-batches", 7)] {
        let file = write(&world, "lines.jsonl", all.join("\n"));
        let ran = lethe(&world, &["import", what, &file, "--controller", "acme", "--skip-invalid"]).await;
        check(what, &ran);
        let report = std::fs::read_to_string(format!("{file}.refused.jsonl")).unwrap();
        assert!(report.lines().count() >= count && !report.contains(CANARY), "{report}");
    }
    // A key may name a person as well: what is unknown is not repeated.
    let stored: i64 = world.one("SELECT count(*) FROM subject_data.profiles", &[]).await;
    assert_eq!(stored, 0);
}

#[tokio::test]
async fn what_a_function_raises_is_not_shown_whatever_its_code() {
    let world = World::new().await;
    for code in ["P0001", "45000", "LT999", "58030"] {
        let raise = format!("DO $$ BEGIN RAISE EXCEPTION 'canary' USING ERRCODE = '{code}'; END $$");
        let error = world.db.session().await.unwrap().batch_execute(&raise).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(code) && !shown.contains(CANARY), "{shown}");
    }
}

#[tokio::test]
async fn handing_in_a_request_repeats_nothing_of_it() {
    let world = World::new().await;
    world.controller("acme").await;
    let _scheduler = Worker::start(&world, "scheduler", &[]).await;
    let good = || Request::erasure("somebody@example.com");
    let odd = |field: &str| good().with(field, json!("canary")).bytes();
    let mut bodies: Vec<Vec<u8>> = [
        "subject_request_id",
        "subject_request_type",
        "submitted_time",
        "regulation",
        "api_version",
        "extensions",
        "subject_identities",
        "status_callback_urls",
        "skip_waiting_period",
    ]
    .map(odd)
    .to_vec();
    bodies.extend([
        good().with("group_id", json!("canary".repeat(50))).bytes(),
        good().callback("https://canary@example.com/").bytes(),
        Request::new("erasure").identity("canary", "canary").bytes(),
        Request::new("erasure").identity("email", "canary\u{200b}@example.com").bytes(),
        Request::new("erasure").encoded("email", "canary", "sha1").bytes(),
        Request::new("erasure").encoded("email", "x@example.com", "canary").bytes(),
        b"{\"canary\":1,\"canary\":2}".to_vec(),
        b"{\"canary\": canary}".to_vec(),
        b"canary\xff".to_vec(),
    ]);
    for body in bodies {
        let file = write(&world, "request.json", &body);
        let ran = lethe(&world, &["request", "submit", &file, "--controller", "acme"]).await;
        assert_ne!(ran.code, Some(0), "{}", String::from_utf8_lossy(&body));
        check(&String::from_utf8_lossy(&body), &ran);
    }
    // The database refuses, and says why in its own words.
    world
        .run(
            "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS
              $$ BEGIN RAISE EXCEPTION 'canary' USING DETAIL = 'canary', HINT = 'canary'; END $$;
             CREATE TRIGGER trap BEFORE INSERT ON lethe.requests FOR EACH ROW EXECUTE FUNCTION public.trap()",
        )
        .await;
    let file = write(&world, "request.json", good().bytes());
    let ran = lethe(&world, &["request", "submit", &file, "--controller", "acme"]).await;
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    check("a refusal of the database", &ran);
    world.run("DROP FUNCTION public.trap() CASCADE").await;
    json(&world, &["request", "submit", &file, "--controller", "acme"]).await;
    world
        .run(
            "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS
              $$ BEGIN RAISE EXCEPTION 'canary' USING DETAIL = 'canary'; END $$;
             CREATE TRIGGER trap BEFORE UPDATE ON lethe.requests FOR EACH ROW EXECUTE FUNCTION public.trap()",
        )
        .await;
    let id = serde_json::from_slice::<serde_json::Value>(&std::fs::read(&file).unwrap()).unwrap();
    let id = id["subject_request_id"].as_str().unwrap();
    let ran = lethe(&world, &["request", "cancel", id, "--controller", "acme"]).await;
    assert_eq!(ran.code, Some(1), "{}", ran.out);
    check("a cancellation that the database refuses", &ran);
}

/// Everything that prints an error prints one of these.
fn forms(error: &DbError) -> String {
    use std::error::Error;
    let mut all = vec![format!("{error} {error:#} {error:?} {error:#?}")];
    let mut source = error.source();
    while let Some(inner) = source {
        all.push(format!("{inner} {inner:?}"));
        source = inner.source();
    }
    all.join(" ")
}

#[tokio::test]
async fn an_error_of_the_database_has_no_form_that_quotes_a_row() {
    let world = World::new().await;
    world.controller("acme").await;
    world
        .run(
            "CREATE TABLE public.people (name text NOT NULL UNIQUE CHECK (name <> 'canary-check'), age integer NOT NULL);
             INSERT INTO public.people VALUES ('canary-twice', 1)",
        )
        .await;
    let session = world.db.session().await.unwrap();
    for (sql, code) in [
        ("INSERT INTO public.people VALUES ('canary-check', 1)", "23514"),
        ("INSERT INTO public.people VALUES ('canary-twice', 1)", "23505"),
        ("INSERT INTO public.people VALUES ('canary', NULL)", "23502"),
        ("INSERT INTO public.people VALUES ('x', 'canary'::text::integer)", "22P02"),
        ("SELECT 'canary'::text::uuid", "22P02"),
        ("SELECT 'canary'::text::timestamptz", "22007"),
        ("SELECT '{\"canary\": \\u0000}'::text::jsonb", "22P02"),
        ("DO $$ BEGIN RAISE EXCEPTION 'canary' USING DETAIL = 'canary'; END $$", "P0001"),
    ] {
        let error = session.batch_execute(sql).await.unwrap_err();
        let text = forms(&error);
        assert!(text.contains(code) && !text.contains(CANARY) && !text.contains("DETAIL"), "{sql}: {text}");
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some(code));
    }
    let error = session.batch_execute("SELECT 1 FROM public.nowhere").await.unwrap_err();
    assert!(error.to_string().contains("nowhere"), "what names things of ours is shown: {error}");
}

#[tokio::test]
async fn a_migration_that_fails_is_named_with_what_the_server_said() {
    let name = servers::unique_name();
    let url = servers::create_empty_database(&name).await;
    let db = Db::new(&url, 2, "lethe-testing").unwrap();
    db.session().await.unwrap().batch_execute("CREATE SCHEMA subject_data").await.unwrap();
    let error = lethe_db::migrate::migrate(&db).await.unwrap_err();
    let text = forms(&error);
    assert!(text.contains("V4__subject_data") && text.contains("42P06") && text.contains("already exists"), "{text}");
    drop(db);
    servers::drop_database(&name).await;
}
