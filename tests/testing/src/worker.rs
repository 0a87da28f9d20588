//! The real binaries, run as processes.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};

use lethe_runtime::fleet::FLEET;

use crate::signing::DOMAIN;
use crate::wait::{eventually_some, patiently, seconds};
use crate::world::World;

/// The workers that take their work from queues: all but the gateway.
pub fn queue_workers() -> Vec<&'static str> {
    FLEET.iter().map(|worker| worker.name).filter(|name| *name != "gateway").collect()
}

/// A calendar of seconds: every lane ticks each second, erasures run at once, the margin is a minute.
pub const SECONDS: &[(&str, &str)] = &[
    ("LETHE_ERASURE_SCHEDULE", "* * * * * *"),
    ("LETHE_ERASURE_WAITING_PERIOD", "0s"),
    ("LETHE_EXPEDITED_SCHEDULE", "* * * * * *"),
    ("LETHE_ACCESS_SCHEDULE", "* * * * * *"),
    ("LETHE_COMPLETION_MARGIN", "60s"),
];

/// [`SECONDS`] with further settings.
pub fn seconds_with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    SECONDS.iter().copied().chain(more.iter().copied()).collect()
}

/// A running worker. Killed when it is dropped.
pub struct Worker {
    name: String,
    child: Child,
    log: PathBuf,
    run: PathBuf,
    client: reqwest::Client,
}

/// The binary of that name: beside ours (the benchmark's), or one folder above (a test's, which lies in `deps`).
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| {
        panic!("there is no {name} beside the tests: run `make test`, or `cargo build --workspace --bins`")
    })
}

/// A process with nothing in its environment but the path.
pub fn bare(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    command.env_clear().kill_on_drop(true).stdin(Stdio::null());
    if let Ok(path) = std::env::var("PATH") {
        command.env("PATH", path);
    }
    command
}

/// Everything of ours, and what others say aloud.
const LOG: &str = "lethe=debug,identity_matcher=debug,scheduler=debug,erasure_executor=debug,access_compiler=debug,\
                   callback_courier=debug,info";

/// What every worker of a world is given.
pub fn environment(world: &World) -> Vec<(&'static str, String)> {
    let file = |part: &str| url::Url::from_file_path(world.folder.join(part)).unwrap().to_string();
    let path = |path: &std::path::Path| path.display().to_string();
    vec![
        ("DATABASE_URL", world.database_url.clone()),
        ("AMQP_URL", world.amqp_url.clone()),
        ("LETHE_PROCESSOR_DOMAIN", DOMAIN.to_owned()),
        ("LETHE_PUBLIC_URL", format!("http://{DOMAIN}:8080")),
        ("LETHE_SIGNING_KEY_FILE", path(&world.files.key)),
        ("LETHE_SIGNING_CERT_FILE", path(&world.files.certificate)),
        ("LETHE_MASTER_KEY_FILE", path(&world.files.master)),
        ("LETHE_KEY_STORE", file("keys")),
        ("LETHE_RESULT_STORE", file("results")),
        ("LETHE_CALLBACK_ALLOW", "127.0.0.0/8,::1/128,http".to_owned()),
        ("LETHE_CALLBACK_FIRST_RETRY", "100ms".to_owned()),
        ("LETHE_CALLBACK_MAX_RETRY", "1s".to_owned()),
        ("LETHE_STORE_FIRST_RETRY", "200ms".to_owned()),
        ("LETHE_STORE_MAX_RETRY", "1s".to_owned()),
        ("LETHE_SCHEDULER_INTERVAL", "50ms".to_owned()),
        ("LETHE_REDRIVE_AFTER", "500ms".to_owned()),
        ("LETHE_ADMIN_LISTEN", "127.0.0.1:0".to_owned()),
        ("LETHE_HTTP_LISTEN", "127.0.0.1:0".to_owned()),
        ("LETHE_RUN_DIR", path(&world.folder.join("run"))),
        ("LETHE_LOG", LOG.to_owned()),
    ]
}

