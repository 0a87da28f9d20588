//! `lethe top`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use lethe_db::overview::{self, Overview};

use crate::context::database;
use crate::output::{line, table};

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Print once and exit
    #[arg(long)]
    once: bool,
}

impl Top {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let db = database().await?;
        loop {
            let overview = overview::load(&db.session().await?).await?;
            if !self.once && std::io::stdout().is_terminal() {
                // Home and clear: the next picture takes the place of this one.
                write!(std::io::stdout().lock(), "\x1b[H\x1b[2J")?;
            }
            line(&picture(&overview))?;
            if self.once {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                _ = tokio::signal::ctrl_c() => return Ok(()),
            }
        }
    }
}

fn picture(overview: &Overview) -> String {
    let requests = overview
        .requests
        .iter()
        .map(|(kind, status, count)| vec![kind.to_string(), status.to_string(), count.to_string()]);
    let callbacks = overview.callbacks.iter().map(|(state, count)| vec![state.to_string(), count.to_string()]);
    let oldest = overview.oldest_seconds.iter().map(|(stage, seconds)| vec![stage.clone(), format!("{seconds:.1} s")]);
    format!(
        "{}\n{}\n{}\nleader epoch {}",
        table(&["type", "status", "requests"], requests),
        table(&["callbacks", "number"], callbacks),
        table(&["stage", "oldest ready"], oldest),
        overview.leader_epoch
    )
}
