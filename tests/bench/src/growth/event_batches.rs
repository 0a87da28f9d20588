//! Erasure with 1, 10, 100, 1,000 event batches a profile: about as many rows at every point.

use super::{powers_of_ten, rate};
use crate::bench::Bench;
use crate::people::IDENTITIES;
use crate::report::Report;
use crate::rows::erasure::{self, Field};

pub(crate) async fn curve(bench: &Bench, report: &mut Report) {
    for batches in powers_of_ten(1, bench.sizes.most_event_batches) {
        let profiles = (bench.sizes.erased_rows / 5 / (1 + IDENTITIES.len() as u64 + batches)).max(1);
        let id = format!("batches-{batches}");
        let field = Field::new(bench, &id, 2 * bench.sizes.runs, profiles, batches, 500).await;
        let (mut lethe, mut raw) = (Vec::new(), Vec::new());
        for run in 0..bench.sizes.runs {
            lethe.push(erasure::lethe(bench, &field, 2 * run, 1).await.0);
            raw.push(erasure::raw(bench, &field, 2 * run + 1).await);
        }
        let microseconds = |rate: f64| 1e6 / rate * field.rows() / profiles as f64;
        report.point(
            "event-batches",
            &[
                ("event_batches", batches as f64),
                ("rows_a_second", rate(&lethe)),
                ("raw_rows_a_second", rate(&raw)),
                ("request_us", microseconds(rate(&lethe))),
                ("raw_request_us", microseconds(rate(&raw))),
                ("ratio", rate(&lethe) / rate(&raw)),
            ],
        );
        field.remove(bench).await;
    }
}
