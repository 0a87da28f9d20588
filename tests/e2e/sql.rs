//! The schema: every statement fits it, it guards the state machine, and migrating is safe.

use std::collections::BTreeMap;

use lethe_db::Db;
use lethe_db::migrate::{self, Step, migrate};
use lethe_domain::crypto::{hex, sha256};
use lethe_domain::request::RequestStatus;
use lethe_testing::plans::{Kept, all_statements};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Worker, World, servers};

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let world = World::new().await;
    let session = world.db.session().await.unwrap();
    let statements = all_statements();
    assert!(statements.len() > 50, "only {}", statements.len());
    for (name, sql) in statements {
        session.prepared(sql).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        // The server's log and statistics show the text.
        assert!(sql.starts_with("/* lethe_") && sql.contains(&format!("::{name} */")), "{name}: {sql}");
    }
}

#[tokio::test]
async fn what_was_erased_does_not_wait_for_a_fifth_of_the_table_to_be_dead() {
    let world = World::new().await;
    world.controller("acme").await;
    let options = "SELECT i.inhparent::regclass || ' ' || array_to_string(c.reloptions || t.reloptions, ' ')
                     FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class t ON t.oid = c.reltoastrelid
                    WHERE c.relnamespace = 'subject_data'::regnamespace AND c.relkind = 'r' ORDER BY 1";
    let soon = "autovacuum_vacuum_scale_factor=0.001";
    let wanted =
        ["event_batches", "profile_identities", "profiles"].map(|table| format!("subject_data.{table} {soon} {soon}"));
    assert_eq!(world.all::<String>(options, &[]).await, wanted);
}

/// What is small for good, or is folded as it grows.
const SMALL: [&str; 7] = [
    "batches",
    "callback_deltas",
    "detail_weeks",
    "import_progress",
    "installation",
    "pg_publication",
    "request_deltas",
];

#[tokio::test]
async fn no_plan_that_is_kept_reads_a_table_that_grows_even_if_it_was_made_while_that_was_empty() {
    fn read_as_a_whole(node: &serde_json::Value, found: &mut Vec<String>) {
        if node["Node Type"] == "Seq Scan" {
            found.push(node["Relation Name"].as_str().unwrap().to_owned());
        }
        node["Plans"].as_array().into_iter().flatten().for_each(|child| read_as_a_whole(child, found));
    }
    let world = World::new().await;
    let plans = Kept::plan(&world).await.plans().await;
    assert!(plans.len() > 100, "only {}", plans.len());
    for (sql, plan) in plans {
        let mut found = Vec::new();
        read_as_a_whole(&plan[0]["Plan"], &mut found);
        found.retain(|table| !SMALL.contains(&table.as_str()));
        assert!(found.is_empty(), "{found:?} as a whole: {sql}");
    }
}

#[tokio::test]
async fn the_database_has_the_same_state_machine_as_the_code() {
    let world = World::new().await;
    world.controller("acme").await;
    let insert = |status: RequestStatus| {
        format!(
            "INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, request_type, status, lane,
                                         content_digest, submitted_time, received_at, expected_completion_time)
             VALUES ('acme', gen_random_uuid(), '3.0', 'erasure', '{status}', 'erasure', sha256('x'), now(), now(), now())"
        )
    };
    let session = world.db.session().await.unwrap();
    // What a request goes through on its way to a status, the first one left out.
    let path = |status: RequestStatus| {
        let mut path: Vec<_> = std::iter::successors(Some(status), |status| status.comes_from()).collect();
        path.pop();
        path.reverse();
        path
    };
    for &from in RequestStatus::ALL {
        let born = session.batch_execute(&insert(from)).await;
        assert_eq!(born.is_ok(), from.comes_from().is_none(), "born as {from}");
        for &to in RequestStatus::ALL {
            world.run("TRUNCATE lethe.requests CASCADE").await;
            world.run(&insert(RequestStatus::Pending)).await;
            for step in path(from) {
                world.run(&format!("UPDATE lethe.requests SET status = '{step}'")).await;
            }
            let moved = session.batch_execute(&format!("UPDATE lethe.requests SET status = '{to}'")).await;
            assert_eq!(moved.is_ok(), from == to || to.comes_from() == Some(from), "{from} to {to}");
            if let Err(error) = moved {
                assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("LT002"));
            }
        }
    }
}

