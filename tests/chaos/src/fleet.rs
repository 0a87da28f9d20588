//! The workers of a run: several of each, replaced when they are gone.

use std::collections::BTreeMap;
use std::fs::DirEntry;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use lethe_runtime::fleet::FLEET;
use lethe_testing::Worker;
use tokio::sync::Mutex;

use crate::world::{Route, World};

/// Settings that make a life of weeks take seconds.
const SETTINGS: [(&str, &str); 10] = [
    ("LETHE_ERASURE_SCHEDULE", "*/4 * * * * *"),
    ("LETHE_ERASURE_WAITING_PERIOD", "5s"),
    ("LETHE_EXPEDITED_SCHEDULE", "*/3 * * * * *"),
    ("LETHE_ACCESS_SCHEDULE", "*/3 * * * * *"),
    ("LETHE_COMPLETION_MARGIN", "60s"),
    ("LETHE_CALLBACK_MAX_PROBE", "1s"),
    // Weeks of details are as short, and are dropped while the harm goes on.
    ("LETHE_RETENTION", "6s"),
    // What cannot be delivered for so long is given up; nothing of a run may be.
    ("LETHE_CALLBACK_GIVE_UP", "72h"),
    ("LETHE_DRAIN_TIMEOUT", "25s"),
    ("LETHE_DATABASE_CONNECTIONS", "6"),
];

/// The waiting period that they have.
pub const WAITING_PERIOD: Duration = Duration::from_secs(5);

struct Slot {
    name: &'static str,
    route: Route,
    worker: Option<Worker>,
    /// It may kill itself: it was given a fault to do so at.
    may_die: bool,
    /// It was told to end.
    is_told: bool,
}

impl Slot {
    /// What a process that has ended should not have done.
    fn fault_of(&self, status: ExitStatus) -> Option<String> {
        let log = self.worker.as_ref().map(Worker::log).unwrap_or_default();
        // Who was told to end before it could listen for that, is ended by the signal; and what harm holds up for longer than
        // a process may drain, it leaves to others, and says so.
        let has_drained = status.code() == Some(0)
            || (status.signal() == Some(SIGTERM) && !log.contains("starting"))
            || (status.code() == Some(1) && log.contains("work was unfinished"));
        let is_fine = (self.is_told && has_drained) || self.has_killed_itself(status);
        if is_fine {
            return panicked(self.name, &log);
        }
        let last = log.lines().last().unwrap_or_default();
        Some(format!("{} ended with {status}: {last}", self.name))
    }

    fn has_killed_itself(&self, status: ExitStatus) -> bool {
        self.may_die && status.signal() == Some(SIGKILL)
    }
}

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// A panic that a task has survived is one all the same.
fn panicked(name: &str, log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("panicked at"))?;
    Some(format!("{name} panicked: {line}"))
}

/// All workers.
pub struct Fleet {
    world: Arc<World>,
    slots: Vec<Mutex<Slot>>,
    /// A planted defect, for all of them.
    defect: Option<String>,
    is_over: AtomicBool,
    /// Points at which a process has killed itself.
    pub fired: AtomicUsize,
    /// Processes that ended as they should not, or panicked.
    pub deserters: std::sync::Mutex<Vec<String>>,
}

impl Fleet {
    /// Starts `each` of each worker; half of them go by one proxy, half by the other.
    pub async fn start(world: Arc<World>, each: usize, defect: Option<&str>) -> Arc<Self> {
        let mut slots = Vec::new();
        for name in FLEET.map(|worker| worker.name) {
            for number in 0..each {
                let route = if number % 2 == 0 { Route::First } else { Route::Second };
                slots.push(Mutex::new(Slot { name, route, worker: None, may_die: false, is_told: false }));
            }
        }
        let defect = defect.map(|name| format!("defect:{name}"));
        let fleet = Arc::new(Self {
            world,
            slots,
            defect,
            is_over: AtomicBool::default(),
            fired: AtomicUsize::default(),
            deserters: std::sync::Mutex::default(),
        });
        for slot in &fleet.slots {
            let mut slot = slot.lock().await;
            slot.worker = Some(fleet.spawn(&slot, None));
        }
        for slot in &fleet.slots {
            slot.lock().await.worker.as_ref().unwrap().ready().await;
        }
        tokio::spawn(fleet.clone().replace_the_gone());
        fleet
    }

    fn spawn(&self, slot: &Slot, fault: Option<&str>) -> Worker {
        let faults: Vec<&str> = self.defect.as_deref().into_iter().chain(fault).collect();
        let faults = faults.join(",");
        let (database_url, amqp_url) = self.world.through(slot.route);
        let mut settings = SETTINGS.to_vec();
        settings.extend([("DATABASE_URL", database_url.as_str()), ("AMQP_URL", &amqp_url), ("LETHE_FAULT", &faults)]);
        Worker::spawn(&self.world.tests, slot.name, &settings)
    }

