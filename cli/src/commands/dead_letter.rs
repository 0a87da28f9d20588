//! `lethe dead-letter`: dead letters, without their content.

use std::collections::BTreeMap;

use anyhow::Context as _;
use clap::Subcommand;
use jiff::Timestamp;
use lethe_broker::dead_letters::{Browser, DeadLetter};
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::Parser;
use lethe_domain::request::ControllerId;
use lethe_runtime::options::KeyOptions;
use serde::Serialize;

use super::dead_letter_chosen::{Chosen, record};
use super::dead_letter_replay::Replay;
use crate::context::{broker, database};
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Count dead letters by queue, cause and controller
    List {
        /// List every letter instead of counts
        #[arg(long = "letters")]
        each: bool,
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        keys: KeyOptions,
    },
    /// Show everything about a letter except its content
    Show {
        /// As `lethe dead-letter list --letters` shows it
        letter: String,
        #[command(flatten)]
        keys: KeyOptions,
    },
    /// Handle letters again; those that are refused again stay
    Replay(Box<Replay>),
    /// Discard letters
    Discard {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        keys: KeyOptions,
    },
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
    fn of(letter: &DeadLetter) -> Self {
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
            ("since", or_dash(self.set_aside_at)),
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
                let chosen = Chosen::letter(letter);
                let found = all(&chosen, &keys.keys()?).await?;
                let shown = found
                    .first()
                    .context("no queue holds this letter; `lethe dead-letter list --letters` shows all")?;
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
        let headings = ["letter", "queue", "cause", "kind", "controller", "request", "bytes", "since"];
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