/// ADR 0024: an index that names one of them, even in its condition, makes each change of status a change of all indexes.
#[tokio::test]
async fn no_index_names_what_changes_with_the_status() {
    let world = World::new().await;
    let indexes = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'lethe.requests'::regclass";
    let indexes: Vec<String> = world.all(indexes, &[]).await;
    assert!(indexes.len() >= 5, "{indexes:?}");
    for index in indexes {
        for column in ["status", "slice_id", "in_progress_at", "completed_at"] {
            assert!(!index.contains(column), "{index}");
        }
    }
}

#[tokio::test]
async fn a_batch_goes_one_way_only() {
    let world = World::new().await;
    world
        .run("INSERT INTO lethe.calendars (erasure_schedule, expedited_schedule, access_schedule, waiting_period, completion_margin)
              VALUES ('* * * * *', '* * * * *', '* * * * *', '0', '0')")
        .await;
    let states = ["open", "closed", "released", "completed"];
    let session = world.db.session().await.unwrap();
    for (from, first) in states.iter().enumerate() {
        for (to, second) in states.iter().enumerate() {
            world.run("TRUNCATE lethe.batches CASCADE").await;
            world.run("INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version) SELECT 'access', now(), now(), version FROM lethe.calendars").await;
            for step in &states[1..=from.max(1)] {
                if from > 0 {
                    world.run(&format!("UPDATE lethe.batches SET state = '{step}'")).await;
                }
            }
            let moved = session.batch_execute(&format!("UPDATE lethe.batches SET state = '{second}'")).await;
            assert_eq!(moved.is_ok(), to == from || to == from + 1, "{first} to {second}");
        }
    }
}

#[tokio::test]
async fn what_others_refer_to_is_never_removed() {
    let world = World::new().await;
    world.controller("acme").await;
    let session = world.db.session().await.unwrap();
    for table in ["controllers", "batches", "slices", "requests", "endpoints", "callbacks"] {
        let removed = session.batch_execute(&format!("DELETE FROM lethe.{table}")).await.expect_err(table);
        assert_eq!(removed.code().map(tokio_postgres::error::SqlState::code), Some("LT003"), "{table}");
    }
}

#[tokio::test]
async fn migrating_twice_or_at_the_same_time_is_safe() {
    let name = servers::unique_name();
    let url = servers::create_empty_database(&name).await;
    let db = || Db::new(&url, 2, "lethe-testing").unwrap();
    assert!(migrate::check_version(&db()).await.is_err(), "workers do not start on an empty database");
    let (first, second, third) = (db(), db(), db());
    let outcomes = futures_util::join!(migrate(&first), migrate(&second), migrate(&third));
    let mut ran = [outcomes.0.unwrap().len(), outcomes.1.unwrap().len(), outcomes.2.unwrap().len()];
    ran.sort_unstable();
    assert!(ran[2] >= 5 && ran[..2] == [0, 0], "one of them does it all: {ran:?}");
    assert_eq!(migrate(&first).await.unwrap(), Vec::<String>::new());
    migrate::check_version(&first).await.unwrap();
    drop((first, second, third));
    servers::drop_database(&name).await;
}

/// What there is in the database once it is migrated, as it might have been written by hand: tables with their constraints,
/// indexes, triggers and policies, then views and functions. By the catalogue, so that it is the same on each version of
/// PostgreSQL.
async fn schema_of(world: &World) -> String {
    let tables = "
        SELECT format(E'CREATE TABLE %s (\\n%s\\n)%s;\\n', c.oid::regclass, lines.text,
                      CASE WHEN c.relkind = 'p' THEN ' PARTITION BY ' || pg_get_partkeydef(c.oid) ELSE '' END)
               || coalesce((SELECT string_agg(format(E'%s;\\n', pg_get_indexdef(i.indexrelid)), '' ORDER BY i.indexrelid::regclass::text)
                              FROM pg_index i
                             WHERE i.indrelid = c.oid
                               AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = i.indexrelid)), '')
               || coalesce((SELECT string_agg(format(E'%s;\\n', pg_get_triggerdef(t.oid)), '' ORDER BY t.tgname)
                              FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal), '')
               || CASE WHEN c.relrowsecurity THEN format(E'ALTER TABLE %s ENABLE ROW LEVEL SECURITY;\\n', c.oid::regclass) ELSE '' END
               || coalesce((SELECT string_agg(format(E'CREATE POLICY %I ON %s FOR %s USING (%s);\\n', polname, c.oid::regclass,
                                                     CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                                                                 WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                                                     coalesce(pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))),
                                              '' ORDER BY polname)
                              FROM pg_policy WHERE polrelid = c.oid), '')
          FROM pg_class c
         CROSS JOIN LATERAL (
               SELECT string_agg('    ' || line, E',\\n' ORDER BY kind, place, line) AS text
                 FROM (SELECT 1 AS kind, a.attnum AS place,
                              format('%I %s%s%s', a.attname, format_type(a.atttypid, a.atttypmod),
                                     CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END,
                                     CASE WHEN a.attidentity <> '' THEN ' GENERATED AS IDENTITY'
                                          WHEN a.attgenerated <> '' THEN ' GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') STORED'
                                          WHEN d.adbin IS NOT NULL THEN ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid)
                                          ELSE '' END) AS line
                         FROM pg_attribute a
                         LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                       UNION ALL
                       SELECT 2, 0, format('CONSTRAINT %I %s', conname, pg_get_constraintdef(oid))
                         FROM pg_constraint WHERE conrelid = c.oid AND contype NOT IN ('n', 't')) lines) lines
         WHERE c.relnamespace = ANY (ARRAY['lethe', 'subject_data']::regnamespace[]) AND c.relkind IN ('r', 'p')
           AND NOT c.relispartition AND c.relname <> 'refinery_schema_history'
         ORDER BY c.oid::regclass::text";
    let views = "
        SELECT format(E'CREATE VIEW %s AS\\n%s\\n', oid::regclass, pg_get_viewdef(oid)) FROM pg_class
         WHERE relnamespace = 'lethe'::regnamespace AND relkind = 'v' ORDER BY oid::regclass::text";
    let functions = "
        SELECT rtrim(pg_get_functiondef(oid), E'\\n') || E';\\n' FROM pg_proc
         WHERE pronamespace = ANY (ARRAY['lethe', 'subject_data']::regnamespace[]) AND prokind = 'f'
         ORDER BY oid::regprocedure::text";
    let mut schema = vec![
        "-- The schema as all migrations leave it. Made by `make schema`; a test holds it against them.\n".to_owned(),
    ];
    let session = world.db.session().await.unwrap();
    // So that every name is written in full.
    session.batch_execute("SET search_path TO ''").await.unwrap();
    for part in [tables, views, functions] {
        schema.extend(session.raw().query(part, &[]).await.unwrap().iter().map(|row| row.get::<_, String>(0)));
    }
    schema.join("\n")
}