    async fn replace_the_gone(self: Arc<Self>) {
        while !self.is_over.load(Ordering::SeqCst) {
            for slot in &self.slots {
                let mut slot = slot.lock().await;
                let Some(status) = slot.worker.as_mut().and_then(Worker::ended) else { continue };
                self.fired.fetch_add(usize::from(slot.has_killed_itself(status)), Ordering::SeqCst);
                self.deserters.lock().unwrap().extend(slot.fault_of(status));
                self.respawn(&mut slot, None);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// kill -9; another one takes its place, with a fault where one is given.
    pub async fn kill(&self, index: usize, fault: Option<&str>) {
        let mut slot = self.slots[index].lock().await;
        if let Some(status) = slot.worker.as_mut().and_then(Worker::ended) {
            self.fired.fetch_add(usize::from(slot.has_killed_itself(status)), Ordering::SeqCst);
            self.deserters.lock().unwrap().extend(slot.fault_of(status));
        } else if let Some(worker) = slot.worker.take() {
            self.deserters.lock().unwrap().extend(panicked(slot.name, &worker.log()));
            worker.kill().await;
        }
        self.respawn(&mut slot, fault);
    }

    fn respawn(&self, slot: &mut Slot, fault: Option<&str>) {
        slot.worker = Some(self.spawn(slot, fault));
        (slot.may_die, slot.is_told) = (fault.is_some_and(|fault| fault.starts_with("kill@")), false);
    }

    /// Sends a signal.
    pub async fn signal(&self, index: usize, signal: &str) {
        let mut slot = self.slots[index].lock().await;
        slot.is_told |= signal == "TERM";
        if let Some(worker) = slot.worker.as_mut().filter(|worker| worker.pid().is_some()) {
            worker.try_signal(signal).await;
        }
    }

    /// Whether it stands still.
    pub async fn is_stopped(&self, index: usize) -> bool {
        let slot = self.slots[index].lock().await;
        let Some(pid) = slot.worker.as_ref().and_then(Worker::pid) else { return false };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Where one of the gateways serves; another one with each `turn`.
    pub fn gateway(&self, turn: usize) -> Option<String> {
        // One that is being replaced serves nobody.
        let settled = self.slots.iter().filter_map(|slot| slot.try_lock().ok()).filter(|slot| slot.name == "gateway");
        let mut addresses: Vec<String> =
            settled.filter_map(|slot| slot.worker.as_ref().and_then(Worker::try_http_address)).collect();
        (!addresses.is_empty()).then(|| addresses.swap_remove(turn % addresses.len()))
    }

    /// Threads and sockets of each process.
    pub async fn footprints(&self) -> BTreeMap<String, (usize, usize)> {
        let mut footprints = BTreeMap::new();
        for slot in &self.slots {
            let slot = slot.lock().await;
            let Some(pid) = slot.worker.as_ref().and_then(Worker::pid) else { continue };
            let entries = |of: &str| std::fs::read_dir(format!("/proc/{pid}/{of}")).into_iter().flatten().flatten();
            let is_socket = |file: &DirEntry| {
                std::fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
            };
            let sockets = entries("fd").filter(is_socket).count();
            footprints.insert(format!("{} {pid}", slot.name), (entries("task").count(), sockets));
        }
        footprints
    }

    /// Lets everybody go on who stands still.
    pub async fn wake_all(&self) {
        for index in 0..self.slots.len() {
            self.signal(index, "CONT").await;
        }
    }

    /// What they tell of themselves.
    pub async fn metrics(&self) -> Vec<String> {
        let mut pages = Vec::new();
        for slot in &self.slots {
            if let Some(worker) = &slot.lock().await.worker {
                pages.extend(worker.get("/metrics").await.map(|(_, text)| text));
            }
        }
        pages
    }

    /// Tells all to stop, and waits for it; those that do not drain in time are named.
    pub async fn stop(&self) -> Vec<String> {
        self.is_over.store(true, Ordering::SeqCst);
        let mut undrained = Vec::new();
        for index in 0..self.slots.len() {
            self.signal(index, "TERM").await;
        }
        for slot in &self.slots {
            let mut slot = slot.lock().await;
            let Some(worker) = slot.worker.as_mut() else { continue };
            match tokio::time::timeout(Duration::from_secs(40), worker.wait()).await {
                Ok(status) if status.code() == Some(1) => undrained.push(format!("{} did not drain", slot.name)),
                Ok(status) => undrained.extend(slot.fault_of(status)),
                Err(_) => undrained.push(format!("{} did not end within 40 s of SIGTERM", slot.name)),
            }
            slot.worker = None;
        }
        undrained
    }
}
