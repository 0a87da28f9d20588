//! The most memory that each worker has resident, against the length of its queue, the size of its batch, the size of its
//! result.

use super::mebibytes;
use crate::bench::Bench;
use crate::people::IDENTITIES;
use crate::receiver::Receivers;
use crate::report::Report;
use crate::requests;
use crate::rows::erasure::{self, Field};
use crate::rows::intake::{self, PEOPLE};
use crate::rows::{callbacks, compile, release};

const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn curve(bench: &Bench, report: &mut Report) {
    let sizes = bench.sizes;
    intake::people(bench, PEOPLE, sizes.profiles).await;
    let receivers = Receivers::start(sizes.endpoints).await;
    for divisor in [100, 10, 1] {
        let queued = sizes.intake_requests / divisor;
        let made = requests::erasures(queued, sizes.profiles, &[URL.to_owned()]);
        let (_, memory) = intake::from_queue(bench, PEOPLE, &made, 1).await;
        report.point("memory-matcher", &[("queued", queued as f64), ("mib", mebibytes(memory))]);
        let released = sizes.released_requests / divisor;
        let (_, memory) = release::lethe(bench, released).await;
        report.point("memory-scheduler", &[("requests", released as f64), ("mib", mebibytes(memory))]);
        let profiles = sizes.erased_rows / divisor / (1 + IDENTITIES.len() as u64 + sizes.event_batches);
        let id = format!("memory-{divisor}");
        let field = Field::new(bench, &id, 1, profiles, sizes.event_batches, 500).await;
        let (_, memory) = erasure::lethe(bench, &field, 0, 1).await;
        report.point("memory-executor", &[("requests", profiles as f64), ("mib", mebibytes(memory))]);
        field.remove(bench).await;
        let due = sizes.callbacks / divisor;
        let run = callbacks::lethe(bench, &receivers, due, 1).await;
        let memory = run.lethe.and_then(|usage| usage.memory);
        report.point("memory-courier", &[("callbacks", due as f64), ("mib", mebibytes(memory))]);
        let megabytes = (sizes.compiled_mb / divisor).max(1);
        let id = format!("compiled-{megabytes}");
        compile::prepare(bench, &id, megabytes).await;
        let (_, memory) = compile::lethe(bench, &id).await;
        report.point("memory-compiler", &[("megabytes", megabytes as f64), ("mib", mebibytes(memory))]);
    }
}
