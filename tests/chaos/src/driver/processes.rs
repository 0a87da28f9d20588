//! Harm to processes.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use lethe_runtime::fleet::FLEET;

use super::{Driver, Harm, pause, points, slots};

pub(super) fn choose(random: &mut StdRng, each: usize) -> Harm {
    let index = random.random_range(0..FLEET.len() * each);
    let name = FLEET.choose(random).unwrap().name;
    let struck = slots(name, each).start + random.random_range(0..each);
    let (point, pass) = (points(name).choose(random).unwrap().clone(), random.random_range(1..6));
    match random.random_range(0..100) {
        0..30 => Harm::Kill(index),
        30..34 => Harm::KillAll(name),
        34..40 => Harm::Terminate(index),
        40..76 => Harm::KillAt(struck, point, pass),
        76..82 => Harm::Zombie(index),
        82..96 => Harm::ZombieAt(struck, point, pass),
        _ => Harm::ClockJump,
    }
}

impl Driver {
    pub(super) async fn kill(&self, index: usize) {
        self.fleet.kill(index, None).await;
    }

    pub(super) async fn kill_all(&self, name: &str) {
        for index in slots(name, self.each) {
            self.fleet.kill(index, None).await;
        }
    }

    pub(super) async fn zombie(&self, index: usize) {
        self.fleet.signal(index, "STOP").await;
        self.outlive(index).await;
    }

    /// Starts a process that stops itself at the point; where it does not get there in time it lives on.
    pub(super) async fn zombie_at(&self, index: usize, point: &str, pass: u32) {
        self.fleet.kill(index, Some(&format!("stop@{point}:{pass}"))).await;
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(6) {
            if self.fleet.is_stopped(index).await {
                self.outlive(index).await;
                return;
            }
            pause(20).await;
        }
    }

    /// Its leases run out, others take over, and it goes on as if nothing had happened.
    async fn outlive(&self, index: usize) {
        self.world.jump(61.0).await;
        pause(2_000).await;
        self.fleet.signal(index, "CONT").await;
    }
}
