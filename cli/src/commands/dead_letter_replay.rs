//! `lethe dead-letter replay`: requests and cancellations go through the usual intake, in this process; wake-ups
//! go back to their queue.

use std::sync::Arc;

use anyhow::bail;
use clap::Args;
use lethe_broker::dead_letters::{Browser, DeadLetter, SetAsideBy};
use lethe_broker::topology::{QUEUES, dead_letters_of};
use lethe_broker::{Outgoing, Publisher};
use lethe_db::requests::Overtaking;
use lethe_domain::request::ControllerId;
use lethe_intake::options::ReceivingOptions;
use lethe_intake::{Answer, Incoming, Intake, Unanswered, parse_target};
use tokio::time::MissedTickBehavior;

use super::dead_letter_chosen::{Chosen, pause, record};
use crate::context::{broker, database_with};
use crate::output::Output;

#[derive(Debug, Args)]
pub(crate) struct Replay {
    #[command(flatten)]
    chosen: Chosen,
    /// Maximum number of letters per second
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    #[command(flatten)]
    receiving: ReceivingOptions,
}

impl Replay {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        self.chosen.insist()?;
        let receiving = self.receiving.check()?;
        let db = database_with(&receiving.keys).await?;
        let intake = receiving.intake(db.clone(), Arc::new(Publisher::new(broker()?)));
        let publisher = Publisher::new(broker()?);
        let browser = Browser::open(&broker()?).await?;
        let mut clock = tokio::time::interval(pause(self.rate));
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut replayed, mut left) = (0_u64, Vec::new());
        for queue in self.chosen.queues()? {
            let mut looked = 0;
            while let Some(mut letter) = self.chosen.next(&browser, &queue, &receiving.keys, &mut looked).await? {
                clock.tick().await;
                match replay(&intake, &publisher, &letter).await? {
                    Ok(verified) => {
                        letter.controller_id = letter.controller_id.take().or(verified);
                        record(&db, &letter, "dead_letter.replayed").await?;
                        letter.take().await?;
                        replayed += 1;
                    }
                    Err(why) => left.push((letter.id, why)),
                }
            }
        }
        browser.close().await;
        let mut rows = vec![("replayed", replayed.to_string())];
        rows.extend(left.iter().map(|(letter, why)| ("left", format!("{letter}: {why}"))));
        output.one(&serde_json::json!({"replayed": replayed, "left": left}), rows)?;
        if left.is_empty() { Ok(()) } else { bail!("{} letters were left where they are", left.len()) }
    }
}

/// Why a letter stays; never a value.
type Left = String;

/// Handles a letter again; returns the controller that it belongs to, if any.
async fn replay(
    intake: &Intake,
    publisher: &Publisher,
    letter: &DeadLetter,
) -> anyhow::Result<Result<Option<ControllerId>, Left>> {
    let wake_ups = QUEUES.iter().find(|queue| !queue.holds_bodies && dead_letters_of(queue.name) == letter.queue);
    if let Some(queue) = wake_ups {
        publisher.publish(&[Outgoing::to_queue(queue.name, letter.body.clone())]).await?;
        return Ok(Ok(None));
    }
    // If the broker took a letter out of one of our queues, only the routing key says whose it is, and only a verified
    // user proves it.
    let speaks_for = || letter.routing_key.split('.').next().and_then(|first| first.parse().ok());
    let claimed = letter.controller_id.clone().or_else(speaks_for);
    let Some(controller_id) = &claimed else { return Ok(Err("it names no controller".to_owned())) };
    if let Err(why) = check_sender(intake, letter, controller_id).await? {
        return Ok(Err(why));
    }
    let answer = match letter.kind() {
        Some("request") => {
            let incoming = Incoming { controller_id, body: &letter.body, path_version: None };
            match intake.receive(&[incoming]).await.pop() {
                Some(Ok(answer)) => answer,
                Some(Err(Unanswered::Poison(error))) => return Ok(Err(format!("it fails again: {}", error.class()))),
                Some(Err(Unanswered::Later(error))) => return Err(error.into()),
                None => bail!("the intake gave no answer"),
            }
        }
        Some("cancellation") => match parse_target(controller_id, &letter.body) {
            Ok(target) => match intake.cancel(&[target], Overtaking::Remember).await?.pop() {
                Some(answer) => answer,
                None => bail!("the intake gave no answer"),
            },
            Err(_) => return Ok(Err("it is not a cancellation".to_owned())),
        },
        Some(_) => return Ok(Err("it is a query, and nobody is waiting for the answer any more".to_owned())),
        None => return Ok(Err("its routing key names no known operation".to_owned())),
    };
    Ok(accepted(&answer).map(|()| claimed))
}

fn accepted(answer: &Answer) -> Result<(), Left> {
    match answer.status {
        200..300 => Ok(()),
        status => Err(format!("it is refused with {status}: {}", answer.message.as_deref().unwrap_or_default())),
    }
}

/// What the matcher refused because of its sender is not accepted here either. What the broker dead-lettered was never
/// checked: then the sender is the user that the broker verified, and a routing key that it passed.
async fn check_sender(
    intake: &Intake,
    letter: &DeadLetter,
    controller_id: &ControllerId,
) -> anyhow::Result<Result<(), Left>> {
    let controllers = intake.controllers(&[controller_id.as_str()]).await?;
    let Some(controller) = controllers.get(controller_id.as_str()) else {
        return Ok(Err("there is no such controller".to_owned()));
    };
    if letter.routing_key.split('.').next() != Some(controller_id.as_str()) {
        return Ok(Err("its routing key names another controller".to_owned()));
    }
    let verified = letter.user_id.is_some() && letter.user_id == controller.amqp_user;
    let checked = match letter.by {
        SetAsideBy::Us if letter.cause == "forbidden" => false,
        SetAsideBy::Us if letter.cause == "never_ended" => controller.any_amqp_user || verified,
        SetAsideBy::Us => true,
        SetAsideBy::AlternateExchange => controller.any_amqp_user || verified,
        // The routing key is in a header, and older brokers let a publisher write it beforehand.
        SetAsideBy::Queue => verified,
    };
    Ok(if checked { Ok(()) } else { Err("its sender cannot be verified; it has to be published again".to_owned()) })
}
