//! `lethe`: the operator's command line (contract 10).

mod commands;
mod context;
mod output;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};
use lethe_process::settings::without_empty_variable;

use crate::commands::Command;
use crate::output::{Format, Output};

/// Fulfils data subject requests: the operator's command line
#[derive(Debug, Parser)]
#[command(name = "lethe", version, after_help = ENVIRONMENT)]
struct Cli {
    /// How results are printed
    #[arg(long, global = true, value_enum, default_value = "table", env = "LETHE_OUTPUT")]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

const ENVIRONMENT: &str = "\
From the environment: DATABASE_URL (or DATABASE_URL_FILE); some commands need AMQP_URL and LETHE_MASTER_KEY_FILE as well.
Exit codes: 0 done, 1 failed, 64 wrong usage or configuration.";

/// Exit code for wrong usage and configuration (`EX_USAGE`).
const USAGE: u8 = 64;

fn without_empty_variables(command: clap::Command) -> clap::Command {
    command.mut_args(without_empty_variable).mut_subcommands(without_empty_variables)
}

fn main() -> ExitCode {
    let parsed = without_empty_variables(Cli::command()).try_get_matches();
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked { ExitCode::SUCCESS } else { ExitCode::from(USAGE) };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("lethe: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(cli.command.run(Output::new(cli.output)));
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lethe: {error:#}");
            let usage = error.is::<lethe_process::settings::ConfigError>() || error.is::<context::Usage>();
            ExitCode::from(if usage { USAGE } else { 1 })
        }
    }
}
