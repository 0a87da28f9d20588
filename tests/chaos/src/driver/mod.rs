//! The driver: a schedule of harm made from the seed, and those who do it.

mod broker;
mod disk;
mod messages;
mod network;
mod postgres;
mod processes;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

pub use messages::NO_WAKE_UP;

use crate::checker::Violation;
use crate::fleet::Fleet;
use crate::world::World;
use lethe_runtime::fleet::FLEET;

/// What may be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Harm {
    /// kill -9 of a process.
    Kill(usize),
    /// kill -9 of all of a worker at once.
    KillAll(&'static str),
    /// SIGTERM in the middle of the work.
    Terminate(usize),
    /// kill -9 at the given pass of a named point.
    KillAt(usize, String, u32),
    /// SIGSTOP until every lease it holds is over and others have taken over, then SIGCONT.
    Zombie(usize),
    /// The same at the given pass of a named point.
    ZombieAt(usize, String, u32),
    /// Every lease runs out at once.
    ClockJump,
    /// All connections to RabbitMQ are closed from its side.
    CloseConnections,
    /// All queues of wake-ups are purged.
    PurgeWork,
    /// All queues are purged, those of requests too.
    PurgeAll,
    /// A work queue is deleted: its consumers are cancelled.
    CancelConsumers(&'static str),
    /// RabbitMQ is killed and comes back without a work queue, all but its name.
    LoseQueue(&'static str),
    /// RabbitMQ is restarted, with SIGKILL or in peace.
    RestartBroker(bool),
    /// A memory alarm blocks publishers for some milliseconds, longer than they wait for a confirm.
    MemoryAlarm(u64),
    /// The same for minutes, in which nobody may need more and more threads or sockets.
    LongAlarm(u64),
    /// All sessions of PostgreSQL are terminated.
    TerminateSessions,
    /// A lock on a table is held for some milliseconds.
    LongLock(&'static str, u64),
    /// PostgreSQL takes no writes for some milliseconds.
    ReadOnly(u64),
    /// PostgreSQL is restarted, with SIGKILL or in peace.
    RestartPostgres(bool),
    /// What PostgreSQL confirmed in the last milliseconds is gone, as after a failover to a server that lagged behind.
    FailoverWithLoss(u64),
    /// A way to a server (0 and 1 to PostgreSQL, 2 and 3 to RabbitMQ) is cut, delayed or silent for some milliseconds.
    Network(usize, Bend, u64),
    /// The disk of the result store is full for some milliseconds.
    DiskFull(u64),
    /// Wake-ups come twice, for work of long ago, for nothing, or are no wake-ups.
    StrayWakeUps,
    /// Messages are taken out of the work queues and put back.
    Shuffle,
}

/// What happens to a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bend {
    /// Cut.
    Cut,
    /// Everything takes longer.
    Delay,
    /// Nothing comes through, nothing is said.
    BlackHole,
}

impl Harm {
    /// The kind, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill(_) => "kill -9",
            Self::KillAll(_) => "kill -9 of all of a kind",
            Self::Terminate(_) => "SIGTERM",
            Self::KillAt(..) => "kill -9 at a point",
            Self::Zombie(_) => "SIGSTOP beyond the lease",
            Self::ZombieAt(..) => "SIGSTOP at a point",
            Self::ClockJump => "all leases over at once",
            Self::CloseConnections => "AMQP connections closed",
            Self::PurgeWork => "work queues purged",
            Self::PurgeAll => "all queues purged",
            Self::CancelConsumers(_) => "consumers cancelled",
            Self::LoseQueue(_) => "queues lost by RabbitMQ",
            Self::RestartBroker(true) => "RabbitMQ killed",
            Self::RestartBroker(false) => "RabbitMQ restarted",
            Self::MemoryAlarm(_) => "memory alarm",
            Self::LongAlarm(_) => "memory alarm for minutes",
            Self::ReadOnly(_) => "PostgreSQL read-only",
            Self::TerminateSessions => "PostgreSQL sessions terminated",
            Self::LongLock(..) => "long lock",
            Self::RestartPostgres(true) => "PostgreSQL killed",
            Self::RestartPostgres(false) => "PostgreSQL restarted",
            Self::FailoverWithLoss(_) => "failover with loss",
            Self::Network(_, Bend::Cut, _) => "connections cut",
            Self::Network(_, Bend::Delay, _) => "connections delayed",
            Self::Network(_, Bend::BlackHole, _) => "connections black-holed",
            Self::DiskFull(_) => "disk full",
            Self::StrayWakeUps => "stray messages",
            Self::Shuffle => "messages reordered",
        }
    }
}