#[tokio::test]
async fn the_current_schema_is_written_down() {
    let world = World::new().await;
    let schema = schema_of(&world).await;
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/db/schema/current.sql");
    if std::env::var_os("LETHE_WRITE_SCHEMA").is_some() {
        std::fs::write(&file, &schema).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = schema.lines().zip(written.lines()).find(|(now, then)| now != then);
    assert!(
        schema == written,
        "shared/db/schema/current.sql is not what the migrations make; run `make schema`: {differs:?}"
    );
}

/// Each function has its live body, with the reasons for it, in a file of its topic.
#[tokio::test]
async fn the_functions_are_what_their_files_say() {
    let world = World::new().await;
    let session = world.db.session().await.unwrap();
    let live = "SELECT oid::regprocedure::text, pg_get_functiondef(oid) FROM pg_proc
                 WHERE pronamespace = 'lethe'::regnamespace ORDER BY 1";
    let functions = async || {
        let rows = session.raw().query(live, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<BTreeMap<String, String>>()
    };
    let before = functions().await;
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/db/schema/functions");
    let mut said = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        said += text.matches("CREATE OR REPLACE FUNCTION lethe.").count();
        session.batch_execute(&text).await.unwrap();
    }
    assert_eq!(functions().await, before, "a file differs from what the migrations make");
    assert_eq!(said, before.len(), "each function is in one file");
}

const OF_A_LATER_RELEASE: &str = "INSERT INTO public.refinery_schema_history (version, name, applied_on, checksum)
     SELECT max(version) + 1, 'of_a_later_release', max(applied_on), '0' FROM public.refinery_schema_history";
const LEFT_BEHIND: &str = "start the worker of the release that migrated the database";

#[tokio::test]
async fn a_later_schema_is_used_as_long_as_it_holds_what_this_release_uses() {
    let world = World::new().await;
    world.run(OF_A_LATER_RELEASE).await;
    migrate::check_version(&world.db).await.unwrap();
    let mut worker = Worker::start(&world, "scheduler", &[]).await;
    world.run("UPDATE lethe.schema_support SET oldest_workers = oldest_workers + 1000").await;
    let refused = migrate::check_version(&world.db).await.unwrap_err().to_string();
    assert!(refused.contains(LEFT_BEHIND), "{refused}");
    // One that runs already drains, and does not start again.
    assert_eq!(worker.exit(seconds(30)).await.code(), Some(0));
    assert!(worker.log().contains(LEFT_BEHIND), "{}", worker.log());
    let mut worker = Worker::spawn(&world, "scheduler", &[]);
    assert_eq!(worker.exit(seconds(20)).await.code(), Some(1));
    assert!(worker.log().contains(LEFT_BEHIND), "{}", worker.log());
    // A later release has migrated, and not said yet whom it can go on with.
    world.run("DELETE FROM lethe.schema_support").await;
    assert!(migrate::check_version(&world.db).await.is_err());
}

#[tokio::test]
async fn an_earlier_release_takes_nothing_back() {
    let world = World::new().await;
    let oldest = async || world.one::<i32>("SELECT oldest_workers FROM lethe.schema_support", &[]).await;
    world.run("UPDATE lethe.schema_support SET oldest_workers = 1000").await;
    migrate(&world.db).await.unwrap();
    assert_eq!(oldest().await, 1000);
    world.run("UPDATE lethe.schema_support SET oldest_workers = 1").await;
    world.run(OF_A_LATER_RELEASE).await;
    let refused = migrate(&world.db).await.unwrap_err().to_string();
    assert!(refused.contains("a later release has migrated the database"), "{refused}");
    assert_eq!(oldest().await, 1, "it touches nothing");
}

/// Workers fail at a name that they do not know. So what a column may hold is what the code knows, and a longer list means
/// that workers of earlier releases cannot go on.
#[tokio::test]
async fn the_database_takes_the_names_that_the_code_knows() {
    use lethe_domain::opendsr::{ApiVersion, Regulation};
    use lethe_domain::request::{Approval, BatchState, CallbackState, Lane, RequestType, Stage};
    use lethe_domain::signature_algorithm::SignatureAlgorithm;
    macro_rules! known {
        ($($($column:literal),+ => $type:ty;)+) => {
            BTreeMap::from([$($(($column, <$type>::ALL.iter().map(|name| name.as_str()).collect::<Vec<_>>())),+),+])
        };
    }
    let known = known! {
        "requests.status", "callbacks.request_status" => RequestStatus;
        "requests.api_version" => ApiVersion;
        "requests.approval" => Approval;
        "requests.lane", "lanes.lane" => Lane;
        "requests.regulation" => Regulation;
        "requests.request_type" => RequestType;
        "controllers.signature_algorithm" => SignatureAlgorithm;
        "batches.state" => BatchState;
        "callbacks.state" => CallbackState;
        "slices.stage", "pauses.stage" => Stage;
    };
    let world = World::new().await;
    for (column, mut names) in known {
        let (table, column) = column.split_once('.').unwrap();
        let taken = "SELECT m[1] FROM pg_constraint c,
                            regexp_matches(pg_get_constraintdef(c.oid), '''([^'']+)''::text', 'g') m
                      WHERE c.conrelid = ('lethe.' || $1)::regclass AND c.conname = $1 || '_' || $2 || '_check'";
        let mut taken: Vec<String> = world.all(taken, &[&table, &column]).await;
        taken.sort();
        names.sort_unstable();
        assert_eq!(taken, names, "{table}.{column}; a longer list needs a higher OLDEST_WORKERS (db/src/migrate.rs)");
    }
}

#[tokio::test]
async fn a_migration_waits_for_nobody_long_and_is_tried_again() {
    let world = World::new().await;
    let (holder, watcher) = (world.db.session().await.unwrap(), world.db.session().await.unwrap());
    holder.batch_execute("BEGIN; LOCK TABLE public.refinery_schema_history IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let db = world.db.clone();
    let migrating = tokio::spawn(async move { migrate(&db).await });
    let waiting = async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'public.refinery_schema_history'::regclass)";
        watcher.value::<bool>(sql, &[]).await.unwrap()
    };
    eventually("it waits for the lock", seconds(30), waiting).await;
    eventually("it lets go of its place in the queue", seconds(30), async || !waiting().await).await;
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(migrating.await.unwrap().unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn what_takes_long_runs_beside_writers_and_is_begun_anew_where_it_was_interrupted() {
    const STEPS: &[Step] = &[
        Step::Rows {
            statement: "UPDATE public.many SET twice = 2 * n WHERE n IN (SELECT n FROM public.many WHERE twice IS NULL LIMIT 7)",
        },
        Step::Index { schema: "public", name: "many_twice", definition: "ON public.many (twice)" },
    ];
    let world = World::new().await;
    let (session, writer) = (world.db.session().await.unwrap(), world.db.session().await.unwrap());
    session
        .batch_execute(
            "CREATE TABLE public.many (n bigint PRIMARY KEY, twice bigint);
             INSERT INTO public.many SELECT n, CASE WHEN n < 3 THEN 1 END FROM generate_series(1, 100) n",
        )
        .await
        .unwrap();
    // Two rows are equal, so this fails half-way and leaves an index that nothing uses.
    session.batch_execute("CREATE UNIQUE INDEX CONCURRENTLY many_twice ON public.many (twice)").await.unwrap_err();
    let is_valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'public.many_twice'::regclass";
    assert!(!session.value::<bool>(is_valid, &[]).await.unwrap());
    migrate::run_steps(&session, STEPS).await.unwrap();
    assert!(session.value::<bool>(is_valid, &[]).await.unwrap());
    let wrong = "SELECT count(*) FROM public.many WHERE n >= 3 AND twice <> 2 * n";
    assert_eq!(session.value::<i64>(wrong, &[]).await.unwrap(), 0);
    // Writers go on while an index is built: it waits for them, they do not wait for it.
    session.batch_execute("DROP INDEX public.many_twice").await.unwrap();
    writer.batch_execute("BEGIN; INSERT INTO public.many VALUES (101, 202)").await.unwrap();
    let db = world.db.clone();
    let building = tokio::spawn(async move { migrate::run_steps(&db.session().await.unwrap(), STEPS).await });
    let waits = async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'
                                     AND datname = current_database())";
        world.one::<bool>(sql, &[]).await
    };
    eventually("the index waits for the writer", seconds(30), waits).await;
    writer.batch_execute("INSERT INTO public.many VALUES (102, 204); COMMIT").await.unwrap();
    building.await.unwrap().unwrap();
    assert!(session.value::<bool>(is_valid, &[]).await.unwrap());
}

/// What a database has run already is not run again: a change would be in new databases only.
#[test]
fn no_migration_is_changed_once_it_has_landed() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/db/schema/migrations");
    let mut files: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('V'))
        .collect();
    files.sort();
    let digest = |name: &String| hex(&sha256(&std::fs::read(folder.join(name)).unwrap()));
    let now: Vec<String> = files.iter().map(|name| format!("{}  {name}", digest(name))).collect();
    let landed = std::fs::read_to_string(folder.join("SHA256SUMS")).unwrap();
    let landed: Vec<&str> = landed.lines().collect();
    let changed: Vec<&&str> = landed.iter().filter(|line| !now.iter().any(|file| file == *line)).collect();
    assert!(changed.is_empty(), "write a new migration instead of changing one that has landed: {changed:?}");
    assert_eq!(now, landed, "add the new migration to SHA256SUMS: `sha256sum V*.sql >SHA256SUMS` in its folder");
}
