//! The servers' processes, where they run on this machine: their CPU time and memory, from /proc.

use std::time::Duration;

use lethe_db::Db;
use lethe_testing::servers::Management;
use reqwest::Method;

/// A second of CPU time, in the units of /proc.
const TICKS: u64 = 100;

/// What processes have used: CPU time since they began, and resident memory now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    /// Bytes; `None` where /proc does not show them to us.
    pub(crate) memory: Option<u64>,
}

/// PostgreSQL's postmaster and RabbitMQ's node; `None` for one that runs elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Servers {
    postmaster: Option<u32>,
    rabbitmq: Option<u32>,
}

impl Servers {
    /// Asks the servers for their process ids; one counts as local where such a process of that name is here.
    pub(crate) async fn find(db: &Db, management: &Management) -> Self {
        let session = db.session().await.unwrap();
        let backend: i32 = session.raw().query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        let backend = u32::try_from(backend).unwrap();
        let postmaster = is_called(backend, "postgres").then(|| stat(backend).map(|stat| stat.parent)).flatten();
        let nodes = management.call(Method::GET, "/nodes", None).await;
        let node = nodes.as_ref().and_then(|list| list[0]["os_pid"].as_str()).and_then(|text| text.parse().ok());
        Self { postmaster, rabbitmq: node.filter(|pid| is_called(*pid, "beam")) }
    }

    /// PostgreSQL with all its children; those that ended meanwhile count through their parent.
    pub(crate) fn postgresql(&self) -> Option<Usage> {
        let postmaster = self.postmaster?;
        let own = stat(postmaster)?;
        let children: Vec<u32> =
            processes().filter(|pid| stat(*pid).is_some_and(|stat| stat.parent == postmaster)).collect();
        let ticks =
            own.ticks + own.ended_children + children.iter().filter_map(|pid| stat(*pid)).map(|s| s.ticks).sum::<u64>();
        // Proportional: shared buffers are counted once, not once for each session.
        let memory = children.iter().chain([&postmaster]).map(|pid| proportional_memory(*pid)).sum();
        Some(Usage { cpu: duration(ticks), memory })
    }

    /// RabbitMQ's node.
    pub(crate) fn rabbitmq(&self) -> Option<Usage> {
        let pid = self.rabbitmq?;
        Some(Usage { cpu: duration(stat(pid)?.ticks), memory: status_bytes(pid, "VmRSS") })
    }
}

/// Processes of ours: CPU time, and the most memory they ever had resident.
pub(crate) fn of_processes(pids: &[u32]) -> Usage {
    let ticks = pids.iter().filter_map(|pid| stat(*pid)).map(|stat| stat.ticks).sum();
    Usage { cpu: duration(ticks), memory: pids.iter().map(|pid| peak_memory(*pid)).sum() }
}

/// The most memory that a process ever had resident, in bytes.
pub(crate) fn peak_memory(pid: u32) -> Option<u64> {
    status_bytes(pid, "VmHWM")
}

/// The memory that a process has resident now, in bytes.
pub(crate) fn resident_memory(pid: u32) -> Option<u64> {
    status_bytes(pid, "VmRSS")
}

fn duration(ticks: u64) -> Duration {
    Duration::from_millis(ticks * 1_000 / TICKS)
}

struct Stat {
    parent: u32,
    ticks: u64,
    ended_children: u64,
}

/// The fields behind the name, which may hold anything: `state ppid …`, `utime stime cutime cstime` from the 12th.
fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<u64> =
        text.rsplit_once(')')?.1.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    Some(Stat {
        parent: u32::try_from(*fields.get(1)?).ok()?,
        ticks: fields.get(11)? + fields.get(12)?,
        ended_children: fields.get(13)? + fields.get(14)?,
    })
}

fn is_called(pid: u32, name: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(name))
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1_024)
}

fn status_bytes(pid: u32, name: &str) -> Option<u64> {
    kibibytes(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, name)
}

fn proportional_memory(pid: u32) -> Option<u64> {
    kibibytes(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss:")
}
