//! What the demo shows: bars while it runs, a table at the end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lethe_db::overview;
use lethe_domain::request::CallbackState;

use crate::checks::Claim;
use crate::output::say;
use crate::people::People;
use crate::receiver::Receiver;
use crate::traffic::Case;
use crate::world::World;

const STATUSES: [&str; 4] = ["pending", "in_progress", "completed", "cancelled"];

/// Follows the requests until all have ended and all callbacks are delivered; `false` if the time is up first.
pub(crate) async fn watch(world: &World, cases: &[Case], timeout: Duration) -> anyhow::Result<bool> {
    let bars = MultiProgress::new();
    let style =
        ProgressStyle::with_template("{prefix:>12} {bar:40} {pos:>6}").unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = |name: &'static str, total: usize| {
        bars.add(ProgressBar::new(total as u64)).with_style(style.clone()).with_prefix(name)
    };
    let by_status: BTreeMap<&str, ProgressBar> = STATUSES.iter().map(|name| (*name, bar(name, cases.len()))).collect();
    let callbacks: usize = cases.iter().map(|case| if case.is_cancelled() { 2 } else { 3 }).sum();
    let delivered = bar("callbacks", callbacks);
    let started = Instant::now();
    let mut finished = false;
    while !finished && started.elapsed() < timeout {
        let overview = overview::load(&world.db.session().await?).await?;
        let count = |wanted: &str| {
            let of_status = overview.requests.iter().filter(|(_, status, _)| status.as_str() == wanted);
            of_status.map(|(_, _, count)| u64::try_from(*count).unwrap_or(0)).sum::<u64>()
        };
        for (status, bar) in &by_status {
            bar.set_position(count(status));
        }
        let sent = overview
            .callbacks
            .iter()
            .find(|(state, _)| *state == CallbackState::Delivered)
            .map_or(0, |(_, count)| *count);
        delivered.set_position(u64::try_from(sent).unwrap_or(0));
        let ended = count("completed") + count("cancelled");
        finished = ended == cases.len() as u64 && usize::try_from(sent) == Ok(callbacks);
        if !finished {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let _ = bars.clear();
    say(&format!("watched for {:.1} s", started.elapsed().as_secs_f64()))?;
    Ok(finished)
}

/// Prints claims and figures; whether all claims hold.
pub(crate) async fn sum_up(
    world: &World,
    people: &People,
    receiver: &Receiver,
    cases: &[Case],
    claims: &[Claim],
    took: Duration,
) -> anyhow::Result<bool> {
    let session = world.db.session().await?;
    let row = session
        .query_one(
            "SELECT (SELECT count(*) FROM lethe.batches), (SELECT count(*) FROM lethe.slices),
                    (SELECT coalesce(sum(rows_deleted), 0)::bigint FROM lethe.erasure_receipts),
                    (SELECT count(*) FROM lethe.results), (SELECT coalesce(sum(lines), 0)::bigint FROM lethe.results),
                    (SELECT count(*) FROM lethe.callback_attempts)",
            &[],
        )
        .await?;
    let count = |index: usize| row.get::<_, i64>(index).to_string();
    let figures = BTreeMap::from([
        ("profiles", people.0.len().to_string()),
        ("event batches", people.event_batches().to_string()),
        ("requests", cases.len().to_string()),
        ("batches", count(0)),
        ("slices", count(1)),
        ("rows erased", count(2)),
        ("result files", count(3)),
        ("lines in them", count(4)),
        ("callback attempts", count(5)),
        ("callbacks refused by the failing server", receiver.refused().to_string()),
        ("seconds in all", format!("{:.1}", took.as_secs_f64())),
    ]);
    let width = figures.keys().chain(claims.iter().map(|claim| &claim.what)).map(|name| name.len()).max().unwrap_or(0);
    for (name, value) in &figures {
        say(&format!("{name:width$}  {value}"))?;
    }
    for Claim { what, holds, evidence } in claims {
        say(&format!("{what:width$}  {}: {evidence}", if *holds { "holds" } else { "DOES NOT HOLD" }))?;
    }
    Ok(claims.iter().all(|claim| claim.holds))
}
