//! One function boots every process: options, logs, connections, signals, drain, exit code (contract 1).

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Command, CommandFactory, FromArgMatches, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::fleet::WorkerSpec;
use crate::options::CommonOptions;
use crate::telemetry;
use lethe_broker::{Broker, Publisher};
use lethe_db::{Db, DbError, installation, migrate};
use lethe_domain::crypto::Keys;
use lethe_process::health::Health;
use lethe_process::reconnect::Reconnect;
use lethe_process::settings::{ConfigError, secret, without_empty_variable};

/// Exit code for bad configuration (`EX_USAGE`).
pub(crate) const BAD_CONFIGURATION: u8 = 64;

const POSTGRESQL: &str = "postgresql";

const SECRETS: &str = "\
From the environment only:
  DATABASE_URL or DATABASE_URL_FILE  PostgreSQL 15 or newer: postgres://user:password@host:5432/database?sslmode=verify-full
  AMQP_URL or AMQP_URL_FILE          RabbitMQ 3.10 or newer: amqps://user:password@host:5671/vhost

Exit codes: 0 after a clean drain on SIGTERM or SIGINT, 64 for bad configuration, 1 otherwise.";

/// What a worker works with.
#[derive(Clone, Debug)]
pub struct Service {
    /// PostgreSQL; answers, and has the right schema.
    pub db: Db,
    /// RabbitMQ; may be away.
    pub broker: Broker,
    /// Publishes to it.
    pub publisher: Arc<Publisher>,
    /// What can be up or down.
    pub health: Health,
    /// How long what is in hand may take once the process is told to stop.
    pub drain_timeout: Duration,
    /// Folder that addresses are written to, for anybody who lets the process pick a free port.
    pub run_dir: Option<PathBuf>,
    /// Cancelled when the process is told to stop: take nothing new, finish what is in hand.
    pub shutdown: CancellationToken,
}

/// What a worker has read and checked before anything connects.
pub trait Ready {
    /// Its keys at rest, which must be those that the database is used with; `None` where it has none.
    fn keys(&self) -> Option<&Keys>;
}

/// Named unlike the options of any worker: clap makes a group of each, and two must not have one name.
#[derive(Parser)]
struct ProcessOptions<O: Args> {
    #[command(flatten)]
    common: CommonOptions,
    #[command(flatten)]
    own: O,
}

fn command<O: Args>(worker: &WorkerSpec) -> Command {
    ProcessOptions::<O>::command()
        .name(worker.name)
        .about(worker.about)
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(SECRETS)
        // The current value may be a path or a key's name that does not belong on a screen.
        .mut_args(|argument| without_empty_variable(argument).hide_env_values(true))
}

/// The variables of the options that `error` is about: clap names only the flags, and most settings come from the
/// environment.
fn variables_of(command: &Command, error: &clap::Error) -> Vec<String> {
    let named: Vec<&String> = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(name)) => vec![name],
        Some(ContextValue::Strings(names)) => names.iter().collect(),
        _ => Vec::new(),
    };
    let flag = |name: &str| name.split([' ', '=']).next().and_then(|flag| flag.strip_prefix("--")).map(str::to_owned);
    let flags: Vec<String> = named.into_iter().filter_map(|name| flag(name)).collect();
    let concerned =
        command.get_arguments().filter(|one| one.get_long().is_some_and(|long| flags.iter().any(|flag| flag == long)));
    concerned.filter_map(|one| Some(one.get_env()?.to_string_lossy().into_owned())).collect()
}

/// Runs a worker: `check` reads keys and opens stores before anything connects, `work` runs until the service's
/// `shutdown` is cancelled and then returns once nothing is in hand any more.
pub fn run<O, R, C, W, F, E>(worker: &WorkerSpec, check: C, work: W) -> ExitCode
where
    O: Args,
    R: Ready,
    C: FnOnce(O) -> Result<R, ConfigError>,
    W: FnOnce(Service, R) -> F,
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let parsed =
        command::<O>(worker).try_get_matches().and_then(|matches| ProcessOptions::<O>::from_arg_matches(&matches));
    let options = match parsed {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            let asked =
                matches!(error.kind(), clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion);
            if asked {
                return ExitCode::SUCCESS;
            }
            for variable in variables_of(&command::<O>(worker), &error) {
                eprintln!("{}: this option can also be set with the variable {variable}", worker.name);
            }
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    match boot(worker, &options.common, || check(options.own), work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Configuration(error)) => {
            eprintln!("{}: {error}", worker.name);
            ExitCode::from(BAD_CONFIGURATION)
        }
        Err(Failure::Running(error)) => {
            eprintln!("{}: {error}", worker.name);
            ExitCode::FAILURE
        }
    }
}

enum Failure {
    Configuration(ConfigError),
    Running(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Configuration(error)
    }
}

