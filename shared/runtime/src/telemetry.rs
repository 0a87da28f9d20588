//! Logs, metrics, and the admin listener with `/livez`, `/readyz` and `/metrics`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::options::{CommonOptions, LogFormat};
use lethe_process::health::Health;
use lethe_process::settings::ConfigError;

const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0];
const SIZES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Sets up logs and metrics for this process.
///
/// # Errors
/// [`ConfigError`] for a filter that cannot be read.
pub(crate) fn init(options: &CommonOptions) -> Result<PrometheusHandle, ConfigError> {
    let filter = EnvFilter::try_new(&options.log).map_err(|error| ConfigError::new("LETHE_LOG", error))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let initialised = match options.log_format {
        LogFormat::Text => logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => logs.json().try_init(),
    };
    initialised.map_err(|error| ConfigError::new("LETHE_LOG", error))?;
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &SIZES));
    builder.and_then(PrometheusBuilder::install_recorder).map_err(|error| ConfigError::new("LETHE_ADMIN_LISTEN", error))
}

/// Every measurement of a histogram is kept until somebody asks for it, or until this is done.
pub(crate) const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Keeps what the metrics take in memory bounded, whether or not anybody reads them.
pub(crate) async fn keep_up(metrics: PrometheusHandle, every: Duration) {
    let mut clock = tokio::time::interval(every);
    loop {
        clock.tick().await;
        metrics.run_upkeep();
    }
}

/// Serves the admin address until `shutdown`; writes where it listens to `<run_dir>/<name>-<pid>.addr`.
///
/// # Errors
/// [`ConfigError`] where the address is taken.
pub(crate) async fn serve_admin(
    name: &str,
    address: SocketAddr,
    run_dir: Option<&Path>,
    metrics: PrometheusHandle,
    health: Health,
    shutdown: CancellationToken,
) -> Result<(), ConfigError> {
    let unusable =
        |error: std::io::Error| ConfigError::new("LETHE_ADMIN_LISTEN", format!("cannot listen on {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(unusable)?;
    let bound = listener.local_addr().map_err(unusable)?;
    tracing::info!(%bound, "admin address");
    write_address(run_dir, &format!("{name}-{}.addr", std::process::id()), bound)?;
    let ready = move || {
        let down = health.down();
        async move {
            if down.is_empty() {
                (StatusCode::OK, "ready\n".to_owned())
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, format!("down: {}\n", down.join(", ")))
            }
        }
    };
    let render = move || {
        let text = metrics.render();
        async move { ([("content-type", "text/plain; version=0.0.4")], text) }
    };
    let router = Router::new()
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(render));
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::error!(%error, "the admin listener has failed");
        }
    });
    Ok(())
}

/// Writes where the process listens to a file of the folder, where one is given.
///
/// # Errors
/// [`ConfigError`] where it cannot be written.
pub fn write_address(run_dir: Option<&Path>, file_name: &str, bound: SocketAddr) -> Result<(), ConfigError> {
    let Some(folder) = run_dir else { return Ok(()) };
    let file = folder.join(file_name);
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&file, bound.to_string()))
        .map_err(|error| ConfigError::new("LETHE_RUN_DIR", format!("cannot write {}: {error}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of this process in memory.
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[tokio::test]
    async fn measurements_that_nobody_asks_for_do_not_pile_up() {
        const ROUNDS: usize = 20;
        const MEASUREMENTS: usize = 200_000;
        const EVERY: Duration = Duration::from_millis(1);
        let recorder = PrometheusBuilder::new().set_buckets(&SECONDS).unwrap().build_recorder();
        let upkeep = tokio::spawn(keep_up(recorder.handle(), EVERY));
        let mut before = 0;
        for round in 0..ROUNDS {
            metrics::with_local_recorder(&recorder, || {
                let histogram = metrics::histogram!("lethe_test_seconds");
                (0..MEASUREMENTS).for_each(|_| histogram.record(0.1));
            });
            // Its turn has come: there is one thread for both.
            tokio::time::sleep(EVERY).await;
            if round == 0 {
                before = resident();
            }
        }
        upkeep.abort();
        let grown = resident().saturating_sub(before);
        // Kept, each takes twice its size; other tests of this process may take some of it.
        let piled_up = (ROUNDS - 1) * MEASUREMENTS * size_of::<f64>();
        assert!(grown < piled_up, "{grown} bytes more, where {piled_up} have been measured");
    }
}