impl Worker {
    /// Starts a worker and waits until it is ready.
    pub async fn start(world: &World, name: &str, settings: &[(&str, &str)]) -> Self {
        let worker = Self::spawn(world, name, settings);
        worker.ready().await;
        worker
    }

    /// Starts a worker without waiting for it.
    pub fn spawn(world: &World, name: &str, settings: &[(&str, &str)]) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = world.folder.join("log").join(format!("{name}-{number}.log"));
        let mut command = bare(name);
        command.envs(environment(world)).envs(settings.iter().copied()).stdout(Stdio::null());
        let child = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { name: name.to_owned(), child, log, run: world.folder.join("run"), client }
    }

    /// One of each worker, all ready.
    pub async fn fleet(world: &World, settings: &[(&str, &str)]) -> Vec<Self> {
        Self::several(world, &queue_workers(), settings).await
    }

    /// One of each of these, all ready.
    pub async fn several(world: &World, names: &[&str], settings: &[(&str, &str)]) -> Vec<Self> {
        let workers: Vec<Self> = names.iter().map(|name| Self::spawn(world, name, settings)).collect();
        for worker in &workers {
            worker.ready().await;
        }
        workers
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Waits until the admin address says that it is ready.
    pub async fn ready(&self) {
        let what = format!("{} is ready; its log:\n{}", self.name, self.log());
        eventually_some(&what, seconds(20), async || self.get("/readyz").await.filter(|(status, _)| *status == 200))
            .await;
    }

    /// Asks the admin address; `None` while it does not listen.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        let file = self.run.join(format!("{}-{}.addr", self.name, self.child.id()?));
        let address = std::fs::read_to_string(file).ok().filter(|text| !text.is_empty())?;
        let answer =
            self.client.get(format!("http://{address}{path}")).timeout(patiently(seconds(5))).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    /// Where the gateway serves.
    pub async fn http_address(&self) -> String {
        eventually_some("the gateway has an address", seconds(10), async || self.try_http_address()).await
    }

    /// Where the gateway serves, if it does by now.
    pub fn try_http_address(&self) -> Option<String> {
        let file = self.run.join(format!("{}-{}.http", self.name, self.child.id()?));
        std::fs::read_to_string(file).ok().filter(|text| !text.is_empty())
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Threads that it has.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.id())).unwrap().count()
    }

    /// Sends a signal by name.
    pub async fn signal(&self, signal: &str) {
        let Some(id) = self.child.id() else { return };
        let kill = format!("kill -{signal} {id}");
        assert!(Command::new("sh").args(["-c", &kill]).status().await.unwrap().success(), "{kill}");
    }

    /// Kills it in whatever it is doing.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits until it ends by itself.
    pub async fn exit(&mut self, limit: Duration) -> ExitStatus {
        tokio::time::timeout(patiently(limit), self.child.wait())
            .await
            .unwrap_or_else(|_| panic!("{} did not end", self.name))
            .unwrap()
    }

    /// Tells it to stop, and checks that it drains and says so.
    pub async fn stop(mut self) {
        self.signal("TERM").await;
        let status = self.exit(seconds(35)).await;
        assert_eq!(status.code(), Some(0), "{} after SIGTERM", self.name);
    }

    /// Sends a signal to a process that may have ended meanwhile.
    pub async fn try_signal(&self, signal: &str) {
        if let Some(id) = self.child.id() {
            let _ =
                Command::new("kill").args([format!("-{signal}"), id.to_string()]).stderr(Stdio::null()).status().await;
        }
    }

    /// Its process id; `None` once it was seen to have ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// How it has ended, where it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has ended.
    pub async fn wait(&mut self) -> ExitStatus {
        self.child.wait().await.unwrap()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let mut tail: Vec<&str> = log.lines().rev().take(60).collect();
            tail.reverse();
            let mut text = format!("--- {} ---\n", self.name);
            for line in tail {
                let _ = writeln!(text, "{line}");
            }
            eprint!("{text}");
        }
        let _ = self.child.start_kill();
    }
}