fn boot<R, W, F, E>(
    worker: &WorkerSpec,
    common: &CommonOptions,
    check: impl FnOnce() -> Result<R, ConfigError>,
    work: W,
) -> Result<(), Failure>
where
    R: Ready,
    W: FnOnce(Service, R) -> F,
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let ready = check()?;
    let database_url = secret("DATABASE_URL", "DATABASE_URL_FILE")?;
    let amqp_url = secret("AMQP_URL", "AMQP_URL_FILE")?;
    let db = Db::with_role(&database_url, common.database_connections, worker.name, worker.role)
        .map_err(|error| ConfigError::new("DATABASE_URL", error))?;
    let broker = Broker::new(&amqp_url, worker.name)?;
    let metrics = telemetry::init(common)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name(worker.name)
        .build()
        .map_err(|error| Failure::Running(format!("the runtime cannot be started: {error}")))?;
    let outcome = runtime.block_on(async {
        let publisher = Arc::new(Publisher::new(broker.clone()));
        let service = Service {
            db,
            broker,
            publisher,
            health: Health::default(),
            drain_timeout: common.drain_timeout.get(),
            run_dir: common.run_dir.clone(),
            shutdown: CancellationToken::new(),
        };
        // Down until it has answered: a process that has checked nothing is not ready.
        let _ = service.health.component(POSTGRESQL);
        stop_on_signals(&service.shutdown).map_err(|error| Failure::Running(format!("signals: {error}")))?;
        let listening = service.shutdown.child_token();
        tokio::spawn(telemetry::keep_up(metrics.clone(), telemetry::UPKEEP_EVERY));
        if let Some(address) = common.admin_listen {
            let run_dir = common.run_dir.as_deref();
            telemetry::serve_admin(worker.name, address, run_dir, metrics, service.health.clone(), listening).await?;
        }
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
        run_until_drained(service, ready, work).await
    });
    // Blocking tasks of an abandoned drain must not hold the process up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn run_until_drained<R, W, F, E>(service: Service, ready: R, work: W) -> Result<(), Failure>
where
    R: Ready,
    W: FnOnce(Service, R) -> F,
    F: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let (shutdown, drain) = (service.shutdown.clone(), service.drain_timeout);
    if !await_database(&service, ready.keys()).await? {
        return Ok(());
    }
    let work = work(service.clone(), ready);
    tokio::pin!(work);
    // Begun before PostgreSQL counts as up: by then the worker has named what else must be up for it to be ready.
    let outcome = match futures_util::poll!(work.as_mut()) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => {
            watch_database(&service);
            drop(service);
            finish(work, &shutdown, drain).await?
        }
    };
    outcome.map_err(|error| Failure::Running(error.to_string()))?;
    tracing::info!("stopped");
    Ok(())
}

/// Waits for the end of the work; once the process is told to stop, no longer than `drain`.
async fn finish<F>(mut work: Pin<&mut F>, shutdown: &CancellationToken, drain: Duration) -> Result<F::Output, Failure>
where
    F: Future,
{
    tokio::select! {
        outcome = work.as_mut() => Ok(outcome),
        () = shutdown.cancelled() => {
            tracing::info!("stopping: finishing the current work");
            let drained = tokio::time::timeout(drain, work).await;
            drained.map_err(|_| Failure::Running(format!("work was unfinished after {drain:?}; it will be done again")))
        }
    }
}

fn stop_on_signals(shutdown: &CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        shutdown.cancel();
    });
    Ok(())
}

/// Waits until PostgreSQL answers and has our schema; says once that it waits. `false`: told to stop meanwhile.
async fn await_database(service: &Service, keys: Option<&Keys>) -> Result<bool, Failure> {
    let mut reconnect = Reconnect::default();
    let check = async || {
        migrate::check_version(&service.db).await?;
        match keys {
            Some(keys) => installation::check_master_key(&service.db, keys).await,
            None => Ok(()),
        }
    };
    loop {
        match check().await {
            Ok(()) => return Ok(true),
            Err(error @ DbError::OtherMasterKey) => {
                return Err(ConfigError::new("LETHE_MASTER_KEY_FILE", error).into());
            }
            Err(error) if error.is_misconfiguration() => return Err(ConfigError::new("DATABASE_URL", error).into()),
            // A schema that is too new never becomes older by waiting; one that is too old is being migrated.
            Err(error @ DbError::SchemaTooNew { .. }) => return Err(Failure::Running(error.to_string())),
            Err(error) => {
                if reconnect.is_first() {
                    tracing::warn!(%error, "waiting for PostgreSQL");
                }
            }
        }
        tokio::select! {
            () = reconnect.wait() => {}
            () = service.shutdown.cancelled() => return Ok(false),
        }
    }
}

/// Keeps the readiness of PostgreSQL up to date, and says once when it goes away and when it is back. Stops the process once
/// the schema has become one that this code cannot go on with.
fn watch_database(service: &Service) {
    let component = service.health.component(POSTGRESQL);
    component.set(true);
    let (db, shutdown) = (service.db.clone(), service.shutdown.clone());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(5)) => {}
                () = shutdown.cancelled() => return,
            }
            let answer = match db.ping().await {
                Ok(()) => migrate::check_version(&db).await,
                away => away,
            };
            let up = answer.is_ok();
            let has_changed = component.set(up);
            match answer {
                Err(error @ DbError::SchemaTooNew { .. }) => {
                    tracing::error!(%error, "stopping");
                    return shutdown.cancel();
                }
                Ok(()) if has_changed => tracing::info!("PostgreSQL is back"),
                Err(error) if has_changed => tracing::warn!(%error, "PostgreSQL is unavailable; work waits"),
                _ => {}
            }
        }
    });
}
