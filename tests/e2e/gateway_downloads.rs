//! Downloads (contract 7): whole, in parts, resumed; who gets none, and what is on record.

use jiff::SignedDuration;
use lethe_results::cipher::CHUNK;
use lethe_testing::gateway::{Caller, HttpAnswer};
use lethe_testing::results::{files_below, open, record};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Gateway, Request, SECONDS, Worker, World, seconds_with};
use reqwest::Method;
use serde_json::{Value, json};

/// A person with so many event batches of about a KiB that cannot be packed much.
async fn person(world: &World, batches: usize) {
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    let text =
        "SELECT string_agg(encode(sha512((n || '-' || m)::text::bytea), 'base64'), '') FROM generate_series(1, 10) m";
    world
        .run(&format!(
            "INSERT INTO subject_data.event_batches (controller_id, mpid, body)
             SELECT 'acme', 1, json_build_object('mpid', 1, 'n', n, 'x', replace(({text}), E'\\n', ''))
               FROM generate_series(1, {batches}) n"
        ))
        .await;
}

/// A scheduler, a compiler and a gateway.
async fn running(world: &World, settings: &[(&str, &str)]) -> (Vec<Worker>, Gateway) {
    let (scheduler, gateway) = Gateway::with_scheduler(world, settings).await;
    (vec![scheduler, Worker::start(world, "access-compiler", settings).await], gateway)
}

async fn ranged(gateway: &Gateway, path: &str, range: &str, if_range: Option<&str>) -> HttpAnswer {
    let mut call = gateway.call(Method::GET, path).header("range", range);
    if let Some(tag) = if_range {
        call = call.header("if-range", tag);
    }
    gateway.send(call).await
}

async fn asked(acme: &Caller<'_>, request: &Request) -> String {
    acme.request(request).await;
    acme.result_path(&request.id).await
}

#[tokio::test]
async fn a_file_comes_whole_in_parts_and_resumed() {
    let world = World::new().await;
    person(&world, 2_500).await;
    let (_workers, gateway) = running(&world, &seconds_with(&[("LETHE_LOG", "trace")])).await;
    let acme = gateway.caller(&world, "acme");
    let access = Request::access("ada@example.com");
    let portability = Request::new("portability").identity("email", "ada@example.com");
    let mut downloads = 0;
    for (request, name, media_type) in [
        (&access, format!("access-{}.jsonl", access.id), "text/plain; charset=utf-8"),
        (&portability, format!("portability-{}.zip", portability.id), "application/zip"),
    ] {
        let path = asked(&acme, request).await;
        let expected = open(&world, &request.id).await;
        let size = expected.len();
        assert!(size > 20 * CHUNK, "more than one window: {size}");
        for path in [path.clone(), format!("{path}/"), path.replace("/v3/", "/v1/")] {
            let whole = gateway.get(&path).await;
            downloads += 1;
            assert_eq!((whole.status, whole.body.len()), (200, size));
            assert!(whole.body == expected, "byte for byte");
            assert_eq!(whole.header("content-length"), size.to_string());
            assert_eq!(whole.header("content-type"), media_type);
            assert_eq!(whole.header("content-disposition"), format!("attachment; filename=\"{name}\""));
            assert_eq!((whole.header("accept-ranges"), whole.header("cache-control")), ("bytes", "no-store"));
            assert!(whole.is_unsigned());
        }
        let head = gateway.send(gateway.call(Method::HEAD, &path)).await;
        assert_eq!((head.status, head.body.len(), head.header("content-length")), (200, 0, size.to_string().as_str()));
        let etag = head.header("etag").to_owned();
        assert!(etag.starts_with('"') && etag.ends_with('"'), "{etag}");
        downloads += parts(&gateway, &path, &expected, &etag).await;
    }
    let sql = "SELECT details FROM lethe.audit_entries WHERE event = 'result.downloaded' AND controller_id = 'acme' ORDER BY entry_id";
    let entries: Vec<Value> = world.all(sql, &[]).await;
    assert_eq!(entries.len(), downloads, "one for each, none for HEAD and what was refused");
    let size = record(&world, &access.id).await.get::<_, i64>("size_bytes");
    assert_eq!((&entries[0]["first_byte"], &entries[0]["last_byte"]), (&json!(0), &json!(size - 1)));
    assert_eq!((&entries[3]["first_byte"], &entries[3]["last_byte"]), (&json!(0), &json!(0)));
    tokens_are_nowhere(&world, &acme, &[&access.id, &portability.id]).await;
}

