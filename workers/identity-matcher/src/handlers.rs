//! The three kinds of messages: requests, cancellations, queries.

use std::sync::Arc;
use std::time::Duration;

use lethe_broker::topology::{CANCELLATION, IDENTITY_MATCHING, QUERY, Queue};
use lethe_broker::{Consumer, Gather, GroupHandler, Message, Outcome, Publisher};
use lethe_db::requests::{Overtaking, Target};
use lethe_db::{DbError, calendar};
use lethe_domain::crypto::Keys;
use lethe_domain::disposition::Disposition;
use lethe_domain::opendsr::{ApiVersion, Parser};
use lethe_domain::request::ControllerId;
use lethe_intake::{Answer, Incoming, Intake, Unanswered, parse_target};
use lethe_runtime::poison::Counted;
use lethe_runtime::service::Service;
use lethe_runtime::wake::CancellationMarker;
use tokio::task::JoinSet;

use crate::options::Ready;
use crate::responder::{Answered, Responder, Sent};

/// Consumes until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    // Named before anything is awaited: the process is not ready before it consumes.
    for queue in [IDENTITY_MATCHING, CANCELLATION, QUERY] {
        let _ = service.health.component(queue.name);
    }
    if let Ok(session) = service.db.session().await
        && calendar::current(&session).await?.is_none()
    {
        tracing::warn!("there is no calendar yet; requests wait until a scheduler has stored it");
    }
    let publisher = service.publisher.clone();
    let keys = ready.receiving.keys.clone();
    let intake = Arc::new(ready.receiving.intake(service.db.clone(), publisher.clone()));
    let answers = Publisher::new(service.broker.clone());
    let responder = Responder { intake, publisher, answers, processor: ready.receiving.processor };
    let responder = Arc::new(responder);
    let mut consumers = JoinSet::new();
    let gather = Gather { messages: ready.group.into(), bytes: 4 << 20, linger: Duration::from_millis(2) };
    for _ in 0..ready.consumers {
        consumers.spawn(consume(&service, &keys, IDENTITY_MATCHING, gather, Requests(responder.clone())));
    }
    consumers.spawn(consume(&service, &keys, CANCELLATION, gather, Cancellations(responder.clone())));
    consumers.spawn(consume(&service, &keys, QUERY, gather, Queries(responder)));
    consumers.join_all().await;
    Ok(())
}

fn consume<H: GroupHandler + 'static>(
    service: &Service,
    keys: &Arc<Keys>,
    queue: Queue,
    gather: Gather,
    handler: H,
) -> impl Future<Output = ()> + Send + 'static {
    let handler =
        Counted { handler, db: service.db.clone(), keys: keys.clone(), queue: queue.name, in_order: queue.in_order };
    let consumer = Consumer {
        broker: service.broker.clone(),
        queue,
        // One group in hand, one on the way.
        prefetch: u16::try_from(gather.messages.saturating_mul(2)).unwrap_or(u16::MAX),
        gather,
        handler: Arc::new(handler),
        publisher: service.publisher.clone(),
        health: service.health.clone(),
    };
    let shutdown = service.shutdown.clone();
    async move { consumer.run(shutdown).await }
}

/// What could not even be looked at because the database is away.
fn all_later(group: &[Message], error: &DbError) -> Vec<Outcome> {
    tracing::debug!(%error, messages = group.len(), "a group waits");
    group.iter().map(|_| Outcome::RetryAfter(Duration::from_secs(1))).collect()
}

struct Requests(Arc<Responder>);

impl GroupHandler for Requests {
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        let (sent, senders) = match self.0.check(group).await {
            Ok(checked) => checked,
            Err(error) => return all_later(group, &error),
        };
        let incoming: Vec<Incoming<'_>> = sent
            .open()
            .map(|one| Incoming { controller_id: &one.controller_id, body: &one.message.body, path_version: None })
            .collect();
        let received = self.0.intake.receive(&incoming).await;
        let answers = sent.with(received, |_| Err(Unanswered::forgotten())).settle(|(_, answer)| answer);
        self.0.finish(group, &senders, answers).await
    }
}

struct Cancellations(Arc<Responder>);

