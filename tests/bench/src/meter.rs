//! Measuring one run.

use std::time::{Duration, Instant};

use crate::servers::{self, Servers, Usage};

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) items: f64,
    pub(crate) elapsed: Duration,
    /// Used during the run: CPU time of the run alone, memory at its end (of Lethe: its peak).
    pub(crate) lethe: Option<Usage>,
    pub(crate) postgresql: Option<Usage>,
    pub(crate) rabbitmq: Option<Usage>,
}

impl Run {
    /// Items per second.
    pub(crate) fn rate(&self) -> f64 {
        self.items / self.elapsed.as_secs_f64()
    }
}

/// Runs from its start to [`Meter::stop`].
pub(crate) struct Meter {
    servers: Servers,
    pids: Vec<u32>,
    before: [Option<Usage>; 3],
    started: Instant,
}

impl Meter {
    /// Starts the clock; `pids` are Lethe's processes, none for the raw side.
    pub(crate) fn start(servers: Servers, pids: Vec<u32>) -> Self {
        let before = look(servers, &pids);
        Self { servers, pids, before, started: Instant::now() }
    }

    /// Stops the clock.
    pub(crate) fn stop(self, items: f64) -> Run {
        let elapsed = self.started.elapsed();
        self.stop_at(items, elapsed)
    }

    /// As [`Self::stop`], where the end was seen earlier.
    pub(crate) fn stop_at(self, items: f64, elapsed: Duration) -> Run {
        let after = look(self.servers, &self.pids);
        let spent = |index: usize| {
            let (before, after) = (self.before[index]?, after[index]?);
            Some(Usage { cpu: after.cpu.saturating_sub(before.cpu), memory: after.memory })
        };
        Run { items, elapsed, lethe: spent(0), postgresql: spent(1), rabbitmq: spent(2) }
    }
}

fn look(servers: Servers, pids: &[u32]) -> [Option<Usage>; 3] {
    [(!pids.is_empty()).then(|| servers::of_processes(pids)), servers.postgresql(), servers.rabbitmq()]
}

/// The middle one; of an even number, the lower of the two.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    percentile(values, 50)
}

/// The smallest value that is not below `percent` of all.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied()
}
