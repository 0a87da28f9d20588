//! No controller can see, count or change what is another's: by no call, and not by the database's own word.

use std::collections::{BTreeMap, BTreeSet};

use lethe_testing::{Gateway, Receiver, Request, SECONDS, Worker, World};
use serde_json::json;

/// Tables that the gateway's role may read though they are under no policy: they hold nothing of any controller.
const SHARED: [&str; 7] = [
    "lethe.batches",
    "lethe.calendars",
    "lethe.clock",
    "lethe.detail_weeks",
    "lethe.installation",
    "lethe.lanes",
    "lethe.schema_support",
];

#[tokio::test]
async fn no_call_gives_away_that_another_has_a_request() {
    let world = World::new().await;
    let people = [world.controller("acme").await, world.controller("other").await];
    for controller in &people {
        world.person(controller, 7, "ada@example.com", 3).await;
    }
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let _compiler = Worker::start(&world, "access-compiler", SECONDS).await;
    let (acme, other) = (gateway.caller(&world, "acme"), gateway.caller(&world, "other"));
    let request = Request::access("ada@example.com").group("family");
    acme.request(&request).await;
    acme.result_path(&request.id).await;
    let unknown = uuid::Uuid::new_v4().to_string();
    for path in ["/v1/opengdpr_requests", "/v1/status", "/v2/requests", "/v2/status", "/v3/requests", "/v3/status"] {
        let (theirs, nobodys) =
            (other.get(&format!("{path}/{}", request.id)).await, other.get(&format!("{path}/{unknown}")).await);
        assert_eq!((theirs.status, &theirs.body), (404, &nobodys.body), "as if there were none: {path}");
        if !path.ends_with("status") {
            let (theirs, nobodys) = (
                other.delete(&format!("{path}/{}", request.id)).await,
                other.delete(&format!("{path}/{unknown}")).await,
            );
            assert_eq!((theirs.status, &theirs.body), (404, &nobodys.body), "{path}");
            assert_eq!(other.get(&format!("{path}?group_id=family")).await.json(), json!([]), "{path}");
        }
    }
    // The same id is another's own, and free.
    let same = Request::erasure("ada@example.com").with("subject_request_id", json!(request.id));
    assert_eq!(other.post("/v3/requests", &same).await.status, 201);
    assert_eq!(acme.status(&request.id).await.json()["request_status"], json!("completed"));
    // A cursor of one is of no use to the other: it is a position in one's own list.
    let key: i64 = world.one("SELECT min(request_key) FROM lethe.requests", &[]).await;
    let list = other.get(&format!("/v3/requests?group_id=family&cursor={}", key - 1)).await;
    assert_eq!(list.json(), json!([]));
}

/// A world where two controllers have a row in every table that can have one.
async fn filled() -> World {
    let world = World::new().await;
    let receiver = Receiver::start().await;
    for id in ["acme", "other"] {
        let controller = world.controller(id).await;
        world.person(&controller, 7, "ada@example.com", 3).await;
    }
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let workers = ["access-compiler", "erasure-executor", "callback-courier"];
    let _workers = Worker::several(&world, &workers, SECONDS).await;
    for id in ["acme", "other"] {
        let caller = gateway.caller(&world, id);
        let access = Request::access("ada@example.com").callback(&receiver.url("/x"));
        caller.request(&access).await;
        let path = caller.result_path(&access.id).await;
        assert_eq!(gateway.get(&path).await.status, 200);
        let erasure = Request::erasure("ada@example.com").callback(&receiver.url("/x"));
        caller.request(&erasure).await;
        world.reaches(&erasure.id, "completed").await;
        world.person(&id.parse().unwrap(), 7, "ada@example.com", 3).await;
    }
    // The calendar of seconds forgets these at once.
    world
        .run(
            "INSERT INTO lethe.early_cancellations
              SELECT controller_id, gen_random_uuid(), lethe.now(), lethe.now() + '1 day' FROM lethe.controllers;
             INSERT INTO lethe.past_requests (controller_id, subject_request_id, request_key, api_version, request_type, status,
                                              content_digest, received_at, expected_completion_time, ended_at)
              SELECT controller_id, gen_random_uuid(), 0, '3.0', 'erasure', 'completed', sha256('x'), now(), now(), now()
                FROM lethe.controllers",
        )
        .await;
    world
}

