//! Crypto-shredding: once the day of expiry is over, no backup brings a result back (DESIGN rule 13).
//!
//! What is proved, and how. An attacker has all of these: the rows of the database and the encrypted object from
//! *before* the expiry (a backup), every file of PostgreSQL with its write-ahead log from *after* it, the master key,
//! and the key and result stores from *after* it. What they lack is the key of the day, which was destroyed, and which
//! never lay in PostgreSQL.
//!
//! The subject data itself is in PostgreSQL, and must be: it is the controller's, and an access request takes nothing
//! away. So its text is a needle that proves nothing. What exists in the *result* only is
//! the join of two lines of the file: each line is a row of its own, and the line break between them was never stored.
//! That join, the key of the file, the key of the day and the token are searched for. That the search finds
//! what is there is shown with the text of a row and with the wrapped key.

use jiff::SignedDuration;
use jiff::civil::Date;
use lethe_results::cipher::Decryptor;
use lethe_results::day_keys::{DayKeyError, DayKeys};
use lethe_results::store;
use lethe_testing::results::{files_below, open, record};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Gateway, Request, SECONDS, Worker, World};
use serde_json::json;

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    // The first byte sifts: windows of hundreds of MiB take too long in an unoptimised build.
    let mut from = 0;
    while let Some(found) = bytes[from..].iter().position(|byte| *byte == needle[0]) {
        from += found;
        if bytes[from..].starts_with(needle) {
            return true;
        }
        from += 1;
    }
    false
}

/// Which of the needles lie in any file of this world's database, or in the write-ahead log since `since`. PostgreSQL
/// reads its own files for us and searches them: they may be on another machine, or another user's.
async fn found_in_postgresql(world: &World, since: &str, needles: &[(&str, Vec<u8>)]) -> Vec<String> {
    world.run("CHECKPOINT").await;
    let sql =
        "SELECT 'base/' || oid || '/' || pg_ls_dir('base/' || oid) FROM pg_database WHERE datname = current_database()
               UNION ALL SELECT 'global/' || pg_ls_dir('global')
               UNION ALL SELECT 'pg_xact/' || pg_ls_dir('pg_xact')
               UNION ALL SELECT 'pg_wal/' || name FROM pg_ls_waldir() WHERE name >= $1 AND name ~ '^[0-9A-F]{24}$'
                            AND name <= pg_walfile_name(pg_current_wal_lsn())";
    let files: Vec<String> = world.all(sql, &[&since]).await;
    assert!(files.iter().any(|file| file.starts_with("pg_wal/")), "{since}: {files:?}");
    let values: Vec<Vec<u8>> = needles.iter().map(|(_, needle)| needle.clone()).collect();
    let search = "SELECT DISTINCT n::int
                    FROM unnest($1::text[]) f, LATERAL (SELECT pg_read_binary_file(f, 0, 1 << 29, true) AS content OFFSET 0) c,
                         unnest($2::bytea[]) WITH ORDINALITY AS needle (bytes, n)
                   WHERE content IS NOT NULL AND position(bytes IN content) > 0";
    let session = world.db.session().await.unwrap();
    session.batch_execute("SET statement_timeout = '120s'").await.unwrap();
    let rows = session.raw().query(search, &[&files, &values]).await.unwrap();
    let mut found: Vec<String> =
        rows.iter().map(|row| needles[usize::try_from(row.get::<_, i32>(0)).unwrap() - 1].0.to_owned()).collect();
    found.sort();
    found
}

