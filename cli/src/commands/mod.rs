//! One module for each noun of the command line.

mod audit;
mod batch;
mod callback;
mod certificate;
mod clock;
mod controller;
mod dead_letter;
mod dead_letter_chosen;
mod dead_letter_replay;
mod doctor;
mod doctor_findings;
mod doctor_schedule;
mod endpoint;
mod import;
mod import_run;
mod request;
mod top;

use anyhow::Context as _;
use clap::Subcommand;
use lethe_db::migrate;

use crate::context;
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Migrate the database to this release's schema, and declare the broker's topology
    Migrate,
    /// Add, list and re-key controllers
    #[command(subcommand)]
    Controller(controller::Command),
    /// Import subject data from JSON Lines
    #[command(subcommand)]
    Import(import::Command),
    /// Submit, follow, cancel, approve and retry requests
    #[command(subcommand)]
    Request(request::Command),
    /// Show what will run, when and for whom, and what was done
    #[command(subcommand)]
    Batch(batch::Command),
    /// Show callbacks, and send them again
    #[command(subcommand)]
    Callback(callback::Command),
    /// Show where callbacks go, and give up on an endpoint
    #[command(subcommand)]
    Endpoint(endpoint::Command),
    /// Show, replay and discard dead letters
    #[command(subcommand, name = "dead-letter")]
    DeadLetter(dead_letter::Command),
    /// Verify and export the audit trail
    #[command(subcommand)]
    Audit(audit::Command),
    /// Verify erasure certificates
    #[command(subcommand)]
    Certificate(certificate::Command),
    /// Show how far the schedulers trust PostgreSQL's clock, and accept it
    #[command(subcommand)]
    Clock(clock::Command),
    /// Check servers, schema, topology, clocks, keys and certificate, and say what to do about each finding
    Doctor(Box<doctor::Doctor>),
    /// Watch the fleet: requests by status, callbacks, the oldest work in each stage
    Top(top::Top),
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        match self {
            Self::Migrate => run_migrations(output).await,
            Self::Controller(command) => command.run(output).await,
            Self::Import(command) => command.run(output).await,
            Self::Request(command) => command.run(output).await,
            Self::Batch(command) => command.run(output).await,
            Self::Callback(command) => command.run(output).await,
            Self::Endpoint(command) => command.run(output).await,
            Self::DeadLetter(command) => Box::pin(command.run(output)).await,
            Self::Audit(command) => command.run(output).await,
            Self::Certificate(command) => command.run(output).await,
            Self::Clock(command) => command.run(output).await,
            Self::Doctor(doctor) => doctor.run(output).await,
            Self::Top(top) => top.run().await,
        }
    }
}

async fn run_migrations(output: Output) -> anyhow::Result<()> {
    let db = context::any_database()?;
    let applied = migrate::migrate(&db).await.context("the schema was not changed")?;
    output.list(&applied, &["migration"], |name| vec![name.clone()])?;
    let version = migrate::needed_version();
    let oldest = migrate::OLDEST_WORKERS;
    output.say(&format!("the schema is at version {version}; workers built for {oldest} or later can keep running"))?;
    // Connecting declares every exchange and queue.
    let link = context::broker()?.connect().await.context("the topology could not be declared")?;
    link.close().await;
    output.say("the topology is declared")
}