/// Ranges of a file; returns how many were sent.
async fn parts(gateway: &Gateway, path: &str, expected: &[u8], etag: &str) -> usize {
    let (size, border) = (expected.len(), CHUNK);
    let satisfiable = [
        ("bytes=0-0".to_owned(), 0..1),
        (format!("bytes={}-{border}", border - 1), border - 1..border + 1),
        (format!("bytes={border}-{}", 2 * border - 1), border..2 * border),
        (format!("bytes={}-{}", border * 15 - 3, border * 18 + 3), border * 15 - 3..border * 18 + 4),
        (format!("bytes={}-", size - 10), size - 10..size),
        ("bytes=-7".to_owned(), size - 7..size),
        (format!("bytes={}-{}", size - 1, size * 2), size - 1..size),
        (format!("bytes=-{}", size + 5), 0..size),
    ];
    for (range, wanted) in &satisfiable {
        let part = ranged(gateway, path, range, Some(etag)).await;
        assert_eq!(part.status, 206, "{range}");
        assert!(part.body == expected[wanted.clone()], "{range}");
        assert_eq!(part.header("content-length"), wanted.len().to_string(), "{range}");
        let content_range = format!("bytes {}-{}/{size}", wanted.start, wanted.end - 1);
        assert_eq!((part.header("content-range"), part.header("etag")), (content_range.as_str(), etag), "{range}");
    }
    for range in [format!("bytes={size}-"), "bytes=-0".to_owned(), format!("bytes={}-{}", size + 1, size + 2)] {
        let refused = ranged(gateway, path, &range, None).await;
        assert_eq!((refused.status, refused.reason()), (416, "range_not_satisfiable".to_owned()), "{range}");
        assert_eq!(refused.header("content-range"), format!("bytes */{size}"), "{range}");
    }
    // Another file's tag, several ranges, another unit: the whole file.
    for (range, tag) in [("bytes=1-2", "\"another\""), ("bytes=1-2,5-6", etag), ("lines=1-2", etag)] {
        let whole = ranged(gateway, path, range, Some(tag)).await;
        assert_eq!((whole.status, whole.body.len()), (200, size), "{range} {tag}");
    }
    // Broken off somewhere within, and resumed from there.
    let mut raw = gateway.connect().await;
    raw.say(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    let mut got = vec![0; 100_000];
    tokio::io::AsyncReadExt::read_exact(&mut raw.0, &mut got).await.unwrap();
    drop(raw);
    let head = got.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let mut file = got.split_off(head);
    let rest = ranged(gateway, path, &format!("bytes={}-", file.len()), Some(etag)).await;
    assert_eq!(rest.status, 206);
    file.extend(rest.body);
    assert!(file == expected, "resumed");
    satisfiable.len() + 3 + 2
}

/// Neither in a log at its most talkative, nor in any row of the database.
async fn tokens_are_nowhere(world: &World, acme: &Caller<'_>, ids: &[&str]) {
    let tables: Vec<String> = world
        .all(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE relkind = 'r' AND relnamespace = 'lethe'::regnamespace",
            &[],
        )
        .await;
    for id in ids {
        let path = acme.result_path(id).await;
        let token = path.rsplit('/').next().unwrap();
        for log in files_below(&world.folder.join("log")) {
            let text = std::fs::read_to_string(&log).unwrap();
            assert!(!text.contains(token), "{}", log.display());
            assert!(!log.to_string_lossy().contains("gateway") || text.contains("results/{token}"), "it is talkative");
        }
        for table in &tables {
            let sql = format!("SELECT count(*) FROM {table} t WHERE strpos(t::text, $1) > 0");
            assert_eq!(world.one::<i64>(&sql, &[&token]).await, 0, "{table}");
        }
    }
}

#[tokio::test]
async fn a_link_ends_with_its_lifetime_and_there_is_none_to_nothing() {
    let world = World::new().await;
    person(&world, 3).await;
    let (mut workers, gateway) = running(&world, SECONDS).await;
    let acme = gateway.caller(&world, "acme");
    let nobody = Request::access("nobody-here@example.com");
    let path = asked(&acme, &nobody).await;
    let none = gateway.get(&path).await;
    assert_eq!((none.status, none.reason()), (404, "not_found".to_owned()));
    assert_eq!(acme.status(&nobody.id).await.json()["results_count"], json!(0));
    let request = Request::access("ada@example.com");
    let path = asked(&acme, &request).await;
    assert_eq!(gateway.get(&path).await.status, 200);
    let last = path.chars().last().unwrap();
    let other = format!("{}{}", &path[..path.len() - 1], if last == 'A' { 'E' } else { 'A' });
    assert_eq!(gateway.get(&other).await.status, 404, "one character of the token is another");
    // Before the scheduler has expired it: nobody does, while it is stopped.
    workers.remove(0).stop().await;
    let row = record(&world, &request.id).await;
    let expires_at: jiff::Timestamp = row.get("expires_at");
    world.set_clock(expires_at).await;
    let gone = gateway.get(&path).await;
    assert_eq!((gone.status, gone.reason()), (410, "gone".to_owned()));
    assert_eq!(record(&world, &request.id).await.get::<_, Option<jiff::Timestamp>>("expired_at"), None);
    // And after it.
    let _scheduler = Worker::start(&world, "scheduler", SECONDS).await;
    eventually("it is expired", seconds(15), async || {
        record(&world, &request.id).await.get::<_, Option<String>>("object_path").is_none()
    })
    .await;
    for path in [path.clone(), format!("{path}/")] {
        let gone = gateway.get(&path).await;
        assert_eq!((gone.status, gone.reason()), (410, "gone".to_owned()));
    }
    world.set_clock(expires_at + SignedDuration::from_hours(48)).await;
    assert_eq!(gateway.get(&path).await.status, 410, "the day's key is gone as well");
    let sql = "SELECT count(*) FROM lethe.audit_entries WHERE event = 'result.downloaded'";
    assert_eq!(world.one::<i64>(sql, &[]).await, 1, "only what was sent");
}

#[tokio::test]
async fn a_file_that_was_tampered_with_breaks_off_and_never_looks_whole() {
    let world = World::new().await;
    person(&world, 2_500).await;
    let (_workers, gateway) = running(&world, SECONDS).await;
    let acme = gateway.caller(&world, "acme");
    let request = Request::access("ada@example.com");
    let path = asked(&acme, &request).await;
    let object = files_below(&world.folder.join("results")).pop().unwrap();
    let (sealed, plain) = (std::fs::read(&object).unwrap(), open(&world, &request.id).await);
    let mut changed = sealed.clone();
    let at = sealed.len() - 100_000;
    changed[at] ^= 1;
    let mut swapped = sealed.clone();
    let (first, second) = (8..8 + CHUNK + 16, 8 + CHUNK + 16..8 + 2 * (CHUNK + 16));
    swapped[first.clone()].copy_from_slice(&sealed[second.clone()]);
    swapped[second].copy_from_slice(&sealed[first]);
    for (what, bytes) in [("changed", changed), ("cut", sealed[..sealed.len() / 2].to_vec()), ("swapped", swapped)] {
        std::fs::write(&object, bytes).unwrap();
        let answer = gateway.call(Method::GET, &path).send().await;
        let body = match answer {
            Ok(answer) => answer.bytes().await,
            Err(error) => Err(error),
        };
        assert!(body.is_err(), "{what}: the client sees that it is not whole");
        let mut raw = gateway.connect().await;
        raw.say(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
        let got = raw.answer().await.map(|answer| answer.body).unwrap_or_default();
        assert!(got.len() < plain.len() && plain.starts_with(&got), "{what}: no false byte is handed out");
    }
    std::fs::remove_file(&object).unwrap();
    let missing = gateway.call(Method::GET, &path).send().await;
    let whole = match missing {
        Ok(answer) => answer.status().is_success() && answer.bytes().await.is_ok(),
        Err(_) => false,
    };
    assert!(!whole, "an object that is not there");
    std::fs::write(&object, &sealed).unwrap();
    assert!(gateway.get(&path).await.body == plain, "what was mended is whole");
    std::fs::rename(world.folder.join("keys"), world.folder.join("away")).unwrap();
    let without_key = gateway.get(&path).await;
    assert!([410, 503].contains(&without_key.status), "{}", without_key.status);
}