impl GroupHandler for Cancellations {
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        let (markers, cancellations): (Vec<&Message>, Vec<&Message>) =
            group.iter().partition(|message| CancellationMarker::of(message).is_some());
        if markers.is_empty() {
            return self.cancel(group).await;
        }
        // Markers are rare. All cancellations of the group come first; that some of them stood behind the marker
        // does no harm.
        let cancellations: Vec<Message> = cancellations.into_iter().cloned().collect();
        let mut outcomes = self.cancel(&cancellations).await.into_iter();
        let all_handled = !outcomes.as_slice().iter().any(|outcome| matches!(outcome, Outcome::RetryAfter(_)));
        let batches: Vec<_> =
            markers.into_iter().filter_map(CancellationMarker::of).map(|marker| marker.batch_id).collect();
        let recorded = all_handled
            && self
                .0
                .intake
                .cancellations_handled(&batches)
                .await
                .inspect_err(|error| tracing::debug!(%error, "a marker waits"))
                .is_ok();
        let of_marker = if recorded { Outcome::Done } else { Outcome::RetryAfter(Duration::from_secs(1)) };
        group
            .iter()
            .map(|message| match CancellationMarker::of(message) {
                Some(_) => of_marker.clone(),
                None => outcomes.next().unwrap_or(Outcome::RetryAfter(Duration::from_secs(1))),
            })
            .collect()
    }
}

impl Cancellations {
    async fn cancel(&self, group: &[Message]) -> Vec<Outcome> {
        let (sent, senders) = match self.0.check(group).await {
            Ok(checked) => checked,
            Err(error) => return all_later(group, &error),
        };
        let targets = sent.step(|sent| {
            let target = parse_target(&sent.controller_id, &sent.message.body);
            target.map_err(|refusal| Ok(Answer::error(&refusal, ApiVersion::V3)))
        });
        let wanted: Vec<Target> = targets.open().cloned().collect();
        // One that is not known may have overtaken its request, which comes by another queue.
        let cancelled = match self.0.intake.cancel(&wanted, Overtaking::Remember).await {
            Ok(cancelled) => cancelled,
            // One of them makes the others fail.
            Err(error) if error.may_be_one_item() && group.len() > 1 => {
                let mut outcomes = Vec::with_capacity(group.len());
                for message in group {
                    outcomes.extend(Box::pin(self.cancel(std::slice::from_ref(message))).await);
                }
                return outcomes;
            }
            Err(error) if error.disposition() == Disposition::Poison => {
                let reason = "the database refuses this message and nothing else; see the code".to_owned();
                return vec![Outcome::Poison { code: error.class(), reason }];
            }
            Err(error) => return all_later(group, &error),
        };
        let answers = targets.with(cancelled, |_| Err(Unanswered::forgotten())).settle(|(_, answer)| Ok(answer));
        self.0.finish(group, &senders, answers).await
    }
}

struct Queries(Arc<Responder>);

/// What a query asks for.
enum Asked {
    Group(String, Option<String>),
    Status(Target),
}

impl Queries {
    /// What is not a query is answered at once.
    fn read(Sent { controller_id, message }: Sent<'_>) -> Result<(ControllerId, Asked), Answered> {
        let asked = if message.routing_key.split('.').next_back() == Some("group") {
            Parser::group_query(&message.body).map(|(group_id, cursor)| Asked::Group(group_id, cursor))
        } else {
            parse_target(&controller_id, &message.body).map(Asked::Status)
        };
        asked.map(|asked| (controller_id, asked)).map_err(|refusal| Ok(Answer::error(&refusal, ApiVersion::V3)))
    }

    /// All statuses in one look; each group by itself.
    async fn ask(intake: &Intake, open: Vec<&(ControllerId, Asked)>) -> Vec<Answered> {
        let targets: Vec<Target> = open
            .iter()
            .filter_map(|(_, asked)| match asked {
                Asked::Status(target) => Some(target.clone()),
                Asked::Group(..) => None,
            })
            .collect();
        let mut statuses = intake.statuses(&targets).await.into_iter();
        let mut answers = Vec::with_capacity(open.len());
        for (controller_id, asked) in open {
            answers.push(match asked {
                Asked::Status(_) => statuses.next().unwrap_or_else(|| Err(Unanswered::forgotten())),
                Asked::Group(group_id, cursor) => {
                    intake.group(controller_id, group_id, cursor.as_deref()).await.map_err(Unanswered::from)
                }
            });
        }
        answers
    }
}

impl GroupHandler for Queries {
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        let (sent, senders) = match self.0.check(group).await {
            Ok(checked) => checked,
            Err(error) => return all_later(group, &error),
        };
        let asked = sent.step(Self::read);
        let found = Self::ask(&self.0.intake, asked.open().collect()).await;
        let answers = asked.with(found, |_| Err(Unanswered::forgotten())).settle(|(_, answer)| answer);
        self.0.finish(group, &senders, answers).await
    }
}
