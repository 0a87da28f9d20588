//! What is exported is what is erased, row for row (contract 7).

use lethe_testing::erasure::{Receipt, receipt};
use lethe_testing::results::{open, unzip};
use lethe_testing::wait::{eventually, seconds};
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};
use serde_json::{Value, json};

/// Rows of the built-in store that a line stands for.
fn rows_in(line: &Value) -> usize {
    let Some(identities) = line.get("identities").and_then(Value::as_object) else { return 1 };
    let values = identities.values().map(|value| value.as_array().map_or(1, Vec::len)).sum::<usize>();
    values + usize::from(!line["created_at"].is_null())
}

fn parsed(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).unwrap();
    text.lines()
        .map(|line| {
            // As strict as a request is read: a key twice is an error.
            lethe_domain::opendsr::json::parse(line.as_bytes()).unwrap()
        })
        .collect()
}

/// One row of every kind: a profile with several identities of a type, identities without a profile, event batches with
/// and without one.
async fn plant(world: &World) {
    let acme = world.controller("acme").await;
    let profile = json!({"mpid": 801, "attributes": {"step": 2}, "audiences": ["secret"], "identities": {
        "email": ["first@example.com", "second@example.com"], "controller_customer_id": "c-801"}});
    world.profiles(&acme, &[profile.to_string()]).await;
    world
        .run(
            "INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
              VALUES ('acme', 'email', 'first@example.com', 802), ('acme', 'other', 'o-802', 802)",
        )
        .await;
    let batches = [(801, 1), (802, 2), (803, 3), (803, 4)].map(|(mpid, n)| json!({"mpid": mpid, "n": n}).to_string());
    world.event_batches(&acme, &batches).await;
    world.person(&acme, 900, "stranger@example.com", 2).await;
}

/// By address, and by the mpid that no address leads to.
fn asking(kind: &str) -> Request {
    Request::new(kind)
        .with("api_version", json!("2.0"))
        .with("subject_identities", json!([{"identity_type": "email", "identity_value": "FIRST@example.com"}]))
        .with("extensions", json!({"opendsr.mparticle.com": {"mpids": ["803"]}}))
}

#[tokio::test]
async fn a_row_of_every_kind_is_in_the_file_and_is_erased() {
    let world = World::new().await;
    plant(&world).await;
    let _workers = Worker::fleet(&world, SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let (access, portability) = (asking("access"), asking("portability"));
    for request in [&access, &portability] {
        publisher.request("acme", request).await;
        world.reaches(&request.id, "completed").await;
    }
    let lines = parsed(&open(&world, &access.id).await);
    let profile = json!({"controller_customer_id": "c-801", "email": ["first@example.com", "second@example.com"]});
    assert_eq!((&lines[0]["mpid"], &lines[0]["identities"]), (&json!(801), &profile));
    let bare = json!({"email": "first@example.com", "other": "o-802"});
    assert_eq!((&lines[1]["mpid"], &lines[1]["identities"]), (&json!(802), &bare));
    assert!(lines[1]["attributes"].is_null() && lines[1]["created_at"].is_null());
    let numbers: Vec<&Value> = lines[2..].iter().map(|line| &line["n"]).collect();
    assert_eq!(numbers, [&json!(1), &json!(2), &json!(3), &json!(4)]);
    let status = publisher.status("acme", &access.id).await.json();
    assert_eq!(status["results_count"], json!(lines.len()));
    let files = unzip(open(&world, &portability.id).await);
    assert_eq!(parsed(&files[0].1), lines[..2]);
    assert_eq!(parsed(&files[1].1), lines[2..]);

    let erasure = asking("erasure");
    publisher.request("acme", &erasure).await;
    world.reaches(&erasure.id, "completed").await;
    let exported: usize = lines.iter().map(rows_in).sum();
    assert_eq!(exported, 1 + 3 + 2 + 4);
    let receipt = receipt(&world, &erasure.id).await.unwrap();
    assert_eq!((usize::try_from(receipt.deleted), receipt.arrived), (Ok(exported), Some(0)), "row for row");
    let acme = "acme".parse().unwrap();
    for mpid in [801, 802, 803] {
        assert_eq!(world.rows_of(&acme, mpid).await, (0, 0, 0));
    }
    assert_eq!(world.rows_of(&acme, 900).await, (1, 1, 2));
}

#[tokio::test]
async fn a_profile_that_is_replaced_after_the_start_is_a_new_one_and_stays() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 2).await;
    world.person(&acme, 2, "ada@example.com", 1).await;
    world.person(&acme, 3, "ada@example.com", 1).await;
    let trap = "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not yet'; END $$;
                CREATE TRIGGER trap BEFORE DELETE ON subject_data.profiles_p1 FOR EACH ROW EXECUTE FUNCTION public.trap()";
    world.run(trap).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::erasure("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("the erasure has begun and failed", seconds(10), async || {
        receipt(&world, &request.id).await.is_some_and(|receipt| receipt.failure.is_some())
    })
    .await;
    // One person comes back meanwhile, under a new address; the other one's line is what is stored already.
    world.profile(&acme, 1, &[("email", "ada@example.com"), ("other", "back")]).await;
    world.profile(&acme, 2, &[("email", "ada@example.com")]).await;
    // A statement of the controller's own makes no new profile.
    world.run("UPDATE subject_data.profiles SET attributes = '{\"seen\": 2}', updated_at = now() WHERE mpid = 3").await;
    world.run("DROP FUNCTION public.trap() CASCADE").await;
    world.reaches(&request.id, "completed").await;
    assert_eq!(
        world.rows_of(&acme, 1).await,
        (1, 2, 0),
        "the profile counts from its replacement, its identities with it"
    );
    assert_eq!(world.rows_of(&acme, 2).await, (0, 0, 0));
    assert_eq!(world.rows_of(&acme, 3).await, (0, 0, 0), "it was held before, whatever was written to it since");
    let expected = Receipt { deleted: 2 + 3 + 3, arrived: Some(3), verified: true, failure: None };
    assert_eq!(receipt(&world, &request.id).await, Some(expected));
}

#[tokio::test]
async fn a_profile_that_is_replaced_between_two_attempts_is_in_the_file() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let trap =
        "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not yet'; END $$;
                CREATE TRIGGER trap BEFORE INSERT ON lethe.results FOR EACH ROW EXECUTE FUNCTION public.trap()";
    world.run(trap).await;
    let _workers = Worker::several(&world, &["scheduler", "identity-matcher", "access-compiler"], SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let request = Request::access("ada@example.com");
    publisher.request("acme", &request).await;
    eventually("the compilation has begun and failed", seconds(10), async || {
        world.one("SELECT EXISTS (SELECT FROM lethe.slices WHERE attempts > 0 AND last_error IS NOT NULL)", &[]).await
    })
    .await;
    world.profile(&acme, 1, &[("email", "ada@example.com"), ("other", "back")]).await;
    world.run("DROP FUNCTION public.trap() CASCADE").await;
    world.reaches(&request.id, "completed").await;
    let lines = parsed(&open(&world, &request.id).await);
    assert_eq!(lines.len(), 2, "the profile and its event batch: {lines:?}");
    assert_eq!(lines[0]["identities"], json!({"email": "ada@example.com", "other": "back"}));
}
