//! What callbacks and lists read of a request: some hundred bytes, however large it is.

use std::sync::Arc;

use lethe_db::Db;
use lethe_db::callbacks::{self, EndpointLimits};
use lethe_db::reporting::Reporting;
use lethe_db::requests;
use lethe_domain::request::{EndpointId, RequestKey};
use lethe_testing::proxy::{Proxy, Way};
use lethe_testing::wait::{becomes, seconds};
use lethe_testing::{Gateway, Publisher, Receiver, Request, SECONDS, Worker, World};

/// Requests of one group with so many bytes that do not compress, and a callback each.
async fn large(world: &World, requests: i32, bytes: i32) -> Vec<u8> {
    world.controller("acme").await;
    let keys = world.keys();
    let digest = keys.group_digest("acme", "g");
    let session = world.db.session().await.unwrap();
    session
        .batch_execute(
            "INSERT INTO lethe.endpoints (controller_id, scheme, host, port) VALUES ('acme', 'https', 'example.com', 443)",
        )
        .await
        .unwrap();
    // What is sealed as a whole cannot be opened: who reads it fails.
    let sql = "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                           content_digest, submitted_time, received_at, expected_completion_time,
                                           group_digest, details_week)
               SELECT 'acme', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', sha256('x'), now(), now(), now(), $1,
                      w.week
                 FROM lethe.week_of(now()) w, generate_series(1, $2::int) AS n
               RETURNING subject_request_id";
    let rows = session.raw().query(sql, &[&digest, &requests]).await.unwrap();
    let parser = lethe_domain::opendsr::Parser {
        extension_domains: vec![],
        denied: lethe_domain::opendsr::DeniedValues::default(),
        addresses: "".parse().unwrap(),
    };
    let body = Request::erasure("ada@example.com").callback("https://example.com/x").group("g").bytes();
    let request = parser.request(&body, None).unwrap();
    let (ids, sealed): (Vec<uuid::Uuid>, Vec<Vec<u8>>) = rows
        .iter()
        .map(|row| {
            let id: lethe_domain::request::SubjectRequestId = row.get(0);
            let sealed = Reporting::seal(&keys, &"acme".parse().unwrap(), id, &request).unwrap();
            (row.get::<_, uuid::Uuid>(0), sealed)
        })
        .unzip();
    let sql = "INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, sealed_reporting)
               SELECT r.details_week, r.request_key, r.controller_id,
                      (SELECT string_agg(sha256((r.request_key || ' ' || part)::bytea), '')
                         FROM generate_series(1, $3 / 32) AS part), q.sealed
                 FROM unnest($1::uuid[], $2::bytea[]) AS q (id, sealed)
                 JOIN lethe.requests r ON r.subject_request_id = q.id";
    session.raw().execute(sql, &[&ids, &sealed, &bytes]).await.unwrap();
    world
        .run(
            "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, 0, 0, endpoint_id, 'pending', now(), 'ready', now(), now()
               FROM lethe.requests, lethe.endpoints",
        )
        .await;
    digest
}

/// A pool whose traffic is counted.
async fn counted(world: &World) -> (Arc<Proxy>, Db) {
    let proxy = Arc::new(Proxy::start(&world.database_url, Way::Open).await);
    let db = Db::new(&proxy.through(&world.database_url), 1, "lethe-testing").unwrap();
    db.ping().await.unwrap();
    (proxy, db)
}

