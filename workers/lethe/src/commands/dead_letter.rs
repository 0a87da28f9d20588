//! `lethe dead-letter`: what was set aside, without its content.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use lethe_broker::dead_letters::{self, Browser, Letter};
use lethe_db::{Db, audit, controllers};
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::Parser;
use lethe_domain::request::ControllerId;
use lethe_runtime::options::KeyOptions;
use serde::Serialize;

use super::dead_letter_replay::Replay;
use crate::context::{Usage, broker, database};
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Count what was set aside by queue, cause and controller
    List {
        /// Every letter instead of counts
        #[arg(long = "letters")]
        each: bool,
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        keys: KeyOptions,
    },
    /// Show a letter: all but its content
    Show {
        /// As `lethe dead-letter list --letters` shows it
        letter: String,
        #[command(flatten)]
        keys: KeyOptions,
    },
    /// Have letters handled once more; what is refused again stays
    Replay(Box<Replay>),
    /// Throw letters away
    Discard {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        keys: KeyOptions,
    },
}

/// Which letters.
#[derive(Debug, Args)]
pub(crate) struct Chosen {
    /// Only these, as `lethe dead-letter list --letters` shows them
    #[arg(value_name = "LETTER")]
    letters: Vec<String>,
    /// Only those in this queue
    #[arg(long)]
    queue: Option<String>,
    /// Only those set aside for this cause
    #[arg(long)]
    cause: Option<String>,
    /// Only this controller's; what a queue itself has set aside (`expired`, `unreadable`) shows nobody's
    #[arg(long, value_name = "ID")]
    controller: Option<ControllerId>,
    /// Look at so many of each queue at most
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
}

impl Chosen {
    /// Refuses a choice that names nothing at all.
    pub(crate) fn insist(&self) -> anyhow::Result<()> {
        if self.letters.is_empty() && self.queue.is_none() && self.cause.is_none() && self.controller.is_none() {
            bail!(Usage("name letters, or --queue, --cause or --controller".to_owned()));
        }
        Ok(())
    }

    fn holds(&self, letter: &Letter) -> bool {
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
            Some(queue) => bail!(Usage(format!("{queue} keeps no letters; these do: {}", all.join(", ")))),
        }
    }

    /// The next chosen letter of a queue; `looked` counts those that were looked at.
    pub(crate) async fn next(
        &self,
        browser: &Browser,
        queue: &str,
        keys: &Keys,
        looked: &mut u32,
    ) -> anyhow::Result<Option<Letter>> {
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

/// A letter as it is shown: no body, no routing key, no value.
#[derive(Debug, Serialize)]
struct Shown {
    letter: String,
    queue: String,
    cause: String,
    message: Option<String>,
    kind: Option<&'static str>,
    controller_id: Option<ControllerId>,
    subject_request_id: Option<String>,
    size_bytes: usize,
    set_aside_at: Option<Timestamp>,
}

impl Shown {
    fn of(letter: &Letter) -> Self {
        Self {
            letter: letter.id.clone(),
            queue: letter.queue.clone(),
            cause: letter.cause.clone(),
            message: letter.message.clone(),
            kind: letter.kind(),
            controller_id: letter.controller_id.clone(),
            subject_request_id: Parser::subject_request_id(&letter.body).ok().map(|id| id.to_string()),
            size_bytes: letter.body.len(),
            set_aside_at: letter.set_aside_at,
        }
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        vec![
            ("letter", self.letter.clone()),
            ("queue", self.queue.clone()),
            ("cause", self.cause.clone()),
            ("message", or_dash(self.message.as_ref())),
            ("kind", or_dash(self.kind)),
            ("controller", or_dash(self.controller_id.as_ref())),
            ("subject_request_id", or_dash(self.subject_request_id.as_ref())),
            ("bytes", self.size_bytes.to_string()),
            ("set aside", or_dash(self.set_aside_at)),
        ]
    }
}

#[derive(Debug, Default, Serialize)]
struct Counted {
    queue: String,
    cause: String,
    controller_id: Option<ControllerId>,
    letters: u64,
    size_bytes: usize,
    oldest: Option<Timestamp>,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        match self {
            Self::List { each, chosen, keys } => list(output, each, &chosen, &keys.keys()?).await,
            Self::Show { letter, keys } => {
                let chosen =
                    Chosen { letters: vec![letter], queue: None, cause: None, controller: None, limit: u32::MAX };
                let found = all(&chosen, &keys.keys()?).await?;
                let shown = found
                    .first()
                    .context("no queue keeps this letter; `lethe dead-letter list --letters` shows all")?;
                output.one(shown, shown.rows())
            }
            Self::Replay(replay) => replay.run(output).await,
            Self::Discard { chosen, keys } => discard(output, &chosen, &keys.keys()?).await,
        }
    }
}

