//! `chaos`: the fault suite in its long form (docs/develop/chaos.md).
#![allow(clippy::print_stdout, reason = "a program that reports")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use lethe_chaos::defects::DEFECTS;
use lethe_chaos::run::{Options, run};

/// Requests with a known outcome go through the real binaries while a seeded driver does harm; a checker judges.
#[derive(Parser)]
struct Arguments {
    /// The first seed; a run is repeated with `--seed N --seeds 1`
    #[arg(long)]
    seed: Option<u64>,
    /// Runs, each with the next seed
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// Subject requests of a run
    #[arg(long, default_value_t = 250)]
    requests: usize,
    /// Seconds of traffic and harm of a run
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Processes of each worker
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// The short form, as in `make test`
    #[arg(long)]
    short: bool,
    /// The script that restarts the servers, where they are this suite's alone: deploy/local/servers
    #[arg(long)]
    servers: Option<PathBuf>,
    /// Plant this defect, which must be caught
    #[arg(long)]
    defect: Option<String>,
    /// Afterwards plant all known defects, one after the other; each must be caught
    #[arg(long)]
    defects: bool,
    /// Leave database, virtual host and folder of each run
    #[arg(long)]
    keep: bool,
}

impl Arguments {
    fn options(&self, seed: u64) -> Options {
        let mut options = Options::short(seed);
        if !self.short {
            options.requests = self.requests;
            options.span = Duration::from_secs(self.seconds);
            options.each = self.workers;
            options.patience = Duration::from_mins(3);
            options.servers.clone_from(&self.servers);
        }
        options.keep = self.keep;
        options
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let started = Instant::now();
    let first = arguments.seed.unwrap_or_else(|| u64::from(rand::random::<u16>()));
    println!("from seed {first}");
    let (mut failed, mut requests, mut harm) = (Vec::new(), 0, BTreeMap::<&str, usize>::new());
    let honest = if arguments.defect.is_some() { 0 } else { arguments.seeds };
    for seed in first..first + honest {
        let report = run(&arguments.options(seed)).await;
        println!("{report}");
        requests += report.requests;
        for (kind, count) in &report.harm {
            *harm.entry(kind).or_default() += count;
        }
        if !report.violations.is_empty() {
            println!("  repeat it: chaos --seed {seed} --seeds 1; logs: {}", report.folder().display());
            failed.push(format!("seed {seed}"));
        }
    }
    let planted: Vec<&str> = if arguments.defects {
        DEFECTS.iter().map(|(name, _)| *name).collect()
    } else {
        arguments.defect.as_deref().into_iter().collect()
    };
    for defect in &planted {
        let report = run(&arguments.options(first).with_defect(defect)).await;
        println!("{report}");
        if !report.is_caught() {
            failed.push(format!("the planted defect {defect} was not caught"));
        }
    }
    println!(
        "{honest} runs, {requests} requests, {} defects planted, {:.0} s",
        planted.len(),
        started.elapsed().as_secs_f64()
    );
    for (kind, count) in harm {
        println!("  {count:5} {kind}");
    }
    if failed.is_empty() {
        println!("no violation");
        ExitCode::SUCCESS
    } else {
        println!("failed: {}", failed.join("; "));
        ExitCode::FAILURE
    }
}
