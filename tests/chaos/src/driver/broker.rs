//! Harm to RabbitMQ.

use std::path::PathBuf;
use std::time::Instant;

use reqwest::Method;
use serde_json::Value;

use crate::checker::Violation;

use super::{Driver, pause};

/// Queues of wake-ups.
pub(super) const WORK: [&str; 3] = ["dsr.erasure-execution", "dsr.access-compilation", "dsr.callback-delivery"];
/// Queues of what controllers send.
const INTAKE: [&str; 3] = ["dsr.identity-matching", "dsr.cancellation", "dsr.query"];

/// When an alarm is so old, the other harm is over, and who was ended has been replaced.
const LONG_ALARM_SETTLES: u64 = 45_000;
/// As many more are no growth: threads come and go, and so do connections to those who receive callbacks.
const MORE_THREADS: usize = 4;
const MORE_SOCKETS: usize = 10;

impl Driver {
    async fn call(&self, method: Method, path: &str) -> Option<Value> {
        // One that is away, or refuses, is harmed enough.
        let (status, text) = self.world.tests.management.try_call(method, path, None).await.ok()?;
        status.is_success().then(|| serde_json::from_str(&text).unwrap_or_default())
    }

    pub(super) async fn close_connections(&self) {
        let list = self.call(Method::GET, &format!("/vhosts/{}/connections", self.world.tests.name)).await;
        for connection in list.iter().flat_map(|list| list.as_array().into_iter().flatten()) {
            let name = connection["name"].as_str().unwrap_or_default().replace(' ', "%20").replace('>', "%3E");
            self.call(Method::DELETE, &format!("/connections/{name}")).await;
        }
    }

    pub(super) async fn purge(&self, queues: &[&str]) {
        for queue in queues {
            self.call(Method::DELETE, &format!("/queues/{}/{queue}/contents", self.world.tests.name)).await;
        }
    }

    /// What is in the queues of requests and not answered yet is the publishers' again.
    pub(super) async fn purge_all(&self) {
        let began = Instant::now();
        self.purge(&INTAKE).await;
        self.purge(&WORK).await;
        self.purges.lock().unwrap().push((began, Instant::now()));
    }

    pub(super) async fn delete_queue(&self, queue: &str) {
        self.call(Method::DELETE, &format!("/queues/{}/{queue}", self.world.tests.name)).await;
    }

    /// As after a kill in the moment after it was made: its files are gone, its name is not.
    pub(super) async fn lose_queue(&self, queue: &str) {
        let call = format!("ra_directory:uid_of(quorum_queues, '{}_{queue}').", self.world.tests.name);
        let said = self.world.ask_servers(&["rabbitmqctl", "eval", &call]).await;
        let folder = said.split('"').nth(1).filter(|uid| !uid.is_empty()).map(str::to_owned);
        self.kill_server("run/rabbitmq.pid").await;
        if let (Some(uid), Some(local)) = (folder, self.local_dir()) {
            let find = ["-type", "d", "-name", &uid, "-prune", "-exec", "rm", "-rf", "{}", "+"];
            let _ = tokio::process::Command::new("find").arg(local.join("state/.")).args(find).status().await;
        }
        self.start_servers().await;
    }

    fn local_dir(&self) -> Option<PathBuf> {
        let script = self.world.servers.as_ref()?;
        let given = std::env::var_os("LETHE_LOCAL_DIR").map(PathBuf::from);
        Some(given.unwrap_or_else(|| script.ancestors().nth(3).unwrap_or(script).join(".local")))
    }

    pub(super) async fn restart_broker(&self, hard: bool) {
        if hard {
            self.kill_server("run/rabbitmq.pid").await;
        } else {
            self.world.run_servers(&["stop", "rabbitmq"]).await;
        }
        self.start_servers().await;
    }

    /// kill -9 of the process that a pid file below the servers' folder names.
    pub(super) async fn kill_server(&self, pid_file: &str) {
        let Some(local) = self.local_dir() else { return };
        let text = std::fs::read_to_string(local.join(pid_file)).unwrap_or_default();
        if let Some(pid) = text.lines().next().filter(|pid| pid.parse::<u32>().is_ok_and(|pid| pid > 1)) {
            let _ = tokio::process::Command::new("kill").args(["-9", pid]).status().await;
            pause(300).await;
        }
    }

    pub(super) async fn start_servers(&self) {
        for _ in 0..3 {
            if self.world.run_servers(&["start"]).await {
                return;
            }
        }
        panic!("the servers do not start again; see .local/log");
    }

    /// Whoever waits for the broker, and asks again and again, needs no more for it at the end than at the beginning.
    pub(super) async fn long_alarm(&self, millis: u64) {
        let settled = LONG_ALARM_SETTLES.min(millis / 2);
        let watch = async {
            pause(settled).await;
            let before = self.fleet.footprints().await;
            // The alarm is still on.
            pause((millis - settled).saturating_sub(2_000)).await;
            (before, self.fleet.footprints().await)
        };
        let ((before, after), ()) = tokio::join!(watch, self.memory_alarm(millis));
        for (process, (threads, sockets)) in &after {
            let Some((threads_before, sockets_before)) = before.get(process) else { continue };
            if *threads > threads_before + MORE_THREADS || *sockets > sockets_before + MORE_SOCKETS {
                self.found.lock().unwrap().push(Violation::of(
                    5,
                    format!(
                        "{process} grew under the alarm: from {threads_before} to {threads} threads, \
                         from {sockets_before} to {sockets} sockets"
                    ),
                ));
            }
        }
    }

    pub(super) async fn memory_alarm(&self, millis: u64) {
        self.world.run_servers(&["rabbitmqctl", "set_vm_memory_high_watermark", "absolute", "1"]).await;
        pause(millis).await;
        self.world.run_servers(&["rabbitmqctl", "set_vm_memory_high_watermark", "0.4"]).await;
    }
}
