//! Throughput with 1, 2, 4 workers of a kind, which find all of their work waiting. A batch is released by the one
//! scheduler that leads; it has no such curve.

use super::rate;
use crate::bench::Bench;
use crate::people::IDENTITIES;
use crate::receiver::Receivers;
use crate::report::Report;
use crate::requests;
use crate::rows::callbacks;
use crate::rows::erasure::{self, Field};
use crate::rows::intake::{self, PEOPLE};

const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn curve(bench: &Bench, report: &mut Report) {
    let sizes = bench.sizes;
    intake::people(bench, PEOPLE, sizes.profiles).await;
    let receivers = Receivers::start(sizes.endpoints).await;
    let profiles = sizes.erased_rows / (1 + IDENTITIES.len() as u64 + sizes.event_batches);
    let field = Field::new(bench, "shared-out", 3 * sizes.runs, profiles, sizes.event_batches, 500).await;
    let mut share = 0;
    for workers in [1_usize, 2, 4] {
        let (mut taken, mut erased, mut delivered) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..sizes.runs {
            let made = requests::erasures(sizes.intake_requests, sizes.profiles, &[URL.to_owned()]);
            taken.push(intake::from_queue(bench, PEOPLE, &made, workers).await.0);
            erased.push(erasure::lethe(bench, &field, share, workers).await.0);
            delivered.push(callbacks::lethe(bench, &receivers, sizes.callbacks, workers).await);
            share += 1;
        }
        report.point(
            "workers",
            &[
                ("workers", workers as f64),
                ("intake_a_second", rate(&taken)),
                ("erased_rows_a_second", rate(&erased)),
                ("callbacks_a_second", rate(&delivered)),
            ],
        );
    }
    field.remove(bench).await;
}