/// Where a worker may be struck: the lines of the file `fault-points` in its folder.
fn points(worker: &str) -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../workers").join(worker).join("fault-points");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.lines().map(str::to_owned).collect()
}

/// Which harm a run knows.
#[derive(Clone, Debug)]
pub struct Repertoire {
    /// Processes of each worker.
    pub each: usize,
    /// The servers are ours alone, and may be restarted.
    pub own_servers: bool,
    /// Only these kinds, where some are given: for planted defects.
    pub only: Option<Vec<Harm>>,
}

/// The two schedules of a seed, for processes and for everything else: when, and what.
pub fn schedule(seed: u64, span: Duration, repertoire: &Repertoire) -> [Vec<(Duration, Harm)>; 2] {
    let mut random = StdRng::seed_from_u64(seed ^ 0xD1CE);
    let mut lanes = [Vec::new(), Vec::new()];
    for (number, (lane, pause)) in lanes.iter_mut().zip([(200, 1_200), (500, 2_500)]).enumerate() {
        // What shows a defect may have to be there from the beginning.
        let mut at = Duration::from_millis(if repertoire.only.is_some() { 0 } else { 500 });
        while at < span {
            let harm = match (&repertoire.only, number) {
                (Some(only), 0) => only.choose(&mut random).unwrap().clone(),
                (Some(_), _) => break,
                (None, 0) => processes::choose(&mut random, repertoire.each),
                (None, _) => elsewhere(&mut random, repertoire.own_servers),
            };
            lane.push((at, harm));
            at += Duration::from_millis(random.random_range(pause.0..pause.1));
        }
    }
    lanes
}

fn elsewhere(random: &mut StdRng, own_servers: bool) -> Harm {
    let millis = random.random_range(300..4_000);
    match random.random_range(0..if own_servers { 124 } else { 84 }) {
        0..8 => Harm::CloseConnections,
        8..18 => Harm::PurgeWork,
        18..23 => Harm::PurgeAll,
        23..30 => Harm::CancelConsumers(broker::WORK.choose(random).unwrap()),
        30..38 => Harm::TerminateSessions,
        38..44 => {
            let tables =
                ["lethe.requests", "lethe.slices", "lethe.callbacks", "subject_data.event_batches", "lethe.leaders"];
            Harm::LongLock(tables.choose(random).unwrap(), millis)
        }
        44..66 => {
            let bend = *[Bend::Cut, Bend::Delay, Bend::BlackHole].choose(random).unwrap();
            Harm::Network(random.random_range(0..4), bend, millis)
        }
        66..72 => Harm::DiskFull(millis),
        72..78 => Harm::StrayWakeUps,
        78..84 => Harm::Shuffle,
        84..88 => Harm::RestartBroker(random.random_bool(0.5)),
        88..92 => Harm::MemoryAlarm(random.random_range(3_000..20_000)),
        118.. => Harm::LongAlarm(random.random_range(90_000..150_000)),
        111.. => Harm::FailoverWithLoss(millis),
        105.. => Harm::ReadOnly(2 * millis),
        100.. => Harm::LoseQueue(broker::WORK.choose(random).unwrap()),
        _ => Harm::RestartPostgres(random.random_bool(0.5)),
    }
}

/// A span of time.
pub type Span = (Instant, Instant);

/// Does the harm of a run.
pub struct Driver {
    world: Arc<World>,
    fleet: Arc<Fleet>,
    each: usize,
    done: Mutex<BTreeMap<&'static str, usize>>,
    purges: Mutex<Vec<Span>>,
    /// From then on, what is committed is missing in the copy.
    copied_at: Mutex<Option<Instant>>,
    losses: Mutex<Vec<Span>>,
    found: Mutex<Vec<Violation>>,
}