#[tokio::test]
async fn after_the_day_of_expiry_no_backup_brings_a_result_back() {
    let world = World::new().await;
    let since: String = world.one("SELECT pg_walfile_name(pg_current_wal_lsn())", &[]).await;
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    let marker = uuid::Uuid::new_v4().simple().to_string();
    let lines: Vec<String> =
        (0..2).map(|n| json!({"mpid": 1, "begin": n, "text": format!("{marker}-{n}")}).to_string()).collect();
    world.event_batches(&acme, &lines).await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let _compiler = Worker::start(&world, "access-compiler", SECONDS).await;
    let caller = gateway.caller(&world, "acme");
    let request = Request::access("ada@example.com");
    caller.request(&request).await;
    let path = caller.result_path(&request.id).await;
    assert_eq!(gateway.get(&path).await.status, 200);

    // The backup: what can be had of it while it lives.
    let plain = open(&world, &request.id).await;
    let row = record(&world, &request.id).await;
    let (result_id, wrapped): (uuid::Uuid, Vec<u8>) = (row.get("result_id"), row.get("wrapped_key"));
    let (object_path, day): (String, Date) = (row.get("object_path"), row.get("expiry_day"));
    let expires_at: jiff::Timestamp = row.get("expires_at");
    let object = files_below(&world.folder.join("results")).pop().unwrap();
    let sealed = std::fs::read(&object).unwrap();
    let keys = world.keys();
    let sealed_day_key = std::fs::read(world.folder.join(format!("keys/{day}.key"))).unwrap();
    let context = format!("key of the expiry day {day}");
    let day_key = keys.days().open(context.as_bytes(), &sealed_day_key).unwrap();
    let file_key =
        lethe_domain::crypto::SealingKey::new(&day_key).unwrap().open(result_id.as_bytes(), &wrapped).unwrap();
    let join = format!("{marker}-0\"}}\n{{\"mpid\":1,\"begin\":1");
    assert!(
        contains(&plain, join.as_bytes()) || contains(&plain, format!("{marker}-0\"}}\n").as_bytes()),
        "{}",
        String::from_utf8_lossy(&plain)
    );
    let at = plain.windows(marker.len()).position(|window| window == marker.as_bytes()).unwrap();
    let token = path.rsplit('/').next().unwrap().to_owned();
    let needles = [
        ("control: a row", marker.clone().into_bytes()),
        ("control: the wrapped key", wrapped.clone()),
        ("the file", plain[at..at + marker.len() + 16].to_vec()),
        ("the key of the file", file_key.clone()),
        ("the key of the day", day_key.clone()),
        ("the sealed key of the day", sealed_day_key.clone()),
        ("the token", token.into_bytes()),
    ];
    assert!(needles[2].1.contains(&b'\n'), "the needle spans two lines");

    // The day passes.
    world.set_clock(expires_at + SignedDuration::from_hours(25)).await;
    for folder in ["results", "keys"] {
        eventually("bytes and key are gone", seconds(15), async || files_below(&world.folder.join(folder)).is_empty())
            .await;
    }
    assert_eq!(gateway.get(&path).await.status, 410);
    // Another result lives meanwhile, with a key of another day.
    let later = Request::access("ada@example.com");
    caller.request(&later).await;
    caller.result_path(&later.id).await;
    let other_day: Date = record(&world, &later.id).await.get("expiry_day");
    assert_ne!(other_day, day);

    // Nothing of what is left opens the backup.
    let url = url::Url::from_file_path(world.folder.join("keys")).unwrap();
    let day_keys = DayKeys::new(store::open("LETHE_KEY_STORE", &url).unwrap(), keys.clone());
    assert!(matches!(day_keys.get(day).await, Err(DayKeyError::Destroyed { .. })));
    assert!(day_keys.get(other_day).await.unwrap().open(result_id.as_bytes(), &wrapped).is_err());
    for key in [keys.days(), keys.requests()] {
        for context in [result_id.as_bytes().as_slice(), context.as_bytes(), b""] {
            assert!(key.open(context, &wrapped).is_err());
        }
    }
    let master = std::fs::read_to_string(&world.files.master).unwrap();
    let master = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, master.trim()).unwrap();
    let size = plain.len() as u64;
    assert!(Decryptor::new(&master.try_into().unwrap(), size).unwrap().open_all(&sealed).is_err());
    let right = Decryptor::new(&file_key.clone().try_into().unwrap(), size).unwrap();
    assert!(right.open_all(&sealed).unwrap() == plain, "with the key it would open: it is the key that is missing");

    // The bytes are nowhere.
    let found = found_in_postgresql(&world, &since, &needles).await;
    assert_eq!(found, ["control: a row", "control: the wrapped key"]);
    for folder in ["results", "keys", "log", "run"] {
        for file in files_below(&world.folder.join(folder)) {
            let bytes = std::fs::read(&file).unwrap();
            let found: Vec<&str> =
                needles.iter().filter(|(_, needle)| contains(&bytes, needle)).map(|(what, _)| *what).collect();
            assert!(found.is_empty(), "{}: {found:?}", file.display());
        }
    }

    // The backup is put back as a whole, on a day when its link was still alive: the gateway cannot read it.
    std::fs::create_dir_all(object.parent().unwrap()).unwrap();
    std::fs::write(&object, &sealed).unwrap();
    world.set_clock(expires_at - SignedDuration::from_hours(24)).await;
    let sql = "UPDATE lethe.results SET wrapped_key = $1, object_path = $2, expired_at = NULL WHERE result_id = $3";
    world.db.session().await.unwrap().raw().execute(sql, &[&wrapped, &object_path, &result_id]).await.unwrap();
    let restored = gateway.get(&path).await;
    assert_eq!((restored.status, restored.reason()), (503, "unavailable".to_owned()));
}
