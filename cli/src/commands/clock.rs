//! `lethe clock`: what the schedulers believe about PostgreSQL's clock, and an operator's consent to it.

use clap::Subcommand;
use jiff::Timestamp;
use lethe_db::leader::{self, CLOCK_TOLERANCE, KnownClock};
use serde::Serialize;

use crate::context::database;
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show PostgreSQL's clock, this machine's, and the last one a scheduler trusted
    Show,
    /// Accept PostgreSQL's clock as it is now: work held back because it jumped ahead resumes, which cannot be undone
    Agree,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    known: KnownClock,
    here: Timestamp,
    doubted: bool,
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        match self {
            Self::Show => {
                let known = leader::clock(&db.session().await?).await?;
                let shown = Shown { known, here: Timestamp::now(), doubted: is_doubted(&known) };
                output.one(
                    &shown,
                    vec![
                        ("PostgreSQL's clock", known.database.to_string()),
                        ("this machine's clock", shown.here.to_string()),
                        ("last believed by a scheduler", or_dash(known.believed)),
                        ("a scheduler leads", if known.led { "yes" } else { "no" }.to_owned()),
                        ("doubted", if shown.doubted { "yes" } else { "no" }.to_owned()),
                    ],
                )
            }
            Self::Agree => {
                let agreed = leader::agree_to_clock(&db).await?;
                output.one(&serde_json::json!({"agreed": agreed}), vec![("agreed to", agreed.to_string())])
            }
        }
    }
}

/// While a scheduler leads, it renews the clock that it believes every few seconds.
pub(super) fn is_doubted(known: &KnownClock) -> bool {
    known.led && known.ahead().is_some_and(|ahead| ahead > CLOCK_TOLERANCE)
}