impl Driver {
    /// A driver for these.
    pub fn new(world: Arc<World>, fleet: Arc<Fleet>, each: usize) -> Arc<Self> {
        Arc::new(Self {
            world,
            fleet,
            each,
            done: Mutex::default(),
            purges: Mutex::default(),
            copied_at: Mutex::default(),
            losses: Mutex::default(),
            found: Mutex::default(),
        })
    }

    /// Does it all, and mends it again.
    pub async fn run(self: &Arc<Self>, lanes: [Vec<(Duration, Harm)>; 2], span: Duration) {
        let began = Instant::now();
        let lanes = lanes.map(|lane| {
            let driver = self.clone();
            tokio::spawn(async move {
                for (at, harm) in lane {
                    // Where one took long, those behind it are left out.
                    if began.elapsed() > span {
                        break;
                    }
                    tokio::time::sleep(at.saturating_sub(began.elapsed())).await;
                    driver.inflict(&harm).await;
                    *driver.done.lock().unwrap().entry(harm.kind()).or_default() += 1;
                }
            })
        });
        for lane in lanes {
            lane.await.unwrap();
        }
        self.fleet.wake_all().await;
    }

    async fn inflict(&self, harm: &Harm) {
        match *harm {
            Harm::Kill(index) => self.kill(index).await,
            Harm::KillAll(name) => self.kill_all(name).await,
            Harm::Terminate(index) => self.fleet.signal(index, "TERM").await,
            Harm::KillAt(index, ref point, pass) => self.fleet.kill(index, Some(&format!("kill@{point}:{pass}"))).await,
            Harm::Zombie(index) => self.zombie(index).await,
            Harm::ZombieAt(index, ref point, pass) => self.zombie_at(index, point, pass).await,
            Harm::ClockJump => self.world.jump(61.0).await,
            Harm::CloseConnections => self.close_connections().await,
            Harm::PurgeWork => self.purge(&broker::WORK).await,
            Harm::PurgeAll => self.purge_all().await,
            Harm::CancelConsumers(queue) => self.delete_queue(queue).await,
            Harm::LoseQueue(queue) => self.lose_queue(queue).await,
            Harm::RestartBroker(by_force) => self.restart_broker(by_force).await,
            Harm::MemoryAlarm(millis) => self.memory_alarm(millis).await,
            Harm::LongAlarm(millis) => self.long_alarm(millis).await,
            Harm::ReadOnly(millis) => self.read_only(millis).await,
            Harm::TerminateSessions => self.terminate_sessions().await,
            Harm::LongLock(table, millis) => self.long_lock(table, millis).await,
            Harm::RestartPostgres(by_force) => self.restart_postgres(by_force).await,
            Harm::FailoverWithLoss(millis) => self.failover_with_loss(millis).await,
            Harm::Network(way, bend, millis) => self.bend(way, bend, millis).await,
            Harm::DiskFull(millis) => self.fill_disk(millis).await,
            Harm::StrayWakeUps => self.stray_wake_ups().await,
            Harm::Shuffle => self.shuffle().await,
        }
    }

    /// How often each kind was done.
    pub fn done(&self) -> BTreeMap<&'static str, usize> {
        self.done.lock().unwrap().clone()
    }

    /// When the queues of requests were emptied.
    pub fn purges(&self) -> Vec<Span> {
        self.purges.lock().unwrap().clone()
    }

    /// When PostgreSQL confirmed what it lost.
    pub fn losses(&self) -> Vec<Span> {
        self.losses.lock().unwrap().clone()
    }

    /// What was seen while harm was done.
    pub fn found(&self) -> Vec<Violation> {
        self.found.lock().unwrap().clone()
    }
}

/// The places in the fleet of a worker.
pub fn slots(name: &str, each: usize) -> std::ops::Range<usize> {
    let first = FLEET.iter().position(|one| one.name == name).unwrap_or(0) * each;
    first..first + each
}

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}