async fn all(chosen: &Chosen, keys: &Keys) -> anyhow::Result<Vec<Shown>> {
    let browser = Browser::open(&broker()?).await?;
    let mut shown = Vec::new();
    for queue in chosen.queues()? {
        let mut looked = 0;
        while let Some(letter) = chosen.next(&browser, &queue, keys, &mut looked).await? {
            shown.push(Shown::of(&letter));
        }
    }
    browser.close().await;
    Ok(shown)
}

async fn list(output: Output, each: bool, chosen: &Chosen, keys: &Keys) -> anyhow::Result<()> {
    let all = all(chosen, keys).await?;
    if each {
        let headings = ["letter", "queue", "cause", "kind", "controller", "request", "bytes", "set aside"];
        return output.list(&all, &headings, |one| {
            let skipped = |(name, _): &(&str, String)| *name != "message";
            one.rows().into_iter().filter(skipped).map(|(_, value)| value).collect()
        });
    }
    let mut groups: BTreeMap<(String, String, Option<ControllerId>), Counted> = BTreeMap::new();
    for one in all {
        let key = (one.queue, one.cause, one.controller_id);
        let group = groups.entry(key.clone()).or_insert_with(|| Counted {
            queue: key.0,
            cause: key.1,
            controller_id: key.2,
            ..Counted::default()
        });
        group.letters += 1;
        group.size_bytes += one.size_bytes;
        group.oldest = group.oldest.into_iter().chain(one.set_aside_at).min();
    }
    let groups: Vec<Counted> = groups.into_values().collect();
    output.list(&groups, &["queue", "cause", "controller", "letters", "bytes", "oldest"], |one| {
        vec![
            one.queue.clone(),
            one.cause.clone(),
            or_dash(one.controller_id.as_ref()),
            one.letters.to_string(),
            one.size_bytes.to_string(),
            or_dash(one.oldest),
        ]
    })
}

/// What was done to a letter goes on the trail before the letter goes: a letter that stays is named twice at worst.
pub(crate) async fn record(db: &Db, letter: &Letter, event: &str) -> anyhow::Result<()> {
    // A chain for whatever a message calls itself would be one too many.
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

async fn discard(output: Output, chosen: &Chosen, keys: &Keys) -> anyhow::Result<()> {
    chosen.insist()?;
    let db = database().await?;
    let browser = Browser::open(&broker()?).await?;
    let mut discarded = 0_u64;
    for queue in chosen.queues()? {
        let mut looked = 0;
        while let Some(letter) = chosen.next(&browser, &queue, keys, &mut looked).await? {
            record(&db, &letter, "dead_letter.discarded").await?;
            letter.take().await?;
            discarded += 1;
        }
    }
    browser.close().await;
    output.one(&serde_json::json!({"discarded": discarded}), vec![("discarded", discarded.to_string())])
}

/// A pause between letters that makes so many in a second.
pub(crate) fn pause(rate: u32) -> Duration {
    Duration::from_secs(1) / rate.max(1)
}
