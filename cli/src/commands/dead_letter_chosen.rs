//! Which letters a command acts on, and what it records about each in the audit trail.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use lethe_broker::dead_letters::{self, Browser, DeadLetter};
use lethe_db::{Db, audit, controllers};
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::Parser;
use lethe_domain::request::ControllerId;

use crate::context::Usage;

/// Which letters.
#[derive(Debug, Args)]
pub(crate) struct Chosen {
    /// Only these, as `lethe dead-letter list --letters` shows them
    #[arg(value_name = "LETTER")]
    letters: Vec<String>,
    /// Only those in this queue
    #[arg(long)]
    queue: Option<String>,
    /// Only those with this cause
    #[arg(long)]
    cause: Option<String>,
    /// Only this controller; what the broker itself dead-lettered (`expired`, `unreadable`) has no controller
    #[arg(long, value_name = "ID")]
    controller: Option<ControllerId>,
    /// Look at no more than this many in each queue
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
}

impl Chosen {
    /// One letter, wherever it is.
    pub(crate) fn letter(letter: String) -> Self {
        Self { letters: vec![letter], queue: None, cause: None, controller: None, limit: u32::MAX }
    }

    /// Refuses a choice that names nothing at all.
    pub(crate) fn insist(&self) -> anyhow::Result<()> {
        if self.letters.is_empty() && self.queue.is_none() && self.cause.is_none() && self.controller.is_none() {
            bail!(Usage("name letters, or --queue, --cause or --controller".to_owned()));
        }
        Ok(())
    }

    fn holds(&self, letter: &DeadLetter) -> bool {
        (self.letters.is_empty() || self.letters.contains(&letter.id))
            && self.cause.as_ref().is_none_or(|cause| *cause == letter.cause)
            && self.controller.as_ref().is_none_or(|id| letter.controller_id.as_ref() == Some(id))
    }

    /// The queues to look into.
    pub(crate) fn queues(&self) -> anyhow::Result<Vec<String>> {
        let all = dead_letters::queues();
        match &self.queue {
            None => Ok(all),
            Some(queue) if all.contains(queue) => Ok(vec![queue.clone()]),
            Some(queue) => bail!(Usage(format!("{queue} holds no dead letters; these queues do: {}", all.join(", ")))),
        }
    }

    /// The next chosen letter of a queue; `looked` counts those that were looked at.
    pub(crate) async fn next(
        &self,
        browser: &Browser,
        queue: &str,
        keys: &Keys,
        looked: &mut u32,
    ) -> anyhow::Result<Option<DeadLetter>> {
        while *looked < self.limit {
            *looked += 1;
            match browser.next(queue, keys).await? {
                None => return Ok(None),
                Some(letter) if self.holds(&letter) => return Ok(Some(letter)),
                Some(_) => {}
            }
        }
        Ok(None)
    }
}

/// Records what was done to a letter before the letter is removed: at worst, one that stays is recorded twice.
pub(crate) async fn record(db: &Db, letter: &DeadLetter, event: &str) -> anyhow::Result<()> {
    // A controller id that a message merely claims must not get a chain of its own.
    let claimed: Vec<&str> = letter.controller_id.iter().map(ControllerId::as_str).collect();
    let known = controllers::by_id(&db.session().await?, &claimed).await?;
    let details = serde_json::json!({
        "letter": letter.id, "queue": letter.queue, "cause": letter.cause, "size_bytes": letter.body.len(),
        "subject_request_id": Parser::subject_request_id(&letter.body).ok(),
    });
    let tx = db.begin("record_dead_letter").await?;
    audit::record(&tx, known.first().map(|one| &one.controller_id), None, event, &details).await?;
    Ok(tx.commit().await?)
}

/// A pause between letters that makes so many in a second.
pub(crate) fn pause(rate: u32) -> Duration {
    Duration::from_secs(1) / rate.max(1)
}
