//! Shares: one controller's deliveries take a part of this process's permits at most, however many endpoints it names and
//! whatever they do (ADR 0031).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use lethe_db::{Db, DbError, endpoints};
use lethe_domain::request::{ControllerId, EndpointId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// More endpoints than these are not remembered.
const REMEMBERED: usize = 100_000;

/// The shares of all controllers.
pub(crate) struct Shares {
    all: Arc<Semaphore>,
    each: usize,
    /// One for each controller that has had something to deliver.
    of: Mutex<HashMap<ControllerId, Share>>,
    controllers: Mutex<HashMap<EndpointId, ControllerId>>,
}

/// The share of one controller.
#[derive(Clone)]
pub(crate) struct Share {
    own: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// The right to one delivery: of the controller's share, and of the process.
#[derive(Debug)]
pub(crate) struct Permit {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Shares {
    /// Shares of `each` in the permits of a process.
    pub(crate) fn new(all: Arc<Semaphore>, each: usize) -> Self {
        Self { all, each, of: Mutex::default(), controllers: Mutex::default() }
    }

    /// The shares in which these endpoints deliver; one that is unknown is left out.
    pub(crate) async fn of(&self, db: &Db, wanted: &[EndpointId]) -> Result<Vec<(EndpointId, Share)>, DbError> {
        let unknown: Vec<EndpointId> = {
            let controllers = self.controllers.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.iter().copied().filter(|endpoint| !controllers.contains_key(endpoint)).collect()
        };
        let found = if unknown.is_empty() {
            HashMap::new()
        } else {
            endpoints::controllers(&db.session().await?, &unknown).await?
        };
        let mut controllers = self.controllers.lock().unwrap_or_else(PoisonError::into_inner);
        let shares = wanted
            .iter()
            .filter_map(|endpoint| {
                let controller = found.get(endpoint).or_else(|| controllers.get(endpoint))?;
                Some((*endpoint, self.share(controller)))
            })
            .collect();
        if controllers.len() + found.len() > REMEMBERED {
            controllers.clear();
        }
        controllers.extend(found);
        Ok(shares)
    }

    fn share(&self, controller: &ControllerId) -> Share {
        let mut shares = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Share { own: Arc::new(Semaphore::new(self.each)), all: self.all.clone() };
        shares.entry(controller.clone()).or_insert_with(new).clone()
    }
}

impl Share {
    /// A permit, as soon as there is one. A task that waits for its share holds none of the process's permits.
    pub(crate) async fn acquire(&self) -> Option<Permit> {
        let own = self.own.clone().acquire_owned().await.ok()?;
        let all = self.all.clone().acquire_owned().await.ok()?;
        Some(Permit { _own: own, _all: all })
    }

    /// A permit, if there is one now.
    pub(crate) fn try_acquire(&self) -> Option<Permit> {
        let own = self.own.clone().try_acquire_owned().ok()?;
        let all = self.all.clone().try_acquire_owned().ok()?;
        Some(Permit { _own: own, _all: all })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_controller_that_has_used_up_its_share_leaves_the_rest_to_the_others() {
        let all = Arc::new(Semaphore::new(8));
        let shares = Shares::new(all.clone(), 3);
        let share = |id: &str| shares.share(&id.parse().unwrap());
        let held: Vec<Permit> = std::iter::from_fn(|| share("a").try_acquire()).collect();
        assert_eq!((held.len(), all.available_permits()), (3, 5));
        assert!(share("a").acquire().now_or_never().is_none(), "it waits,");
        assert_eq!(all.available_permits(), 5, "and holds nothing meanwhile");
        let other: Vec<Permit> = std::iter::from_fn(|| share("b").try_acquire()).collect();
        assert_eq!(other.len(), 3);
        drop(held);
        assert!(share("a").acquire().now_or_never().flatten().is_some());
    }

    #[test]
    fn what_is_not_to_be_had_of_the_process_goes_back_to_the_share() {
        let shares = Shares::new(Arc::new(Semaphore::new(1)), 3);
        let share = shares.share(&"a".parse().unwrap());
        let held = share.try_acquire().unwrap();
        assert!(share.try_acquire().is_none());
        assert_eq!(share.own.available_permits(), 2);
        drop(held);
        assert_eq!(share.own.available_permits(), 3);
    }
}
