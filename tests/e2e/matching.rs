//! Matching: which profiles a request is executed on, and how the database finds them (contract 4).

use lethe_domain::crypto;
use lethe_domain::opendsr::{Identity, IdentityFormat, IdentityType};
use lethe_testing::details::MPIDS;
use lethe_testing::plans::all_statements;
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, Worker, World};
use serde_json::json;

const INTAKE: [&str; 2] = ["scheduler", "identity-matcher"];

async fn sources(world: &World, id: &str) -> Vec<String> {
    let sql = format!("SELECT mpid || ' ' || source FROM {MPIDS} m WHERE subject_request_id::text = $1 ORDER BY mpid");
    world.all(&sql, &[&id]).await
}

#[tokio::test]
async fn every_format_alias_and_spelling_finds_the_same_people_and_no_others() {
    let world = World::new().await;
    let (acme, other) = (world.controller("acme").await, world.controller("other").await);
    world.profile(&acme, 1, &[("email", " Ada@Example.COM"), ("roku_publisher_id", "R-1")]).await;
    world.profile(&acme, 2, &[("email", "ada@example.com"), ("other2", "ada@example.com")]).await;
    world.profile(&acme, 3, &[("email", "grace@example.com"), ("other", "X")]).await;
    world.profile(&acme, 5, &[("email", "vada@example.com")]).await;
    world.profile(&other, 4, &[("email", "ada@example.com")]).await;
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let email = |format: IdentityFormat| format.encode("ada@example.com");
    let both = vec!["1 receipt".to_owned(), "2 receipt".to_owned()];
    let cases = [
        (Request::erasure("ADA@example.com\t"), both.clone()),
        (Request::new("erasure").encoded("email", &email(IdentityFormat::Sha256), "sha256"), both.clone()),
        (Request::new("erasure").encoded("email", &email(IdentityFormat::Sha1).to_uppercase(), "sha1"), both.clone()),
        (Request::new("erasure").encoded("email", &email(IdentityFormat::Md5), "md5"), both),
        (Request::new("erasure").identity("roku_publishing_id", "R-1"), vec!["1 receipt".to_owned()]),
        (Request::new("erasure").identity("roku_publisher_id", "r-1"), vec![]),
        (Request::new("erasure").identity("controller_customer_id", "ada@example.com"), vec![]),
        (
            Request::new("erasure").identity("email", "grace@example.com").identity("android_id", "unheard-of"),
            vec!["3 receipt".to_owned()],
        ),
        (Request::new("erasure").mpid(4).with("subject_identities", json!(null)), vec!["4 named".to_owned()]),
    ];
    for (request, expected) in cases {
        publisher.request("acme", &request).await;
        assert_eq!(sources(&world, &request.id).await, expected, "{}", String::from_utf8_lossy(&request.bytes()));
    }
}

#[tokio::test]
async fn data_that_arrives_between_receipt_and_release_is_covered() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    world.set_clock("2054-11-22T09:00:00Z".parse().unwrap()).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], &[]).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com").expedited();
    publisher.request("acme", &request).await;
    assert_eq!(sources(&world, &request.id).await, ["1 receipt"]);
    world.person(&acme, 2, "ada@example.com", 1).await;
    world.person(&acme, 3, "grace@example.com", 1).await;
    // Gone from the built-in store, yet known: it stays on record.
    world.run("DELETE FROM subject_data.profile_identities WHERE mpid = 1").await;
    world.set_clock("2054-11-22T12:30:00Z".parse().unwrap()).await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(sources(&world, &request.id).await, ["1 receipt", "2 release"]);
    for mpid in [1, 2] {
        assert_eq!(world.rows_of(&acme, mpid).await, (0, 0, 0));
    }
    assert_eq!(world.rows_of(&acme, 3).await, (1, 1, 1));
}

#[tokio::test]
async fn matching_probes_indexes_however_many_identities_there_are() {
    let world = World::new().await;
    for id in ["acme", "other"] {
        world.controller(id).await;
        world
            .run(&format!(
                "INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
                 SELECT '{id}', CASE n % 2 WHEN 0 THEN 'email' ELSE 'other' END, 'p' || n || '@example.com', n FROM generate_series(1, 20000) n"
            ))
            .await;
    }
    world.run("VACUUM (ANALYZE) subject_data.profile_identities").await;
    let session = world.db.session().await.unwrap();
    for (name, digest) in
        [("MATCH_SHA256", "sha256('x')"), ("MATCH_SHA1", "lethe.sha1('x')"), ("MATCH_MD5", "decode(md5('x'), 'hex')")]
    {
        let key = format!("lethe.identity_key('email', {digest})");
        let (_, statement) = all_statements().into_iter().find(|(one, _)| *one == name).unwrap();
        session.batch_execute(&format!("PREPARE {name} (text, int[], uuid[], bigint) AS {statement}")).await.unwrap();
        for count in [1, 200] {
            let list = |value: &str| format!("array_fill({value}, ARRAY[{count}])");
            let explain = format!("EXPLAIN (ANALYZE) EXECUTE {name}('acme', {}, {}, 1001)", list("1"), list(&key));
            let rows = session.raw().query(&explain, &[]).await.unwrap();
            let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            let plan = plan.join("\n");
            assert!(!plan.contains("Seq Scan"), "{plan}");
            assert!(plan.contains("Index Only Scan"), "{plan}");
            assert!(
                !plan.contains("profile_identities_p2"),
                "the other controller's partition is not even looked at: {plan}"
            );
        }
    }
}

