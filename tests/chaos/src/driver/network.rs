//! Harm to the ways between workers and servers.

use std::time::Duration;

use lethe_testing::proxy::Way;

use super::{Bend, Driver, pause};

impl Driver {
    pub(super) async fn bend(&self, way: usize, bend: Bend, millis: u64) {
        let proxy = &self.world.proxies[way];
        proxy.set(match bend {
            Bend::Cut => Way::Refusing,
            Bend::Delay => Way::Slow(Duration::from_millis(150)),
            Bend::BlackHole => Way::Silent,
        });
        pause(millis * 2).await;
        proxy.set(Way::Open);
    }
}
