//! Calls of one controller that come at the same time share a transaction (DESIGN rule 3): requests that are submitted, and
//! questions for statuses.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use lethe_db::requests::Target;
use lethe_domain::opendsr::ApiVersion;
use lethe_domain::request::{ControllerId, SubjectRequestId};
use lethe_intake::{Answer, Incoming, Intake, Unanswered};
use tokio::sync::{Semaphore, oneshot};

/// What a call of an authenticated caller came to.
pub(crate) type Outcome = Result<Answer, Unanswered>;

/// Maximum number of calls in a group.
const GROUP: usize = 64;
/// Maximum bytes of their bodies; a single one may be larger. Each takes several times its size while it is worked on.
const GROUP_BYTES: usize = 4 << 20;
/// Groups of one controller that are worked on at once. What arrives meanwhile gathers for the next one, so that the
/// busier a controller is, the larger its groups are; a single call never waits.
const GROUPS_AT_ONCE: usize = 2;

/// What is worked on in groups.
pub(crate) trait Call: Send + Sync + 'static {
    /// Bytes that it brings.
    fn size(&self) -> usize;

    /// The outcomes of a group of one controller, in order.
    fn work(
        intake: &Intake,
        controller_id: &ControllerId,
        group: &[&Self],
    ) -> impl Future<Output = Vec<Outcome>> + Send;
}

/// A request that is submitted. What it is answered as 201 is durable.
pub(crate) struct Submit {
    pub(crate) body: Bytes,
    pub(crate) version: ApiVersion,
}

impl Call for Submit {
    fn size(&self) -> usize {
        self.body.len()
    }

    async fn work(intake: &Intake, controller_id: &ControllerId, group: &[&Self]) -> Vec<Outcome> {
        let incoming: Vec<Incoming<'_>> = group
            .iter()
            .map(|one| Incoming { controller_id, body: &one.body, path_version: Some(one.version) })
            .collect();
        intake.receive(&incoming).await
    }
}

/// A question for the status of a request.
pub(crate) struct AskStatus(pub(crate) SubjectRequestId);

impl Call for AskStatus {
    fn size(&self) -> usize {
        0
    }

    async fn work(intake: &Intake, controller_id: &ControllerId, group: &[&Self]) -> Vec<Outcome> {
        let targets: Vec<Target> = group.iter().map(|one| (controller_id.clone(), one.0)).collect();
        intake.statuses(&targets).await
    }
}

/// Gathers calls and hands groups of them to the intake.
pub(crate) struct Groups<C> {
    intake: Intake,
    of: Mutex<HashMap<ControllerId, Arc<Gathering<C>>>>,
}

struct Gathering<C> {
    waiting: Mutex<VecDeque<Waiting<C>>>,
    places: Semaphore,
}

struct Waiting<C> {
    call: C,
    outcome: oneshot::Sender<Outcome>,
}

impl<C: Call> Groups<C> {
    pub(crate) fn new(intake: Intake) -> Self {
        Self { intake, of: Mutex::default() }
    }

    /// What a call comes to.
    pub(crate) async fn take(&self, controller_id: &ControllerId, call: C) -> Outcome {
        let (outcome, received) = oneshot::channel();
        let gathering = self.gathering(controller_id);
        let waiting = Waiting { call, outcome };
        gathering.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(waiting);
        // A task of its own: the client of one call may go away, and the others of its group stay.
        let (intake, controller_id) = (self.intake.acting_for(controller_id), controller_id.clone());
        tokio::spawn(async move { gathering.work_on_next(&intake, &controller_id).await });
        received.await.unwrap_or_else(|_| Err(Unanswered::forgotten()))
    }

    fn gathering(&self, controller_id: &ControllerId) -> Arc<Gathering<C>> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Gathering { waiting: Mutex::default(), places: Semaphore::new(GROUPS_AT_ONCE) };
        of.entry(controller_id.clone()).or_insert_with(|| Arc::new(new())).clone()
    }
}

impl<C: Call> Gathering<C> {
    /// Takes what has gathered; there is one such task for each call, so none is left behind.
    async fn work_on_next(&self, intake: &Intake, controller_id: &ControllerId) {
        let _place = self.places.acquire().await;
        let group: Vec<Waiting<C>> = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let length = group_length(waiting.iter().map(|one| one.call.size()));
            waiting.drain(..length).collect()
        };
        if group.is_empty() {
            return;
        }
        let calls: Vec<&C> = group.iter().map(|one| &one.call).collect();
        let outcomes = C::work(intake, controller_id, &calls).await;
        for (one, outcome) in group.into_iter().zip(outcomes) {
            // Nobody may be listening any more: it is done all the same.
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
        assert_eq!(group_length([0; 100].into_iter()), GROUP, "questions bring nothing");
    }
}