#[tokio::test]
async fn the_database_normalises_and_digests_as_the_code_does() {
    let world = World::new().await;
    let space = [" ", "\t", "\n", "\r", "\u{b}", "\u{c}", "\u{a0}", "\u{2003}", ""];
    let middles = [
        "Ada@Example.COM",
        "vera@example.com",
        "fvtnr",
        "ÀDA@EXAMPLE.com",
        "İstanbul",
        "straße",
        "ǅ",
        "a b\tc",
        "\\",
        "'",
        "😀X",
        "K",
        "",
    ];
    let session = world.db.session().await.unwrap();
    let sql = "SELECT lethe.normalise_identity($1, $2), lethe.identity_sha256($1, $2), lethe.identity_sha1($1, $2), lethe.identity_md5($1, $2)";
    let statement = session.prepared(sql).await.unwrap();
    world.controller("acme").await;
    let stored = "INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
                  VALUES ('acme', $1, $2, 1) RETURNING by_sha256, by_sha1, by_md5";
    let stored = session.prepared(stored).await.unwrap();
    let by_reference = session.prepared("SELECT lethe.identity_key($1, $2)").await.unwrap();
    session.batch_execute("BEGIN").await.unwrap();
    for kind in [IdentityType::Email, IdentityType::Other, IdentityType::AndroidId] {
        for before in space {
            for middle in middles {
                for after in space {
                    let value = format!("{before}{middle}{after}");
                    let row = session.raw().query_one(&statement, &[&kind.as_str(), &value]).await.unwrap();
                    let normal = kind.normalise(&value);
                    assert_eq!(row.get::<_, &str>(0), normal, "{kind:?} {value:?}");
                    for (column, format) in
                        [(1, IdentityFormat::Sha256), (2, IdentityFormat::Sha1), (3, IdentityFormat::Md5)]
                    {
                        assert_eq!(crypto::hex(row.get(column)), format.encode(&normal), "{kind:?} {value:?}");
                    }
                    // What is stored, what the reference makes of it, and what a request looks for.
                    session.batch_execute("TRUNCATE subject_data.profile_identities").await.unwrap();
                    let keys = session.raw().query_one(&stored, &[&kind.as_str(), &value]).await.unwrap();
                    for (column, format) in
                        [(0, IdentityFormat::Sha256), (1, IdentityFormat::Sha1), (2, IdentityFormat::Md5)]
                    {
                        let key: uuid::Uuid = keys.get(column);
                        let digest: Vec<u8> = row.get(column + 1);
                        let reference =
                            session.raw().query_one(&by_reference, &[&kind.as_str(), &digest]).await.unwrap();
                        assert_eq!(key, reference.get::<_, uuid::Uuid>(0), "{kind:?} {value:?}");
                        let asked = Identity { identity_type: kind, format, value: format.encode(&normal) };
                        assert_eq!(asked.key(), Some((format, key)), "{kind:?} {value:?}");
                    }
                    let raw = Identity { identity_type: kind, format: IdentityFormat::Raw, value: normal };
                    assert_eq!(raw.key(), Some((IdentityFormat::Sha256, keys.get(0))), "{kind:?} {value:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn status_and_group_queries_show_a_controller_its_own_requests_only() {
    let world = World::new().await;
    for id in ["acme", "other"] {
        world.controller(id).await;
    }
    let _workers = Worker::several(&world, &INTAKE, &[]).await;
    let publisher = Publisher::connect(&world).await;
    let requests: Vec<Request> = (0..1_003).map(|_| Request::erasure("ada@example.com").group("the group")).collect();
    let all: Vec<_> = requests.iter().map(|one| publisher.sending("acme", "request", one)).collect();
    publisher.send_all(&all).await;
    publisher.request("other", &Request::erasure("ada@example.com").group("the group")).await;
    publisher.request("acme", &Request::erasure("ada@example.com").group("another")).await;
    eventually("all are on record", seconds(20), async || world.in_status("pending").await == 1_005).await;

    let status = publisher.status("acme", &requests[0].id).await;
    let body = status.json();
    let fields: Vec<&String> = body.as_object().unwrap().keys().collect();
    let expected = [
        "api_version",
        "controller_id",
        "expected_completion_time",
        "extensions",
        "group_id",
        "request_status",
        "results_count",
        "results_url",
        "subject_request_id",
    ];
    assert_eq!((status.status, fields), (200, expected.map(str::to_owned).iter().collect::<Vec<_>>()));
    assert_eq!((&body["request_status"], &body["group_id"]), (&json!("pending"), &json!("the group")));
    assert!(status.is_signed("X-OpenDSR-Signature"));
    assert_eq!(publisher.status("other", &requests[0].id).await.status, 404);
    assert_eq!(publisher.status("acme", "no-uuid").await.status, 400);

    let ask = async |controller: &str, body: serde_json::Value| {
        publisher.ask(&publisher.sending(controller, "group", body.to_string())).await
    };
    let ids = |answer: &lethe_testing::Answer| -> Vec<String> {
        answer
            .json()
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["subject_request_id"].as_str().unwrap().to_owned())
            .collect()
    };
    let first = ask("acme", json!({"group_id": "the group"})).await;
    assert_eq!(ids(&first).len(), 1_000);
    let second = ask("acme", json!({"group_id": "the group", "cursor": first.headers["cursor"]})).await;
    assert!(!second.headers.contains_key("cursor"));
    let mut seen = [ids(&first), ids(&second)].concat();
    let mut sent: Vec<String> = requests.iter().map(|one| one.id.clone()).collect();
    seen.sort();
    sent.sort();
    assert_eq!(seen, sent, "each once, over both pages");
    assert_eq!(ids(&ask("other", json!({"group_id": "the group"})).await).len(), 1);
    assert_eq!(ids(&ask("acme", json!({"group_id": "nobody's"})).await).len(), 0);
    assert_eq!(ask("acme", json!({"group_id": "the group", "cursor": "x"})).await.status, 400);
    assert_eq!(ask("acme", json!({})).await.status, 400);
}
