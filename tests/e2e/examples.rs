//! The examples: each makes requests, receives callbacks and downloads a result, as a controller does.

use std::path::Path;
use std::process::Stdio;

use lethe_testing::python;
use lethe_testing::signing::DOMAIN;
use lethe_testing::wait::{patiently, seconds};
use lethe_testing::worker::{SECONDS, Worker, binary};
use lethe_testing::{Gateway, World};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// The examples, each as a command to which options are added.
fn examples() -> [(&'static str, Vec<String>); 2] {
    let controller = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/controller-python/controller.py");
    let python = python::with_cryptography();
    [
        ("Python", vec![python.display().to_string(), controller.display().to_string()]),
        ("Rust", vec![binary("controller").display().to_string()]),
    ]
}

struct Fleet {
    world: World,
    _workers: Vec<Worker>,
    gateway: Gateway,
}

async fn fleet() -> Fleet {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 3).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (address, url) = (format!("127.0.0.1:{port}"), format!("http://localhost:{port}"));
    let settings: Vec<(&str, &str)> = [("LETHE_HTTP_LISTEN", address.as_str()), ("LETHE_PUBLIC_URL", &url)]
        .into_iter()
        .chain(SECONDS.iter().copied())
        .collect();
    let workers = Worker::fleet(&world, &settings).await;
    let (scheduler, gateway) = Gateway::with_scheduler(&world, &settings).await;
    Fleet { world, _workers: workers.into_iter().chain([scheduler]).collect(), gateway }
}

impl Fleet {
    /// Runs an example in the folder of the world.
    fn run(&self, command: &[String], options: &[&str]) -> Child {
        let (key, secret) = self.world.credentials("acme");
        Command::new(&command[0])
            .args(&command[1..])
            .args(["--gateway", &format!("http://{}", self.gateway.address), "--domain", DOMAIN, "--certificate"])
            .arg(&self.world.files.certificate)
            .args(["--email", "ada@example.com"])
            .args(options)
            .env("LETHE_API_KEY", key)
            .env("LETHE_API_SECRET", secret)
            .current_dir(&self.world.folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// What it said, once it is done.
    async fn said(&self, command: &[String], options: &[&str]) -> String {
        let output = tokio::time::timeout(patiently(seconds(60)), self.run(command, options).wait_with_output());
        let output = output.await.expect("it ends").unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        said.into_owned()
    }
}

#[tokio::test]
async fn each_example_follows_its_requests_to_the_end() {
    let fleet = fleet().await;
    for (language, command) in examples() {
        let access = fleet.said(&command, &["--type", "access"]).await;
        let (_, file) = access.trim_end().rsplit_once(" into ").unwrap_or_else(|| panic!("{language}: {access}"));
        let result = std::fs::read_to_string(fleet.world.folder.join(file)).unwrap();
        assert!(result.contains("ada@example.com"), "{language}: {result}");
        let token =
            fleet.world.one::<String>("SELECT encode(token_sha256, 'hex') FROM lethe.results LIMIT 1", &[]).await;
        assert!(!access.contains("/results/") && !access.contains(&token), "{language}: {access}");
    }
    for (language, command) in examples() {
        let erased = fleet.said(&command, &["--type", "erasure"]).await;
        assert!(erased.contains("in_progress") && erased.contains("completed"), "{language}: {erased}");
    }
    let acme = "acme".parse().unwrap();
    assert_eq!(fleet.world.rows_of(&acme, 1).await, (0, 0, 0));
}

#[tokio::test]
async fn each_example_withdraws_a_request_and_refuses_what_the_processor_did_not_sign() {
    let world = World::new().await;
    world.controller("acme").await;
    let (scheduler, gateway) = Gateway::with_scheduler(&world, &[]).await;
    let courier = Worker::start(&world, "callback-courier", &[]).await;
    let fleet = Fleet { world, _workers: vec![scheduler, courier], gateway };
    for (language, command) in examples() {
        let cancelled = fleet.said(&command, &["--type", "erasure", "--cancel"]).await;
        assert!(cancelled.contains("pending") && cancelled.contains("cancelled"), "{language}: {cancelled}");
        let mut child = fleet.run(&command, &["--timeout", "60"]);
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (mut out, mut err) = (BufReader::new(out).lines(), BufReader::new(err).lines());
        let line = tokio::select! {
            Ok(Some(line)) = out.next_line() => line,
            Ok(Some(line)) = err.next_line() => line,
        };
        let address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{language}: {line}"));
        let forged = reqwest::Client::new()
            .post(format!("http://{address}/callbacks"))
            .header("X-OpenDSR-Processor-Domain", DOMAIN)
            .header("X-OpenDSR-Signature", "AAAA")
            .header("X-Lethe-Callback-Id", uuid::Uuid::new_v4().to_string())
            .body(r#"{"request_status": "completed"}"#);
        assert_eq!(forged.send().await.unwrap().status(), 401, "{language}");
        assert!(child.try_wait().unwrap().is_none(), "{language}: it goes on");
    }
}
