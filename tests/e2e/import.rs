//! The import: what is taken, what becomes of the rest, and how it is gone on with (contract 8).

use lethe_domain::opendsr::DeniedValues;
use lethe_domain::request::ControllerId;
use lethe_stores::import::ProfileLine;
use lethe_testing::cli::{json, lethe, write};
use lethe_testing::details::MPIDS;
use lethe_testing::plans::all_statements;
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, Worker, World};
use serde_json::{Value, json};

/// Imports lines and returns the summary.
async fn import(world: &World, what: &str, lines: &str, more: &[&str]) -> Value {
    let file = write(world, "lines.jsonl", lines);
    json(world, &[&["import", what, file.as_str(), "--controller", "acme"], more].concat()).await
}

/// Rows of profiles and identities with the transaction that wrote each.
async fn rows(world: &World) -> Vec<String> {
    world
        .all(
            "SELECT concat_ws(' ', 'profile', mpid, attributes, updated_at, xmin) FROM subject_data.profiles
              UNION ALL
             SELECT concat_ws(' ', identity_type, identity_value, mpid, xmin) FROM subject_data.profile_identities ORDER BY 1",
            &[],
        )
        .await
}

async fn identities(world: &World) -> Vec<String> {
    let sql =
        "SELECT concat_ws(' ', mpid, identity_type, identity_value) FROM subject_data.profile_identities ORDER BY 1";
    world.all(sql, &[]).await
}

async fn profiles(world: &World) -> i64 {
    world.one("SELECT count(*) FROM subject_data.profiles", &[]).await
}