#[tokio::test]
async fn a_group_list_and_a_claim_cost_kilobytes_whatever_the_requests_weigh() {
    let world = World::new().await;
    // 1,001 requests of 16 KiB: 16 MiB in all.
    let digest = large(&world, 1_001, 16 * 1024).await;
    let (proxy, db) = counted(&world).await;
    let (acme, keys) = ("acme".parse().unwrap(), world.keys());
    let session = db.session().await.unwrap();
    let before = proxy.received();
    let rows = requests::of_group(&session, &acme, &digest, RequestKey(0), 1_001).await.unwrap();
    assert_eq!(rows.len(), 1_001);
    assert!(rows.iter().all(|row| !row.is_purged));
    let listed = proxy.received() - before;
    assert!(listed < 400 * 1024, "{listed} bytes for a list of 1,001");

    let before = proxy.received();
    let limits = EndpointLimits { in_flight: 64, lease: seconds(60) };
    let claimed = callbacks::claim(&session, &keys, limits, &[(EndpointId(1), 64)]).await.unwrap();
    assert_eq!(claimed.len(), 64);
    for one in &claimed {
        assert_eq!((one.url.as_str(), one.group_id.as_deref()), ("https://example.com/x", Some("g")));
    }
    let read = proxy.received() - before;
    assert!(read < 64 * 1024, "{read} bytes for a claim of 64");
    drop(session);
    // Nor is it read within the database: the large column lies apart.
    let tx = db.begin("test").await.unwrap();
    requests::of_group(&tx, &acme, &digest, RequestKey(0), 1_001).await.unwrap();
    let more = EndpointLimits { in_flight: 128, ..limits };
    assert_eq!(callbacks::claim(&tx, &keys, more, &[(EndpointId(1), 64)]).await.unwrap().len(), 64);
    let apart =
        "SELECT pg_stat_get_xact_blocks_fetched(reltoastrelid) FROM pg_class WHERE relname LIKE 'request\\_details\\_w%'
            AND relkind = 'r'";
    let fetched: i64 = tx.raw().query_one(apart, &[]).await.unwrap().get(0);
    assert_eq!(fetched, 0, "blocks of large values");
    tx.batch_execute("SELECT sha256(sealed_request) FROM lethe.request_details LIMIT 1").await.unwrap();
    let fetched: i64 = tx.raw().query_one(apart, &[]).await.unwrap().get(0);
    assert!(fetched > 0, "they would be seen");
    tx.rollback().await;
}

/// Requests of the release before have no such column.
#[tokio::test]
async fn what_was_received_before_is_reported_all_the_same() {
    let world = World::new().await;
    world.controller("acme").await;
    let receiver = Receiver::start().await;
    let workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let requests: Vec<Request> =
        (0..3).map(|_| Request::erasure("ada@example.com").group("g").callback(&receiver.url("/x"))).collect();
    for request in &requests {
        publisher.request("acme", request).await;
    }
    world.count_reaches("completed", 3).await;
    let sealed = "SELECT count(*) FROM lethe.request_details WHERE octet_length(sealed_reporting) BETWEEN 30 AND 300";
    assert_eq!(world.one::<i64>(sealed, &[]).await, 3);
    let newest = &requests[2].id;
    world
        .run(&format!(
            "UPDATE lethe.request_details SET sealed_reporting = NULL FROM lethe.requests r
              WHERE r.request_key = request_details.request_key AND r.subject_request_id <> '{newest}'"
        ))
        .await;
    let _courier = Worker::start(&world, "callback-courier", SECONDS).await;
    becomes("delivered callbacks", seconds(20), 9, async || receiver.statuses("/x").len()).await;
    assert!(receiver.all().iter().all(|one| one.json()["group_id"] == "g"));
    let gateway = Gateway::start(&world, &[]).await;
    let acme = gateway.caller(&world, "acme");
    for request in &requests {
        assert_eq!(acme.get(&format!("/v3/requests/{}", request.id)).await.json()["group_id"], "g");
    }
    let list = acme.get("/v3/requests?group_id=g").await.json();
    assert_eq!(list.as_array().unwrap().len(), 3);
    assert!(list.as_array().unwrap().iter().all(|one| one["group_id"] == "g"));
    drop(workers);
    // Once the week is gone.
    world.run("SELECT lethe.drop_week(week, '-10 years') FROM lethe.detail_weeks").await;
    let list = acme.get("/v3/requests?group_id=g").await.json();
    assert!(list.as_array().unwrap().iter().all(|one| one["group_id"].is_null()), "{list}");
}
