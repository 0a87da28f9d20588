//! What every message of a controller has in common: who sent it, its answer, and the copy of what was refused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lethe_broker::headers::{SET_ASIDE_AT, VERIFIED_USER};
use lethe_broker::{Message, Outcome, Outgoing, Publisher, topology};
use lethe_db::DbError;
use lethe_db::controllers::Controller;
use lethe_domain::opendsr::{ApiError, ApiVersion};
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_intake::{Answer, Intake, Unanswered};
use lethe_signing::Processor;
use lethe_signing::signature;

/// How long a message waits when the database is away.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Checks senders and answers them.
pub(crate) struct Responder {
    pub(crate) intake: Arc<Intake>,
    pub(crate) publisher: Arc<Publisher>,
    /// Answers have a connection of their own, so that a caller whose queue refuses them holds up nobody else.
    pub(crate) answers: Publisher,
    pub(crate) processor: Processor,
}

/// What comes of a message: the answer to it, or why there is none.
pub(crate) type Answered = Result<Answer, Unanswered>;
/// Messages on their way to an answer.
pub(crate) type Group<T> = lethe_domain::group::Group<T, Answered>;

/// A message whose sender was checked.
pub(crate) struct Sent<'a> {
    pub(crate) controller_id: ControllerId,
    pub(crate) message: &'a Message,
}

impl Responder {
    /// Checks who sent each message (contract 3).
    pub(crate) async fn check<'a>(&self, group: &'a [Message]) -> Result<(Group<Sent<'a>>, Senders), DbError> {
        // Only what can be an id at all: the database would refuse the whole group for a NUL in one of them.
        let named = group
            .iter()
            .flat_map(|message| [claimed_controller(message), message.reply_to.as_deref().and_then(owner_of)]);
        let claimed: Vec<ControllerId> = named.flatten().collect();
        let claimed: Vec<&str> = claimed.iter().map(ControllerId::as_str).collect();
        let senders = Senders(self.intake.controllers(&claimed).await?);
        let group = Group::new(group).step(|message| match senders.check(message) {
            Ok(controller_id) => Ok(Sent { controller_id, message }),
            Err(refusal) => Err(Ok(Answer::error(&refusal, ApiVersion::V3))),
        });
        Ok((group, senders))
    }

    /// Sends the answers, keeps copies of what was refused, and says what becomes of each message.
    pub(crate) async fn finish(&self, group: &[Message], senders: &Senders, answers: Vec<Answered>) -> Vec<Outcome> {
        let rejected: Vec<Outgoing> = group
            .iter()
            .zip(&answers)
            .filter_map(|(message, answer)| answer.as_ref().ok().and_then(|answer| rejected_copy(message, answer)))
            .collect();
        let kept = self.publisher.publish(&rejected).await;
        if let Err(error) = &kept {
            tracing::warn!(%error, "copies of refused messages could not be kept; the messages will be handled again");
        }
        self.answer(group, senders, &answers).await;
        answers
            .into_iter()
            .map(|answer| match answer {
                // Without its copy a refused message would be lost.
                Ok(answer) if kept.is_err() && is_refusal(&answer) => Outcome::RetryAfter(RETRY_AFTER),
                Ok(_) => Outcome::Done,
                Err(Unanswered::Later(_)) => Outcome::RetryAfter(RETRY_AFTER),
                Err(Unanswered::Poison(error)) => {
                    let reason = "the database refuses this message and nothing else; see the code".to_owned();
                    Outcome::Poison { code: error.class(), reason }
                }
            })
            .collect()
    }

    /// Best effort: what was asked for is done, whether or not the caller still listens.
    async fn answer(&self, group: &[Message], senders: &Senders, answers: &[Answered]) {
        let wanted: Vec<(&Message, &str, &Answer)> = group
            .iter()
            .zip(answers)
            .filter_map(|(message, answer)| {
                let reply_to =
                    message.reply_to.as_deref().filter(|name| senders.refusal_of(name, message).is_none())?;
                Some((message, reply_to, answer.as_ref().ok()?))
            })
            .collect();
        if wanted.is_empty() {
            return;
        }
        let bodies =
            wanted.iter().map(|(message, _, answer)| (senders.algorithm(message), answer.body.clone())).collect();
        let signatures = signature::sign_all(self.processor.signer.clone(), bodies).await;
        let replies: Vec<Outgoing> = wanted
            .into_iter()
            .zip(signatures)
            .filter_map(|((message, reply_to, answer), signature)| {
                let signature =
                    signature.inspect_err(|error| tracing::error!(%error, "an answer cannot be signed")).ok()?;
                let mut reply = Outgoing::to_queue(reply_to, answer.body.clone())
                    .header("status", answer.status.to_string())
                    .header(answer.version.domain_header(), self.processor.domain.clone())
                    .header(answer.version.signature_header(), signature);
                if let Some(cursor) = &answer.cursor {
                    reply = reply.header("cursor", cursor.clone());
                }
                reply.correlation_id.clone_from(&message.correlation_id);
                Some(reply)
            })
            .collect();
        if let Err(error) = self.answers.publish(&replies).await {
            tracing::warn!(%error, answers = replies.len(), "answers could not be sent");
        }
    }
}

