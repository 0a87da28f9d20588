//! Import: `lethe import` of a file of profiles, three identities each, and of one of event batches, into a controller that has
//! nothing yet; from the start of the command to its end.
//!
//! The raw program reads the same lines, takes the same digests, and sends them by COPY into tables of the same columns and
//! indexes, 10,000 lines in a transaction, one after the other as the command does. It checks no line beyond what it needs of
//! it, compares nothing with what is there, and keeps no progress.

use std::fmt::Write as _;
use std::io::BufRead;

use bytes::Bytes;
use futures_util::SinkExt;
use lethe_db::Session;
use lethe_domain::opendsr::IdentityFormat;
use lethe_testing::cli::lethe;

use crate::bench::Bench;
use crate::meter::Run;
use crate::people::{IDENTITIES, identity};
use crate::report::Row;

/// Lines of a transaction of the raw program.
const AT_ONCE: usize = 10_000;
/// Profiles that event batches are of.
const AUTHORS: u64 = 10_000;

pub(crate) async fn rows(bench: &Bench) -> [Row; 2] {
    bench.world.run(RAW_TABLES).await;
    let mut profiles = Row::new("import, profiles", "profiles/s", 0.5);
    let mut batches = Row::new("import, event batches", "batches/s", 0.7);
    let lines = (1..=bench.sizes.imported_profiles).map(profile);
    contest(bench, &mut profiles, "profiles", lines).await;
    let lines = (1..=bench.sizes.imported_batches).map(event_batch);
    contest(bench, &mut batches, "event-batches", lines).await;
    bench.world.run("DROP TABLE raw.profiles, raw.profile_identities, raw.event_batches").await;
    [profiles, batches]
}

async fn contest(bench: &Bench, row: &mut Row, kind: &str, lines: impl Iterator<Item = String>) {
    let file = bench.world.folder.join(format!("{kind}.jsonl"));
    let mut text = String::new();
    let mut count = 0.0;
    for line in lines {
        text += &line;
        text.push('\n');
        count += 1.0;
    }
    std::fs::write(&file, text).unwrap();
    for run in 0..bench.sizes.runs {
        let controller = format!("imported-{kind}-{run}");
        let (controller, _) = bench.controller(&controller).await;
        bench.settle().await;
        let meter = bench.raw_meter();
        let ran =
            lethe(&bench.world, &["import", kind, file.to_str().unwrap(), "--controller", controller.as_str()]).await;
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        row.lethe.push(meter.stop(count));
        let sql = "SELECT partition_no FROM lethe.controllers WHERE controller_id = $1";
        let number: i32 = bench.world.one(sql, &[&controller]).await;
        let table = if kind == "profiles" { "profiles" } else { "event_batches" };
        let there = format!("SELECT count(*) FROM subject_data.{table}_p{number}");
        assert!((bench.count(&there).await as f64 - count).abs() < 0.5, "every line is there");
        let tables =
            ["profiles", "profile_identities", "event_batches"].map(|name| format!("subject_data.{name}_p{number}"));
        bench.world.run(&format!("TRUNCATE {}", tables.join(", "))).await;
        row.raw.push(raw(bench, kind, &file, count).await);
    }
    std::fs::remove_file(file).unwrap();
}