/// Tables of both schemas, by name; partitions too, since a grant on one would go around the policy of its parent.
async fn tables(world: &World, condition: &str) -> BTreeSet<String> {
    let sql = format!(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname IN ('lethe', 'subject_data') AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND {condition}"
    );
    world.all(&sql, &[]).await.into_iter().collect()
}

const PRIVILEGED: &str =
    "(has_table_privilege('lethe_gateway', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
                           OR has_any_column_privilege('lethe_gateway', c.oid, 'SELECT, INSERT, UPDATE, REFERENCES'))";

#[tokio::test]
async fn every_table_is_closed_to_the_gateway_or_under_a_policy_or_shared_on_purpose() {
    let world = World::new().await;
    world.controller("acme").await;
    let open = tables(&world, PRIVILEGED).await;
    let policed = tables(
        &world,
        "c.relrowsecurity AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polpermissive
            AND p.polroles = ARRAY['lethe_gateway'::regrole::oid]
            AND pg_get_expr(p.polqual, p.polrelid) ~ '(acting_controller|requests)'
            AND (p.polcmd = '*'))",
    )
    .await;
    let shared: BTreeSet<String> = SHARED.iter().map(|name| (*name).to_owned()).collect();
    let unexplained: Vec<&String> =
        open.iter().filter(|name| !policed.contains(*name) && !shared.contains(*name)).collect();
    assert!(unexplained.is_empty(), "open to the gateway under no policy: {unexplained:?}; see migration V0007");
    assert!(shared.is_subset(&open), "{open:?}");
    assert!(open.contains("lethe.requests") && open.contains("subject_data.profile_identities"), "{open:?}");
    for closed in ["lethe.controllers", "lethe.audit_heads", "subject_data.profiles", "subject_data.event_batches"] {
        assert!(!open.contains(closed), "{closed}");
    }
    // What is shared holds no controller's id, and nothing of it can be changed but by adding a row.
    let sql = "SELECT table_name::text FROM information_schema.columns
                WHERE column_name = 'controller_id' AND table_schema || '.' || table_name = ANY ($1)";
    assert_eq!(world.all::<String>(sql, &[&SHARED.as_slice()]).await, Vec::<String>::new());
    let changes = tables(&world, "has_any_column_privilege('lethe_gateway', c.oid, 'UPDATE')").await;
    let expected = BTreeSet::from(["lethe.requests".to_owned(), "lethe.callbacks".to_owned()]);
    assert_eq!(changes, expected);
    // The role is nobody: it has no membership, cannot log in, and passes by no policy; and no function lends it more
    // than the three that open something to whoever has the secret, and the one that opens a week of details. Triggers cannot
    // be called.
    let role = "SELECT NOT (rolcanlogin OR rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb)
                   AND NOT EXISTS (SELECT FROM pg_auth_members m WHERE m.member = r.oid)
                  FROM pg_roles r WHERE rolname = 'lethe_gateway'";
    assert!(world.one::<bool>(role, &[]).await);
    let sql = "SELECT n.nspname || '.' || p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                WHERE n.nspname IN ('lethe', 'subject_data') AND p.prosecdef
                  AND p.prorettype <> 'trigger'::regtype ORDER BY 1";
    let lent: Vec<String> = world.all(sql, &[]).await;
    assert_eq!(
        lent,
        [
            "lethe.find_api_key(text)",
            "lethe.find_result(bytea)",
            "lethe.open_week(timestamp with time zone)",
            "lethe.record_download(bytea,bigint,bigint,integer)"
        ]
    );
}

/// What a query counts under the gateway's role, acting for `controller`; an error where it is not allowed.
async fn seen(world: &World, controller: Option<&str>, sql: &str) -> Result<i64, String> {
    let mut session = world.db.session().await.unwrap();
    let tx = session.client().transaction().await.unwrap();
    tx.batch_execute("SET LOCAL ROLE lethe_gateway").await.unwrap();
    if let Some(controller) = controller {
        tx.batch_execute(&format!("SET LOCAL lethe.controller_id = '{controller}'")).await.unwrap();
    }
    let rows = tx.query(sql, &[]).await;
    rows.map(|rows| rows.first().map_or(0, |row| row.get(0)))
        .map_err(|error| error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()))
}

