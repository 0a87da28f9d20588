//! Requests that come at the same time share a transaction (DESIGN rule 3), but only those of one controller.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::request::ControllerId;
use lethe_intake::{Answer, Incoming, Intake, Unanswered};
use tokio::sync::{Semaphore, oneshot};

/// What a call of an authenticated caller came to.
pub(crate) type Outcome = Result<Answer, Unanswered>;

/// Maximum number of requests in a group.
const GROUP: usize = 64;
/// Maximum bytes of their bodies; a single one may be larger. Each takes several times its size while it is worked on.
const GROUP_BYTES: usize = 4 << 20;
/// Groups of one controller that are worked on at once. What arrives meanwhile gathers for the next one, so that the
/// busier a controller is, the larger its groups are; a single request never waits.
const GROUPS_AT_ONCE: usize = 2;

/// Gathers requests and hands groups of them to the intake.
pub(crate) struct Groups {
    intake: Intake,
    of: Mutex<HashMap<ControllerId, Arc<Gathering>>>,
}

struct Gathering {
    waiting: Mutex<VecDeque<Waiting>>,
    places: Semaphore,
}

struct Waiting {
    body: Bytes,
    version: ApiVersion,
    outcome: oneshot::Sender<Outcome>,
}

impl Groups {
    pub(crate) fn new(intake: Intake) -> Self {
        Self { intake, of: Mutex::default() }
    }

    /// Receives a request. What it returns as 201 is durable.
    pub(crate) async fn receive(&self, controller_id: &ControllerId, version: ApiVersion, body: Bytes) -> Outcome {
        let (outcome, received) = oneshot::channel();
        let gathering = self.gathering(controller_id);
        let waiting = Waiting { body, version, outcome };
        gathering.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(waiting);
        // A task of its own: the client of one request may go away, and the others of its group stay.
        let (intake, controller_id) = (self.intake.acting_for(controller_id), controller_id.clone());
        tokio::spawn(async move { gathering.receive_next(&intake, &controller_id).await });
        received.await.unwrap_or_else(|_| Err(Unanswered::forgotten()))
    }

    fn gathering(&self, controller_id: &ControllerId) -> Arc<Gathering> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Gathering { waiting: Mutex::default(), places: Semaphore::new(GROUPS_AT_ONCE) };
        of.entry(controller_id.clone()).or_insert_with(|| Arc::new(new())).clone()
    }
}

impl Gathering {
    /// Takes what has gathered; there is one such call for each request, so none is left behind.
    async fn receive_next(&self, intake: &Intake, controller_id: &ControllerId) {
        let _place = self.places.acquire().await;
        let group: Vec<Waiting> = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let length = group_length(waiting.iter().map(|one| one.body.len()));
            waiting.drain(..length).collect()
        };
        let incoming: Vec<Incoming<'_>> = group
            .iter()
            .map(|one| Incoming { controller_id, body: &one.body, path_version: Some(one.version) })
            .collect();
        let outcomes = intake.receive(&incoming).await;
        for (one, outcome) in group.into_iter().zip(outcomes) {
            // Nobody may be listening any more: it is recorded all the same.
            let _ = one.outcome.send(outcome);
        }
    }
}

/// How many of the bodies with these lengths make a group.
fn group_length(lengths: impl Iterator<Item = usize>) -> usize {
    let mut bytes = 0_usize;
    let fits = |length: &usize| {
        let is_first = bytes == 0;
        bytes = bytes.saturating_add(*length);
        is_first || bytes <= GROUP_BYTES
    };
    lengths.take(GROUP).take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_bounded_in_number_and_in_bytes() {
        assert_eq!(group_length([0; 0].into_iter()), 0);
        assert_eq!(group_length([10; 100].into_iter()), GROUP);
        assert_eq!(group_length([1 << 20; 100].into_iter()), 4);
        assert_eq!(group_length([GROUP_BYTES + 1, 1].into_iter()), 1);
        assert_eq!(group_length([1, GROUP_BYTES, 1].into_iter()), 1);
    }
}
