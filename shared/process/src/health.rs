//! What a process knows about its own health.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by everything in a process that can be up or down. A process is ready when all of it is up.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, Arc<AtomicBool>>>>);

/// One thing that can be up or down.
#[derive(Clone, Debug)]
pub struct Component(Arc<AtomicBool>);

impl Component {
    /// Sets whether it is up; returns whether that is a change.
    #[expect(clippy::must_use_candidate, reason = "most callers only report")]
    pub fn set(&self, up: bool) -> bool {
        self.0.swap(up, Ordering::Relaxed) != up
    }
}

impl Health {
    /// The component of that name; down until it says otherwise.
    #[must_use]
    pub fn component(&self, name: &str) -> Component {
        let mut components = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Component(components.entry(name.to_owned()).or_default().clone())
    }

    /// The names of the components that are down.
    #[must_use]
    pub fn down(&self) -> Vec<String> {
        let components = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        components.iter().filter(|(_, up)| !up.load(Ordering::Relaxed)).map(|(name, _)| name.clone()).collect()
    }
}
