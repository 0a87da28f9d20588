//! Data minimisation: what is personal in a request goes a while after its end; keyed digests stay.

use lethe_testing::cli::lethe;
use lethe_testing::details::{MPIDS, has_details};
use lethe_testing::wait::{becomes, eventually, seconds, stays};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Publisher, Receiver, Reply, Request, Worker, World, seconds_with};
use serde_json::Value;

/// Every value of every table of the state, as text.
async fn everything(world: &World) -> String {
    let tables: Vec<String> = world
        .all(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('lethe', 'subject_data', 'public')",
            &[],
        )
        .await;
    assert!(tables.len() > 15, "{tables:?}");
    let mut text = String::new();
    for table in tables {
        let rows: Option<String> = world.one(&format!("SELECT string_agg(t::text, E'\\n') FROM {table} t"), &[]).await;
        text.push_str(&rows.unwrap_or_default());
    }
    text
}

#[tokio::test]
async fn what_is_personal_goes_and_the_request_is_known_all_the_same() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 7_312_846_509, "ada@example.com", 2).await;
    let receiver = Receiver::start().await;
    // One callback is not delivered before we say so.
    receiver.script("/late", [Reply::Status(500)]);
    let settings = seconds_with(&[
        ("LETHE_RETENTION", "1s"),
        ("LETHE_ERASURE_WAITING_PERIOD", "3s"),
        ("LETHE_CALLBACK_GIVE_UP", "20s"),
    ]);
    let workers = Worker::several(&world, &queue_workers(), &settings).await;
    let publisher = Publisher::connect(&world).await;
    let personal = |request: Request| request.group("the family");
    let erasure = personal(Request::erasure("ada@example.com").callback(&receiver.url("/at-once")));
    let late = personal(Request::erasure("ada@example.com").callback(&receiver.url("/late")));
    let cancelled = personal(Request::erasure("eve@example.com"));
    assert_eq!(publisher.cancel("acme", &cancelled.id).await.status, 202);
    let first = publisher.request("acme", &erasure).await;
    for request in [&late, &cancelled] {
        publisher.request("acme", request).await;
    }
    let kept = async |id: &str| -> (bool, i64) {
        let mpids = format!("SELECT count(*) FROM {MPIDS} m WHERE subject_request_id::text = $1");
        (has_details(&world, id).await, world.one(&mpids, &[&id]).await)
    };
    assert_eq!(kept(&erasure.id).await, (true, 1), "a request that has not ended keeps everything");
    for request in [&erasure, &cancelled] {
        becomes("what is kept", seconds(30), (false, 0), async || kept(&request.id).await).await;
    }
    world.reaches(&late.id, "completed").await;
    stays("its callback needs the URL", seconds(2), async || kept(&late.id).await == (true, 1)).await;
    receiver.script("/late", [Reply::Accept]);
    becomes("what is kept", seconds(50), (false, 0), async || kept(&late.id).await).await;
    assert_eq!(receiver.statuses("/late"), ["pending", "in_progress", "completed"]);
    assert_eq!(world.told("requests.purged").await, 1, "what was cancelled, by itself");
    let dropped = "SELECT sum((details ->> 'requests')::integer) FROM lethe.audit_entries
                    WHERE event = 'details.dropped' AND controller_id = 'acme'";
    assert_eq!(world.one::<i64>(dropped, &[]).await, 2, "the others with their weeks");

    // Known all the same: by its id, by its group, by its content.
    let status = publisher.status("acme", &erasure.id).await;
    let status = status.json();
    assert_eq!((&status["request_status"], &status["group_id"]), (&"completed".into(), &Value::Null));
    let query = serde_json::json!({"group_id": "the family"}).to_string();
    let group = publisher.ask(&publisher.sending("acme", "group", query)).await.json();
    assert_eq!(group.as_array().unwrap().len(), 3, "{group}");
    let again = publisher.request("acme", &erasure).await.json();
    assert_eq!(again, first.json(), "the first answer once more");
    let other = Request::erasure("else@example.com").with("subject_request_id", serde_json::json!(erasure.id));
    assert_eq!(publisher.ask(&publisher.sending("acme", "request", &other)).await.status, 409);
    let certificate = async || lethe(&world, &["request", "certificate", &erasure.id, "--controller", "acme"]).await;
    eventually("it is certified all the same", seconds(10), async || certificate().await.code == Some(0)).await;
    assert!(certificate().await.out.contains("profiles\\\":1"));
    // What is gone cannot be sent once more.
    let id: uuid::Uuid = world.one("SELECT callback_id FROM lethe.callbacks LIMIT 1", &[]).await;
    let replay = lethe(&world, &["callback", "replay", &id.to_string(), "--state", "delivered"]).await;
    assert!(replay.code == Some(1) && replay.err.contains("purged"), "{}", replay.err);

    let left = everything(&world).await;
    for value in ["ada@example.com", "7312846509", "the family", "/at-once", "/late"] {
        assert!(!left.contains(value), "{value} is left: {:?}", left.lines().find(|line| line.contains(value)));
    }
    for worker in &workers {
        for value in ["ada@example.com", "7312846509", "the family", "/at-once"] {
            assert!(!worker.log().contains(value), "{value} in a log");
        }
    }
}
