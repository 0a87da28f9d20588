//! Poison: a message that fails again and again is dead-lettered after a bounded number of attempts, counted in PostgreSQL
//! (docs/adr/0013-poison.md). Wraps the handler of a queue whose messages hold content.
//!
//! There are two kinds of failure. One is reported: the handler finds that this very message fails
//! ([`Outcome::Poison`]). The other is not: the process dies midway, and the message is redelivered. A redelivered
//! message may be an innocent neighbour, so it is first handled with the others, then alone, and only one that was
//! alone each time is dead-lettered.

use std::sync::Arc;
use std::time::Duration;

use lethe_broker::{GroupHandler, Message, Outcome};
use lethe_db::{Db, DbError, message_failures};
use lethe_domain::crypto::Keys;

/// Attempts after which a message is dead-lettered.
pub(crate) const ATTEMPTS: i32 = 5;
/// Failing again at once does not count as another attempt.
const PAUSE: Duration = Duration::from_millis(200);
const LATER: Duration = Duration::from_secs(1);

/// A handler whose messages are counted when they fail.
#[derive(Debug)]
pub struct Counted<H> {
    /// The handler.
    pub handler: H,
    /// Where it is counted.
    pub db: Db,
    /// For the digests.
    pub keys: Arc<Keys>,
    /// The queue.
    pub queue: &'static str,
    /// After a message that has to wait, those behind it wait as well.
    pub in_order: bool,
}

impl<H: GroupHandler> GroupHandler for Counted<H> {
    async fn handle(&self, group: &[Message]) -> Vec<Outcome> {
        match self.try_handle(group).await {
            Ok(outcomes) => outcomes,
            Err(error) => {
                // Without the count nobody can say how often: the message waits.
                tracing::debug!(%error, queue = self.queue, "attempts could not be counted");
                group.iter().map(|_| Outcome::RetryAfter(LATER)).collect()
            }
        }
    }
}

impl<H: GroupHandler> Counted<H> {
    async fn try_handle(&self, group: &[Message]) -> Result<Vec<Outcome>, DbError> {
        if !group.iter().any(|message| message.redelivered) {
            let outcomes = self.handler.handle(group).await;
            return self.judge(group, outcomes).await;
        }
        let suspects: Vec<Vec<u8>> =
            group.iter().filter(|message| message.redelivered).map(|message| self.digest(message)).collect();
        let known = message_failures::known(&self.db.session().await?, &suspects).await?;
        // Said to fail: with its neighbours it shows whether it is still the only one.
        let alone = |message: &Message| message.redelivered && known.get(&self.digest(message)) == Some(&false);
        let fresh: Vec<Vec<u8>> = group
            .iter()
            .filter(|message| message.redelivered)
            .map(|message| self.digest(message))
            .filter(|digest| !known.contains_key(digest))
            .collect();
        if !fresh.is_empty() {
            message_failures::count(&self.db.session().await?, self.queue, &fresh, None).await?;
        }
        // In the order of the queue: runs of those that go together, and one by one those that go alone.
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(group.len());
        let mut rest = group;
        while let Some(first) = rest.first() {
            let length = if alone(first) { 1 } else { rest.iter().position(alone).unwrap_or(rest.len()) };
            let (run, behind) = rest.split_at(length);
            rest = behind;
            if self.in_order && outcomes.iter().any(|outcome| matches!(outcome, Outcome::RetryAfter(_))) {
                outcomes.extend(run.iter().map(|_| Outcome::RetryAfter(PAUSE)));
            } else if alone(first) {
                outcomes.push(self.handle_alone(first).await?);
            } else {
                let handled = self.handler.handle(run).await;
                outcomes.extend(self.judge(run, handled).await?);
            }
        }
        Ok(outcomes)
    }

    /// Counts before it handles: if handling kills the process, the count is the only trace of the attempt.
    async fn handle_alone(&self, message: &Message) -> Result<Outcome, DbError> {
        let digest = self.digest(message);
        let counted =
            message_failures::count(&self.db.session().await?, self.queue, std::slice::from_ref(&digest), None).await?;
        let attempts = counted.get(&digest).copied().unwrap_or(0);
        // One attempt in the group comes before those alone.
        if attempts > ATTEMPTS + 1 {
            message_failures::forget(&self.db.session().await?, &[digest]).await?;
            let reason = format!("handling it was started {} times and never finished", attempts - 1);
            return Ok(Outcome::DeadLetter { code: "never_ended".to_owned(), reason });
        }
        let outcome = self.handler.handle(std::slice::from_ref(message)).await.pop();
        Ok(match outcome.unwrap_or(Outcome::RetryAfter(LATER)) {
            // Counted already.
            Outcome::Poison { code, reason } if attempts >= ATTEMPTS => {
                message_failures::forget(&self.db.session().await?, &[digest]).await?;
                set_aside(code, &reason, attempts)
            }
            Outcome::Poison { .. } => Outcome::RetryAfter(PAUSE),
            Outcome::RetryAfter(wait) => {
                // It came to an end, and somebody else was at fault.
                message_failures::forget(&self.db.session().await?, &[digest]).await?;
                Outcome::RetryAfter(wait)
            }
            outcome => {
                message_failures::forget(&self.db.session().await?, &[digest]).await?;
                outcome
            }
        })
    }

    /// Counts what failed, and forgets what came to an end.
    async fn judge(&self, group: &[Message], outcomes: Vec<Outcome>) -> Result<Vec<Outcome>, DbError> {
        let mut judged = Vec::with_capacity(outcomes.len());
        let (mut ended, mut waiting) = (Vec::new(), Vec::new());
        for (message, outcome) in group.iter().zip(outcomes) {
            let Outcome::Poison { code, reason } = outcome else {
                if message.redelivered {
                    let waits = matches!(outcome, Outcome::RetryAfter(_));
                    if waits { &mut waiting } else { &mut ended }.push(self.digest(message));
                }
                judged.push(outcome);
                continue;
            };
            let digest = self.digest(message);
            let one = std::slice::from_ref(&digest);
            let counted = message_failures::count(&self.db.session().await?, self.queue, one, Some(&code)).await?;
            let attempts = counted.get(&digest).copied().unwrap_or(0);
            if attempts >= ATTEMPTS {
                ended.push(digest);
                judged.push(set_aside(code, &reason, attempts));
            } else {
                judged.push(Outcome::RetryAfter(PAUSE));
            }
        }
        if !waiting.is_empty() {
            message_failures::forget_begun(&self.db.session().await?, &waiting).await?;
        }
        if !ended.is_empty() {
            message_failures::forget(&self.db.session().await?, &ended).await?;
        }
        Ok(judged)
    }

    fn digest(&self, message: &Message) -> Vec<u8> {
        self.keys.message_digest(self.queue, &message.routing_key, &message.body)
    }
}

fn set_aside(code: String, reason: &str, attempts: i32) -> Outcome {
    Outcome::DeadLetter { code, reason: format!("{reason} ({attempts} attempts)") }
}