fn profile(number: u64) -> String {
    let identities: Vec<String> = IDENTITIES
        .iter()
        .enumerate()
        .map(|(place, (kind, _, _))| format!(r#""{kind}":"{}""#, identity(place, number)))
        .collect();
    format!(
        r#"{{"mpid":{number},"identities":{{{}}},"attributes":{{"city":"Ghent"}},"audiences":["newsletter"]}}"#,
        identities.join(",")
    )
}

fn event_batch(number: u64) -> String {
    format!(
        r#"{{"mpid":{},"events":[{{"data":{{"event_id":{number},"event_name":"Menu opened","custom_event_type":"navigation","custom_attributes":{{"menu":"main"}}}},"event_type":"custom_event"}}],"device_info":{{"platform":"iOS","os_version":"17.4","device_model":"iPhone15,2"}},"environment":"production","batch_id":{}}}"#,
        1 + number * 7_919 % AUTHORS,
        number * 2_654_435_761 % 4_294_967_296,
    )
}

const RAW_TABLES: &str = "
    CREATE TABLE raw.profiles (
        controller_id text NOT NULL, mpid bigint NOT NULL, attributes jsonb NOT NULL, audiences jsonb NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (controller_id, mpid));
    CREATE TABLE raw.profile_identities (
        controller_id text NOT NULL, identity_type text NOT NULL, identity_value text NOT NULL, mpid bigint NOT NULL,
        sha256 bytea NOT NULL, sha1 bytea NOT NULL, md5 bytea NOT NULL,
        PRIMARY KEY (controller_id, mpid, identity_type, sha256));
    CREATE INDEX ON raw.profile_identities (sha256, identity_type);
    CREATE INDEX ON raw.profile_identities (sha1, identity_type);
    CREATE INDEX ON raw.profile_identities (md5, identity_type);
    CREATE TABLE raw.event_batches (
        id bigint GENERATED ALWAYS AS IDENTITY, controller_id text NOT NULL, mpid bigint NOT NULL,
        received_at timestamptz NOT NULL DEFAULT now(), body json NOT NULL, PRIMARY KEY (controller_id, mpid, id))";

#[derive(serde::Deserialize)]
struct Profile<'a> {
    mpid: i64,
    #[serde(borrow)]
    identities: std::collections::BTreeMap<&'a str, &'a str>,
    #[serde(borrow)]
    attributes: &'a serde_json::value::RawValue,
    #[serde(borrow)]
    audiences: &'a serde_json::value::RawValue,
}

#[derive(serde::Deserialize)]
struct EventBatch {
    mpid: i64,
}

/// The raw program itself.
async fn raw(bench: &Bench, kind: &str, file: &std::path::Path, count: f64) -> Run {
    bench.world.run("TRUNCATE raw.profiles, raw.profile_identities, raw.event_batches").await;
    bench.settle().await;
    let session = bench.raw_db.session().await.unwrap();
    let meter = bench.raw_meter();
    let mut lines = std::io::BufReader::new(std::fs::File::open(file).unwrap()).lines().map(Result::unwrap);
    loop {
        let group: Vec<String> = lines.by_ref().take(AT_ONCE).collect();
        if group.is_empty() {
            break;
        }
        session.batch_execute("BEGIN").await.unwrap();
        if kind == "profiles" {
            let (mut profiles, mut identities) = (String::new(), String::new());
            for line in &group {
                let Profile { mpid, identities: named, attributes, audiences } = serde_json::from_str(line).unwrap();
                writeln!(profiles, "raw\t{mpid}\t{attributes}\t{audiences}").unwrap();
                for (kind, value) in named {
                    let digest = |format: IdentityFormat| format!("\\\\x{}", format.encode(value));
                    let (sha256, sha1) = (digest(IdentityFormat::Sha256), digest(IdentityFormat::Sha1));
                    let md5 = digest(IdentityFormat::Md5);
                    writeln!(identities, "raw\t{kind}\t{value}\t{mpid}\t{sha256}\t{sha1}\t{md5}").unwrap();
                }
            }
            copy(&session, "raw.profiles (controller_id, mpid, attributes, audiences)", profiles).await;
            let columns =
                "raw.profile_identities (controller_id, identity_type, identity_value, mpid, sha256, sha1, md5)";
            copy(&session, columns, identities).await;
        } else {
            let mut batches = String::new();
            for line in &group {
                let EventBatch { mpid } = serde_json::from_str(line).unwrap();
                writeln!(batches, "raw\t{mpid}\t{line}").unwrap();
            }
            copy(&session, "raw.event_batches (controller_id, mpid, body)", batches).await;
        }
        session.batch_execute("COMMIT").await.unwrap();
    }
    meter.stop(count)
}

/// Nothing of what is sent has a backslash or a tab.
async fn copy(session: &Session, into: &str, text: String) {
    let copying = session.raw().copy_in::<_, Bytes>(&format!("COPY {into} FROM STDIN")).await.unwrap();
    let mut copying = std::pin::pin!(copying);
    copying.send(Bytes::from(text)).await.unwrap();
    copying.finish().await.unwrap();
}
