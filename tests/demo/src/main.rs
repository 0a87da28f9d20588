//! `make demo`: the whole life of some thousand requests on a calendar of seconds, with real servers and real workers,
//! and every claim checked from outside.

mod checks;
mod http;
mod output;
mod people;
mod receiver;
mod show;
mod traffic;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Parser;

use crate::output::say;

/// Plays the whole life of some thousand requests, and checks every claim from outside
#[derive(Debug, Parser)]
#[command(name = "demo", version)]
struct Demo {
    /// Profiles to generate
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=5_000_000))]
    profiles: u32,
    /// Event batches to generate, most of them for few profiles
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(100..=50_000_000))]
    event_batches: u32,
    /// Requests to publish; at most half the number of profiles
    #[arg(long, default_value_t = 3_000, value_parser = clap::value_parser!(u32).range(20..=1_000_000))]
    requests: u32,
    /// Processes of each worker
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: u8,
    /// Makes data and traffic the same again
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(30..=3_600))]
    timeout: u64,
}

impl Demo {
    async fn run(self) -> anyhow::Result<()> {
        if self.requests > self.profiles / 2 {
            bail!("--requests is at most half of --profiles: each request is about another profile");
        }
        let started = Instant::now();
        say("Lethe demo: own database, own vhost, a calendar of seconds.")?;
        let mut world = world::World::prepare().await?;
        let outcome = self.play(&mut world, started).await;
        // The world goes away whatever happened; its logs stay where something failed.
        world.tear_down(matches!(outcome, Ok(true))).await;
        match outcome {
            Ok(true) => Ok(()),
            Ok(false) => bail!("not every claim holds; the logs of the workers are in {}", world.folder().display()),
            Err(error) => Err(error.context(format!("the logs of the workers are in {}", world.folder().display()))),
        }
    }

    async fn play(&self, world: &mut world::World, started: Instant) -> anyhow::Result<bool> {
        let people = people::generate(world, self.profiles, self.event_batches, self.seed).await?;
        let receiver = receiver::Receiver::start(&world.certificate).await?;
        let cases = traffic::plan(&people, &receiver, self.requests, self.seed);
        say(&format!("starting {} of each worker", self.workers))?;
        world.start_workers(self.workers).await?;
        let sent = traffic::publish(world, &cases).await?;
        let finished = show::watch(world, &cases, Duration::from_secs(self.timeout)).await?;
        let files = traffic::download(world, &receiver).await?;
        world.stop_workers().await?;
        let seen = checks::Seen { sent: &sent, files: &files, callbacks: receiver.received(), finished };
        let claims = checks::all(world, &people, &cases, &seen).await?;
        show::sum_up(world, &people, &receiver, &cases, &claims, started.elapsed()).await
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match Demo::parse().run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