#[tokio::test]
async fn under_the_gateways_role_only_the_rows_of_the_acting_controller_exist() {
    let world = filled().await;
    let open: Vec<String> =
        tables(&world, PRIVILEGED).await.into_iter().filter(|name| !SHARED.contains(&name.as_str())).collect();
    let owned = |table: &str, id: &str| {
        let by_request = ["lethe.callbacks", "lethe.results"];
        if by_request.contains(&table) {
            format!("request_key IN (SELECT request_key FROM lethe.requests WHERE controller_id = '{id}')")
        } else if table == "lethe.audit_seals" {
            format!("chain = '{id}'")
        } else {
            format!("controller_id = '{id}'")
        }
    };
    let mut sizes = BTreeMap::new();
    for table in &open {
        for id in ["acme", "other"] {
            let own: i64 = world.one(&format!("SELECT count(*) FROM {table} WHERE {}", owned(table, id)), &[]).await;
            assert!(own > 0, "{table} shows nothing: {id} has no row in it");
            let count = format!("SELECT count(*) FROM {table}");
            assert_eq!(seen(&world, Some(id), &count).await, Ok(own), "{table}, acting for {id}");
            sizes.insert((table.clone(), id), own);
        }
        let count = format!("SELECT count(*) FROM {table}");
        for nobody in [None, Some(""), Some("Acme"), Some("acme%")] {
            assert_eq!(seen(&world, nobody, &count).await, Ok(0), "{table}, acting for {nobody:?}");
        }
    }
    assert_eq!(open.len(), 10, "{open:?}");
    // Partitions are no way around, nor are the tables that are closed.
    let closed = tables(&world, &format!("NOT {PRIVILEGED}")).await;
    assert!(closed.iter().filter(|name| name.starts_with("subject_data.")).count() >= 8, "{closed:?}");
    for table in closed {
        assert_eq!(
            seen(&world, Some("acme"), &format!("SELECT count(*) FROM {table}")).await,
            Err("42501".to_owned()),
            "{table}"
        );
    }
    let theirs = "(SELECT request_key FROM lethe.requests WHERE controller_id = 'other')";
    let changes = [
        "WITH c AS (UPDATE lethe.requests SET status = 'cancelled' RETURNING controller_id) SELECT count(*) FROM c WHERE controller_id <> 'acme'".to_owned(),
        "WITH c AS (DELETE FROM lethe.early_cancellations RETURNING controller_id) SELECT count(*) FROM c WHERE controller_id <> 'acme'".to_owned(),
        format!("WITH c AS (UPDATE lethe.callbacks SET next_attempt_at = next_attempt_at WHERE request_key IN {theirs} RETURNING 1) SELECT count(*) FROM c"),
    ];
    // Completed ones cannot be cancelled at all; here the policy is asked, so the guard of the status, which is with the trail, stands aside.
    world.run("ALTER TABLE lethe.requests DISABLE TRIGGER audit_changed").await;
    for change in &changes {
        assert_eq!(seen(&world, Some("acme"), change).await, Ok(0), "{change}");
    }
    // Nothing can be written for another, and no row be given away.
    let other_key: i64 =
        world.one("SELECT min(request_key) FROM lethe.requests WHERE controller_id = 'other'", &[]).await;
    let writes = [
        "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane, content_digest,
            submitted_time, received_at, expected_completion_time)
         VALUES ('other', gen_random_uuid(), '3.0', 'erasure', 'pending', 'erasure', decode(repeat('00', 32), 'hex'), now(), now(), now())"
            .to_owned(),
        format!(
            "INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request)
             SELECT max(week), {other_key}, 'other', 'x' FROM lethe.detail_weeks"
        ),
        "SELECT lethe.drop_week(1, '0')".to_owned(),
        "SELECT lethe.week_of(now())".to_owned(),
        "DELETE FROM lethe.detail_weeks".to_owned(),
        "INSERT INTO lethe.endpoints (controller_id, scheme, host, port) VALUES ('other', 'https', 'x', 443)".to_owned(),
        "UPDATE lethe.requests SET controller_id = 'other'".to_owned(),
        "DELETE FROM lethe.requests".to_owned(),
        "DELETE FROM subject_data.profile_identities".to_owned(),
        "UPDATE lethe.clock SET shift = '1 year'".to_owned(),
        "UPDATE lethe.lanes SET closed_through = 'infinity'".to_owned(),
        "TRUNCATE lethe.batches".to_owned(),
    ];
    for write in &writes {
        assert_eq!(seen(&world, Some("acme"), write).await, Err("42501".to_owned()), "{write}");
    }
}
