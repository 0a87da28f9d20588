//! The schema: every statement fits it, it guards the state machine, and migrating is safe.

use lethe_db::Db;
use lethe_db::migrate::{self, migrate};
use lethe_domain::request::RequestStatus;
use lethe_tests::plans::all_statements;
use lethe_tests::{World, servers};

#[tokio::test]
async fn every_statement_can_be_prepared() {
    let world = World::new().await;
    let session = world.db.session().await.unwrap();
    let statements = all_statements();
    assert!(statements.len() > 50, "only {}", statements.len());
    for (name, sql) in statements {
        session.prepared(sql).await.unwrap_or_else(|error| panic!("{name}: {error}"));
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
    let db = || Db::new(&url, 2, "lethe-tests").unwrap();
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