/// The controller that a queue is named after: the first word of its name, where that can be an id.
fn owner_of(queue: &str) -> Option<ControllerId> {
    // RabbitMQ's own names: queues that a server named, and direct reply-to.
    if queue.starts_with("amq.") {
        return None;
    }
    queue.split_once('.')?.0.parse().ok()
}

/// The controller that a message claims to be from, where that can be an id.
fn claimed_controller(message: &Message) -> Option<ControllerId> {
    message.controller_id.as_deref().and_then(|text| text.parse().ok())
}

fn is_refusal(answer: &Answer) -> bool {
    matches!(answer.status, 400 | 403 | 409 | 413)
}

fn is_reserved(name: &str) -> bool {
    name.starts_with(topology::RESERVED_PREFIX)
}

fn rejected_copy(message: &Message, answer: &Answer) -> Option<Outgoing> {
    if !is_refusal(answer) {
        return None;
    }
    let code = answer.error.unwrap_or("error");
    metrics::counter!("lethe_rejections_total", "reason" => code).increment(1);
    let mut copy = Outgoing::to_queue(topology::REJECTED, message.body.clone())
        .header("error-code", code)
        .header("error-message", answer.message.clone().unwrap_or_default())
        .header("status", answer.status.to_string())
        .header("routing-key", message.routing_key.clone())
        .header(SET_ASIDE_AT, jiff::Timestamp::now().to_string());
    if let Some(user) = &message.user_id {
        copy = copy.header(VERIFIED_USER, user.clone());
    }
    copy.content_type.clone_from(&message.content_type);
    copy.correlation_id.clone_from(&message.correlation_id);
    if let Some(controller_id) = claimed_controller(message) {
        copy = copy.header("controller-id", controller_id.as_str());
    }
    Some(copy)
}

/// The controllers that the messages of a group claim to be from, as far as they exist.
pub(crate) struct Senders(HashMap<String, Controller>);

impl Senders {
    /// Why nothing is sent to this queue for this message. Queues are named after their controllers, as the permissions of
    /// these are; with ours anybody could have an answer put into any of them. Whose message it is the broker has verified.
    fn refusal_of(&self, reply_to: &str, message: &Message) -> Option<ApiError> {
        if is_reserved(reply_to) {
            return Some(ApiError::new(400, "reply_to must not begin with dsr."));
        }
        let owner = self.0.get(owner_of(reply_to)?.as_str())?;
        // Some controllers let any AMQP user publish for them. Such a user names the controller in the routing key,
        // which the broker's own permissions restrict.
        let speaks_for = message.routing_key.split('.').next() == Some(owner.controller_id.as_str());
        let is_owners = if owner.any_amqp_user {
            speaks_for
        } else {
            message.user_id.is_some() && message.user_id == owner.amqp_user
        };
        (!is_owners).then(|| ApiError::forbidden("reply_to names a queue of another controller"))
    }

    fn check(&self, message: &Message) -> Result<ControllerId, ApiError> {
        let claimed = message.controller_id.as_deref();
        let claimed = claimed.ok_or_else(|| ApiError::new(400, "the header controller-id is required"))?;
        if message.routing_key.split('.').next() != Some(claimed) {
            return Err(ApiError::forbidden("the header controller-id is not the first word of the routing key"));
        }
        let unknown = || ApiError::forbidden("there is no such controller; add it with `lethe controller add`");
        let controller = self.0.get(claimed).ok_or_else(unknown)?;
        let allowed = match &controller.amqp_user {
            _ if controller.any_amqp_user => true,
            // The broker has verified the property against the connection.
            Some(user) => message.user_id.as_ref() == Some(user),
            None => false,
        };
        if allowed {
            // Checked last: a message refused for another reason may be replayed later without a check of its sender.
            let refusal = message.reply_to.as_deref().and_then(|name| self.refusal_of(name, message));
            refusal.map_or_else(|| Ok(controller.controller_id.clone()), Err)
        } else if controller.amqp_user.is_some() {
            Err(ApiError::forbidden("the property user_id is not the AMQP user of this controller"))
        } else {
            Err(ApiError::forbidden("this controller may not use AMQP; it was added without an AMQP user"))
        }
    }

    fn algorithm(&self, message: &Message) -> SignatureAlgorithm {
        let controller = message.controller_id.as_ref().and_then(|id| self.0.get(id));
        controller.map_or(SignatureAlgorithm::RsaPkcs1v15, |controller| controller.algorithm)
    }
}
