//! No personal data where it does not belong: logs, metrics, work messages, errors (guarantee 6).

use lethe_testing::cli::lethe;
use lethe_testing::wait::{becomes, eventually, seconds};
use lethe_testing::worker::queue_workers;
use lethe_testing::{Publisher, Receiver, Reply, Request, Worker, World, seconds_with};
use serde_json::json;

/// Planted values; none of them may be seen again.
const CANARIES: [&str; 5] = ["canary-mail", "canary-group", "canary-path", "canary-attribute", "canary-token"];

fn check(what: &str, text: &str) {
    for canary in CANARIES {
        assert!(
            !text.contains(canary),
            "{canary} in {what}: {}",
            text.lines().find(|line| line.contains(canary)).unwrap_or("")
        );
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one life with values planted everywhere; cut up it would prove less")]
async fn planted_values_are_found_in_no_log_metric_work_message_or_error() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    let mail = "canary-mail@example.com";
    world
        .profiles(
            &acme,
            &[json!({"mpid": 1, "identities": {"email": mail}, "attributes": {"a": "canary-attribute"}}).to_string()],
        )
        .await;
    let receiver = Receiver::start().await;
    receiver.script("/canary-path", [Reply::Status(500), Reply::Redirect("/canary-path/x".to_owned()), Reply::Accept]);
    // Stores fail at first, and what they say of it names a value.
    world
        .run(
            "CREATE FUNCTION public.trap() RETURNS trigger LANGUAGE plpgsql AS
              $$ BEGIN RAISE EXCEPTION 'failed' USING DETAIL = 'row of canary-mail@example.com'; END $$;
              CREATE TRIGGER trap BEFORE DELETE ON subject_data.profiles FOR EACH ROW EXECUTE FUNCTION public.trap();
              CREATE TRIGGER trap BEFORE INSERT ON lethe.results FOR EACH ROW EXECUTE FUNCTION public.trap()",
        )
        .await;
    let settings = seconds_with(&[("LETHE_LOG", "lethe=debug,info"), ("LETHE_ERASURE_WAITING_PERIOD", "3s")]);
    let mut workers = Worker::several(&world, &queue_workers()[..2], &settings).await;
    let publisher = Publisher::connect(&world).await;
    let url = receiver.url("/canary-path?t=canary-token");
    let personal = |request: Request| request.group("canary-group").callback(&url);
    let access = personal(Request::access(mail));
    let portability = personal(Request::new("portability").identity("email", mail));
    let erasure = personal(Request::erasure(mail));
    for request in [&access, &portability, &erasure] {
        publisher.request("acme", request).await;
    }
    let cancelled = personal(Request::erasure("canary-mail-2@example.com"));
    assert_eq!(publisher.cancel("acme", &cancelled.id).await.status, 202);
    publisher.request("acme", &cancelled).await;
    // Refusals of every kind, with the values in all the wrong places.
    let refused = [
        personal(Request::erasure(mail)).with("regulation", json!("canary-mail")).bytes(),
        personal(Request::erasure(mail)).with("subject_request_type", json!("canary-group")).bytes(),
        Request::erasure(mail).callback("ftp://example.com/canary-path").bytes(),
        Request::new("erasure").encoded("email", "canary-mail", "sha256").bytes(),
        Request::new("erasure").identity("canary-mail", "x").bytes(),
        Request::erasure(mail).with("subject_request_id", json!(erasure.id)).bytes(),
        b"{\"canary-mail\": canary-group}".to_vec(),
        b"{\"canary-mail\":1,\"canary-mail\":2}".to_vec(),
    ];
    for body in &refused {
        let answer = publisher.ask(&publisher.sending("acme", "request", body.clone())).await;
        assert!(matches!(answer.status, 400 | 409), "{}", answer.json());
        check("an error", &String::from_utf8(answer.body.clone()).unwrap());
    }
    // Work messages, before anybody takes them.
    for queue in ["dsr.erasure-execution", "dsr.access-compilation", "dsr.callback-delivery"] {
        eventually(queue, seconds(10), async || world.messages(queue).await > 0).await;
        for message in world.take_messages(queue, 100).await {
            check(queue, &message.to_string());
        }
    }
    // What an operator sees of them.
    for command in [&["dead-letter", "list"][..], &["dead-letter", "list", "--letters"]] {
        let listed = lethe(&world, command).await;
        assert!(listed.code == Some(0) && listed.out.contains("dsr.rejected"), "{}{}", listed.out, listed.err);
        check("a listing of dead letters", &listed.out);
    }
    let copies = world.take_messages("dsr.rejected", 100).await;
    assert_eq!(copies.len(), refused.len());
    for copy in copies {
        check("the headers of a kept copy", &copy["properties"].to_string());
    }
    for name in &queue_workers()[2..] {
        workers.push(Worker::start(&world, name, &settings).await);
    }
    eventually("every stage has failed at least once", seconds(20), async || {
        let failed = "SELECT (SELECT count(*) FROM lethe.slices WHERE last_error IS NOT NULL) = 3
                         AND EXISTS (SELECT FROM lethe.erasure_receipts WHERE failure IS NOT NULL)";
        world.one(failed, &[]).await
    })
    .await;
    let all: Vec<String> = world.all("SELECT coalesce(last_error, '') FROM lethe.slices", &[]).await;
    check("the errors of slices", &all.join("\n"));
    world.run("DROP FUNCTION public.trap() CASCADE").await;
    for request in [&access, &portability, &erasure] {
        world.reaches(&request.id, "completed").await;
    }
    becomes("callbacks that are not delivered", seconds(20), 0, async || {
        world.one::<i64>("SELECT count(*) FROM lethe.callbacks WHERE state <> 'delivered'", &[]).await
    })
    .await;
    assert_eq!(receiver.statuses("/canary-path").len(), 3 * 3 + 2);
    for worker in &workers {
        let log = worker.log();
        assert!(log.lines().count() >= 3, "a log that says nothing proves nothing");
        check("a log", &log);
        check("the metrics", &worker.get("/metrics").await.unwrap().1);
    }
    let certificate = async || lethe(&world, &["request", "certificate", &erasure.id, "--controller", "acme"]).await;
    eventually("it is certified", seconds(10), async || certificate().await.code == Some(0)).await;
    check("a certificate", &certificate().await.out);
    check("the exported trail", &lethe(&world, &["audit", "export"]).await.out);
    // What lies at rest in the state is sealed or a digest.
    let tables: Vec<String> = world.all("SELECT tablename::text FROM pg_tables WHERE schemaname = 'lethe'", &[]).await;
    assert!(tables.iter().any(|table| table == "audit_entries") && tables.len() > 15, "{tables:?}");
    for table in &tables {
        let rows: Option<String> =
            world.one(&format!("SELECT string_agg(t::text, ' ') FROM lethe.{table} t"), &[]).await;
        check(table, &rows.unwrap_or_default());
    }
}