#[tokio::test]
async fn a_line_is_the_whole_profile_and_the_same_line_changes_nothing() {
    let world = World::new().await;
    world.controller("acme").await;
    let before = r#"{"mpid":1301,"identities":{"email":"shared@example.com","controller_customer_id":"c-1301"},"attributes":{"v":1}}"#;
    import(&world, "profiles", before, &[]).await;
    let stored = rows(&world).await;
    import(&world, "profiles", before, &[]).await;
    assert_eq!(rows(&world).await, stored, "nothing is written");

    let after = r#"{"mpid":1301,"identities":{"email":"moved-on@example.com","controller_customer_id":"c-1301"},"attributes":{"v":1}}
{"mpid":1302,"identities":{"email":"shared@example.com"},"attributes":{"v":1}}"#;
    import(&world, "profiles", after, &[]).await;
    let expected =
        ["1301 controller_customer_id c-1301", "1301 email moved-on@example.com", "1302 email shared@example.com"];
    assert_eq!(identities(&world).await, expected);
    let now = rows(&world).await;
    assert!(now.contains(&stored[0]) && stored[0].starts_with("controller_customer_id"), "what stays is not touched");
    assert!(!now.contains(&stored[2]) && stored[2].starts_with("profile 1301"), "it counts from now on");

    // Who asks to be forgotten by the address takes no stranger along.
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("shared@example.com");
    publisher.request("acme", &request).await;
    let matched: Vec<i64> = world.all(&format!("SELECT mpid FROM {MPIDS} m"), &[]).await;
    assert_eq!(matched, [1302]);
    import(&world, "profiles", r#"{"mpid":1301,"identities":[]}"#, &[]).await;
    assert_eq!(identities(&world).await, ["1302 email shared@example.com"]);
}

/// Sessions that wait for a lock.
async fn waiting(world: &World, count: i64) {
    let sql =
        "SELECT count(*) = $1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("sessions wait for a lock", seconds(10), async || world.one(sql, &[&count]).await).await;
}

#[tokio::test]
async fn two_imports_of_one_profile_do_not_mix_its_identities() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world
        .run("CREATE FUNCTION public.gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                  IF NEW.identity_value = 'first' THEN PERFORM pg_advisory_xact_lock(42); END IF; RETURN NEW; END $$;
              CREATE TRIGGER gate BEFORE INSERT ON subject_data.profile_identities_p1 FOR EACH ROW EXECUTE FUNCTION public.gate()")
        .await;
    let gate = world.db.begin("gate").await.unwrap();
    gate.batch_execute("SELECT pg_advisory_xact_lock(42)").await.unwrap();
    let line = |value: &str| {
        let line = json!({"mpid": 1, "identities": {"other": value, "other2": value}}).to_string();
        ProfileLine::parse(&line, &DeniedValues::default()).unwrap()
    };
    let (first, second) = ([line("first")], [line("second")]);
    let open_the_gate = async {
        waiting(&world, 2).await;
        gate.rollback().await;
    };
    let second = async {
        waiting(&world, 1).await;
        profiles_of_lines(&world, &acme, &second).await;
    };
    futures_util::join!(profiles_of_lines(&world, &acme, &first), second, open_the_gate);
    assert_eq!(identities(&world).await, ["1 other second", "1 other2 second"]);
}

async fn profiles_of_lines(world: &World, controller: &ControllerId, lines: &[ProfileLine]) {
    lethe_stores::import::profiles(&world.db, controller, lines).await.unwrap();
}

#[tokio::test]
async fn profiles_are_taken_as_real_systems_export_them() {
    let world = World::new().await;
    world.controller("acme").await;
    let lines = r#"{"mpid":"-3718039598335680576","identities":{"email":["text-mpid@example.com","second@example.com"]}}
{"mpid":1102,"identities":{"controller_customer_id":48151623,"email":"number-id@example.com"}}
{"mpid":1103,"identities":null,"attributes":null,"audiences":null}
{"mpid":1104,"identities":[],"attributes":{}}
{"mpid":1105,"identities":{"customer_id":"c-1105","ios_idfv":"7D1C0A5E","android_uuid":"a1b2c3d4e5f60718"}}
{"mpid":1106,"identities":{"email":"google-login@example.com","google":"108176814619778619437"}}
{"mpid":1.107E3,"identities":{"email":"spark@example.com"}}
{"mpid":14728704475373871040,"identities":{"email":"unsigned@example.com"}}
{"mpid":1109,"identities":{"email":"earlier@example.com","email":"later@example.com"}}
{"mpid":1110,"identities":{"shoe_size":"44"}}
"#;
    let summary = import(&world, "profiles", lines, &["--skip-invalid"]).await;
    let counted =
        ["lines", "lines_refused", "last_line", "identities_of_other_types"].map(|name| summary[name].clone());
    assert_eq!(counted, [json!(6), json!(4), json!(10), json!(1)]);
    let report = std::fs::read_to_string(summary["report"].as_str().unwrap()).unwrap();
    let report: Vec<Value> = report.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let refused: Vec<_> = report.iter().map(|entry| (entry["line"].clone(), entry["field"].clone())).collect();
    let expected = [(7, "mpid"), (8, "mpid"), (9, "identities"), (10, "identities")];
    assert_eq!(refused, expected.map(|(line, field)| (json!(line), json!(field))));
    assert!(report[3]["rule"].as_str().unwrap().contains("controller_customer_id"), "the known ones are listed");
    assert_eq!(
        identities(&world).await,
        [
            "-3718039598335680576 email second@example.com",
            "-3718039598335680576 email text-mpid@example.com",
            "1102 controller_customer_id 48151623",
            "1102 email number-id@example.com",
            "1105 android_id a1b2c3d4e5f60718",
            "1105 controller_customer_id c-1105",
            "1105 ios_vendor_id 7D1C0A5E",
            "1106 email google-login@example.com",
        ]
    );
    assert_eq!(profiles(&world).await, 6);
}

#[tokio::test]
async fn what_names_nobody_and_what_is_not_an_address_is_not_indexed() {
    let world = World::new().await;
    world.controller("acme").await;
    let mut nobody: Vec<String> = serde_json::from_str(include_str!("../fixtures/nobody.json")).unwrap();
    nobody.push("Denied".to_owned());
    let line = |(mpid, value): (usize, &String)| {
        let of = json!({"email": value, "android_id": value, "controller_customer_id": value});
        json!({"mpid": mpid, "identities": of}).to_string()
    };
    let mut lines: Vec<String> = nobody.iter().enumerate().map(line).collect();
    for odd in ["\u{200b}ada@example.com", "ada@example.com\u{a0}", "ada @example.com"] {
        lines.push(json!({"mpid": 100, "identities": {"email": odd}}).to_string());
    }
    let summary = import(&world, "profiles", &lines.join("\n"), &["--denied-identities", "denied"]).await;
    assert_eq!(summary["identities_left_out"], nobody.len() * 3);
    assert_eq!((&summary["addresses_left_out"], &summary["lines"]), (&json!(3), &json!(nobody.len() + 3)));
    assert_eq!(identities(&world).await, [""; 0]);

    // One list for the import and for requests.
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    for value in nobody[..27].iter().map(String::as_str).chain(["\u{200b}ada@example.com"]) {
        let answer = publisher.ask(&publisher.sending("acme", "request", Request::erasure(value).bytes())).await;
        let error = answer.json();
        assert_eq!((answer.status, &error["error"]["errors"][0]["reason"]), (400, &json!("identity_value")), "{value}");
    }
}

#[tokio::test]
async fn a_line_that_cannot_be_taken_is_named_and_the_lines_before_it_are_stored() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    for (bad, rule) in [
        (r#"{"mpid":12,"attributes":{"bio":"canary\u0000after"}}"#, "attributes holds the character U+0000"),
        (r#"{"mpid":12,"attributes":{"nickname":"canary \ud83d"}}"#, "attributes holds half of a surrogate pair"),
        (r#"{"mpid":12,"attributes":{"canary":1e200000}}"#, "attributes holds a number that is out of range"),
        (r#"{"mpid":12,"audiences":{"canary":1,"canary":2}}"#, "audiences has the same key twice"),
        (r#"{"mpid":12,"identities":{"canary":"x"}}"#, "identities holds an unknown identity type"),
        (r#"{"mpid":12,"canary"}"#, "the line is not well-formed JSON (column "),
        ("[{\"mpid\":12}]", "the line is a JSON array"),
        ("{\"mpid\":12,\r\"canary\":1}", "the line has a carriage return inside"),
    ] {
        world.run("TRUNCATE subject_data.profiles, subject_data.profile_identities").await;
        let mut lines: Vec<String> = (1..=40).map(|n| json!({"mpid": n, "attributes": {"n": n}}).to_string()).collect();
        bad.clone_into(&mut lines[11]);
        let file = write(&world, "bad.jsonl", lines.join("\n"));
        let ran = lethe(&world, &["import", "profiles", &file, "--controller", "acme"]).await;
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{rule}");
        for part in ["line 12 of", rule, "the lines up to 11 are stored", "--from-line 12"] {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
        assert!(!ran.err.contains("canary"), "{}", ran.err);
        assert_eq!(profiles(&world).await, 11);
        let rest = json(&world, &["import", "profiles", &file, "--controller", "acme", "--from-line", "13"]).await;
        assert_eq!((&rest["lines"], profiles(&world).await), (&json!(28), 39));
    }
    // In an event batch the same is kept, to the byte.
    let kept = [
        r#"{"mpid":1,"events":[{"a":"x\u0000y","b":"\ud83d","n":1e9999999}]}"#,
        r#"{"mpid":1,"a":1,"a":2,"note":"a key twice stays twice"}"#,
        r#"{"mpid":"1","empty":{},"list":[],"nothing":null,"mixed":[null,{"x":null}]}"#,
    ];
    let summary = import(&world, "event-batches", &format!("{}\r\n\r\n   \r\n", kept.join("\r\n")), &[]).await;
    assert_eq!(summary["lines"], 3, "blank lines do not count");
    let bodies: Vec<String> = world.all("SELECT body::text FROM subject_data.event_batches ORDER BY id", &[]).await;
    assert_eq!(bodies, kept);
    assert_eq!(world.rows_of(&acme, 1).await.2, 3);
}

/// What the trigger of [`refuse_sevens`] does.
async fn raise_with(world: &World, code: &str) {
    world
        .run(&format!(
            "CREATE OR REPLACE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.body ->> 'n' = '7' THEN
                     RAISE EXCEPTION 'not %', NEW.body USING DETAIL = 'row ' || NEW.body::text, ERRCODE = '{code}';
                 END IF;
                 RETURN NEW;
             END $$"
        ))
        .await;
}

/// A check and a trigger that refuse one profile and one event batch, and say more of it than anybody should read.
async fn refuse_sevens(world: &World) {
    raise_with(world, "P0001").await;
    world
        .run(
            "ALTER TABLE subject_data.profiles_p1 ADD CONSTRAINT no_seven CHECK (attributes ->> 'n' IS DISTINCT FROM '7');
             CREATE TRIGGER refuse BEFORE INSERT ON subject_data.event_batches_p1 FOR EACH ROW EXECUTE FUNCTION public.refuse()",
        )
        .await;
}

#[tokio::test]
async fn a_line_that_postgresql_refuses_stands_alone_and_is_not_quoted() {
    let world = World::new().await;
    world.controller("acme").await;
    refuse_sevens(&world).await;
    for (what, table, code, rule) in [
        ("profiles", "profiles", "P0001", "a check of the table fails (SQLSTATE 23514)"),
        ("event-batches", "event_batches", "P0001", "SQLSTATE P0001"),
        // A trigger may give a code of its own.
        ("event-batches", "event_batches", "45000", "SQLSTATE 45000"),
    ] {
        raise_with(&world, code).await;
        world.run(&format!("TRUNCATE subject_data.{table}")).await;
        let line = |n: i64| json!({"mpid": n, "n": n.to_string(), "attributes": {"n": n, "x": "canary"}}).to_string();
        let lines: Vec<String> = (1..=20).map(line).collect();
        let file = write(&world, "refused.jsonl", lines.join("\n"));
        let import = ["import", what, file.as_str(), "--controller", "acme"];
        let ran = lethe(&world, &import).await;
        assert_eq!(ran.code, Some(1), "{}", ran.out);
        for part in ["line 7 of", rule, "the lines up to 6 are stored", "--from-line 7"] {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
        assert!(!ran.err.contains("canary") && !ran.err.contains("DETAIL"), "{}", ran.err);
        let count = format!("SELECT count(*) FROM subject_data.{table}");
        assert_eq!(world.one::<i64>(&count, &[]).await, 6);
        world.run(&format!("TRUNCATE subject_data.{table}")).await;
        let report = world.folder.join("report.jsonl").display().to_string();
        let summary = json(&world, &[&import[..], &["--skip-invalid", "--report", &report]].concat()).await;
        assert_eq!((&summary["lines"], &summary["lines_refused"]), (&json!(19), &json!(1)));
        assert_eq!(world.one::<i64>(&count, &[]).await, 19);
        let report = std::fs::read_to_string(report).unwrap();
        assert!(report.contains(r#""line":7"#) && report.contains(rule) && !report.contains("canary"), "{report}");
    }
}

#[tokio::test]
async fn a_report_never_overwrites_what_is_imported() {
    let world = World::new().await;
    world.controller("acme").await;
    let content = "{\"mpid\":1}\n{\"mpid\":\"x\"}\n";
    let file = write(&world, "lines.jsonl", content);
    let link = world.folder.join("link.jsonl").display().to_string();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for what in ["profiles", "event-batches"] {
        for report in [&file, &link] {
            let import = ["import", what, &file, "--controller", "acme", "--skip-invalid", "--report", report];
            let ran = lethe(&world, &import).await;
            assert!(ran.code == Some(64) && ran.err.contains("is the imported file itself"), "{}", ran.err);
            assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
        }
    }
    assert_eq!(profiles(&world).await, 0);
}

#[tokio::test]
async fn marks_packing_and_other_encodings() {
    let world = World::new().await;
    world.controller("acme").await;
    let marked = "\u{feff}{\"mpid\": 1, \"identities\": {\"email\": \"ada@example.com\"}}\r\n{\"mpid\": 2}\r\n";
    assert_eq!(import(&world, "profiles", marked, &[]).await["lines"], 2);
    let plain = write(&world, "packed.jsonl", "{\"mpid\":3}\n{\"mpid\":4}\n");
    let packed = std::process::Command::new("gzip").args(["-k", "-f", &plain]).status().unwrap();
    assert!(packed.success());
    let packed = format!("{plain}.gz");
    assert_eq!(json(&world, &["import", "profiles", &packed, "--controller", "acme"]).await["lines"], 2);
    assert_eq!(profiles(&world).await, 4);

    let absent = lethe(&world, &["import", "profiles", "/nowhere.jsonl", "--controller", "acme"]).await;
    assert!(absent.err.contains("/nowhere.jsonl cannot be imported: it cannot be opened"), "{}", absent.err);
    let mut cut = std::fs::read(&packed).unwrap();
    cut.truncate(cut.len() - 9);
    let utf16: Vec<u8> = marked.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let array = format!("[{}{{\"mpid\":2}}]", "{\"mpid\":1},".repeat(200_000));
    for (content, rule) in [
        (cut, "cannot be read"),
        (utf16, "the file is UTF-16; turn it into UTF-8"),
        (array.into_bytes(), "is a JSON array; each line holds one JSON object"),
        (b"{\"mpid\":7,\"n\":1}\r{\"mpid\":7,\"n\":2}\r".to_vec(), "has a carriage return inside"),
    ] {
        let file = write(&world, "odd", content);
        let ran = lethe(&world, &["import", "event-batches", &file, "--controller", "acme"]).await;
        assert!(ran.code == Some(1) && ran.err.contains(rule), "{rule}: {}", ran.err);
    }
}

#[tokio::test]
async fn what_is_refused_beforehand_is_what_postgresql_refuses() {
    let world = World::new().await;
    let session = world.db.session().await.unwrap();
    let numbers = [
        "1e131071",
        "1e131072",
        "-1e131071",
        "9.9e131071",
        "10e131071",
        "0.1e131072",
        "0.01e131073",
        "0.01e131074",
        "1e-16383",
        "1e-16384",
        "1.5e-16382",
        "1.5e-16383",
        "0e131072",
        "0e200000",
        "0.0e-16382",
        "0e-16384",
        "1E+400",
        "1e400",
        "-0",
        "1e999999999999",
    ];
    let texts = [
        r#""\u0000""#,
        r#""\\u0000""#,
        r#""\ud83d""#,
        r#""\ud83d\ude00""#,
        r#""\ude00""#,
        r#""\ud83d\ud83d\ude00""#,
        r#""\ud83dx""#,
        r#""\ud83d\\ude00""#,
        r#"{"\u0000":1}"#,
        r#"{"a\ud83d":1}"#,
        r#""\uD83D\uDE00""#,
        r#""é😀\"""#,
    ];
    for sample in numbers.into_iter().chain(texts) {
        let stored = session.raw().query_one("SELECT $1::text::jsonb IS NOT NULL", &[&sample]).await;
        let line = format!(r#"{{"mpid":1,"attributes":[{sample}]}}"#);
        let read = ProfileLine::parse(&line, &DeniedValues::default());
        assert_eq!(read.is_ok(), stored.is_ok(), "{sample}: {:?}", read.err());
    }
}

#[tokio::test]
async fn import_and_export_ask_indexes_however_much_there_is() {
    let world = World::new().await;
    for id in ["acme", "other"] {
        world.controller(id).await;
        let fill =
            "INSERT INTO subject_data.profiles (controller_id, mpid) SELECT 'ID', n FROM generate_series(1, 10000) n;
                    INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
                    SELECT 'ID', 'email', 'p' || n || '@example.com', n FROM generate_series(1, 10000) n";
        world.run(&fill.replace("ID", id)).await;
    }
    world.run("ANALYZE subject_data.profiles, subject_data.profile_identities").await;
    let session = world.db.session().await.unwrap();
    let list: Vec<String> = (1..=50).map(|n| n.to_string()).collect();
    let (mpids, texts) = (format!("'{{{}}}'", list.join(",")), "array_fill('{}'::text, ARRAY[50])".to_owned());
    let (mpids, texts) = (mpids.as_str(), texts.as_str());
    for (name, types, values) in [
        (
            "CHANGED_PROFILES",
            "bigint[], text[], text[], bigint[], text[], text[]",
            vec![mpids, texts, texts, mpids, texts, texts],
        ),
        ("DELETE_GONE_IDENTITIES", "bigint[], bigint[], text[], text[]", vec![mpids, mpids, texts, texts]),
        ("COUNT_WITHOUT_PROFILE", "bigint[]", vec![mpids]),
        ("EXPORT_PROFILES", "bigint[], timestamptz", vec![mpids, "now()"]),
    ] {
        let (_, statement) = all_statements().into_iter().find(|(one, _)| *one == name).unwrap();
        session.batch_execute(&format!("PREPARE {name} (text, {types}) AS {statement}")).await.unwrap();
        let explain = format!("EXPLAIN EXECUTE {name}('acme', {})", values.join(", "));
        let rows = session.raw().query(&explain, &[]).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        assert!(plan.contains("Index") && !plan.contains("Seq Scan") && !plan.contains("_p2"), "{name}: {plan}");
    }
}
