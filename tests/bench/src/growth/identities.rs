//! Intake and erasure per request at 10^5, 10^6 and 10^7 identities: three a profile, one event batch of 500 bytes each.

use super::{powers_of_ten, rate};
use crate::bench::Bench;
use crate::people::IDENTITIES;
use crate::report::Report;
use crate::requests;
use crate::rows::erasure::{self, Field};
use crate::rows::intake;

/// Profiles that one run erases, the same at every point.
const ERASED: u64 = 5_000;
const URL: &str = "http://127.0.0.1:9/callbacks";

pub(crate) async fn curve(bench: &Bench, report: &mut Report) {
    for identities in powers_of_ten(100_000, bench.sizes.most_identities) {
        let shares = identities / IDENTITIES.len() as u64 / ERASED;
        let field = Field::new(bench, &format!("grown-{identities}"), shares, ERASED, 1, 500).await;
        let controllers = [field.controller.to_string()];
        let (mut taken, mut raw_taken, mut erased, mut raw_erased) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // Spread over all profiles that are there, and as many requests at every point.
        let made = || requests::erasures(bench.sizes.intake_requests.min(30_000), shares * ERASED, &[URL.to_owned()]);
        for _ in 0..bench.sizes.runs {
            taken.push(intake::lethe(bench, &controllers, &made(), false, 1).await);
            raw_taken.push(intake::raw(bench, &controllers, &made(), false).await);
        }
        // Shares are few at the smallest point: so are the runs.
        for run in 0..bench.sizes.runs.min(shares / 2) {
            erased.push(erasure::lethe(bench, &field, 2 * run, 1).await.0);
            raw_erased.push(erasure::raw(bench, &field, 2 * run + 1).await);
        }
        let rows_of_a_request = field.rows() / ERASED as f64;
        let microseconds = |rate: f64| 1e6 / rate;
        report.point(
            "identities",
            &[
                ("identities", identities as f64),
                ("intake_us", microseconds(rate(&taken))),
                ("raw_intake_us", microseconds(rate(&raw_taken))),
                ("intake_ratio", rate(&taken) / rate(&raw_taken)),
                ("erasure_us", microseconds(rate(&erased)) * rows_of_a_request),
                ("raw_erasure_us", microseconds(rate(&raw_erased)) * rows_of_a_request),
                ("erasure_ratio", rate(&erased) / rate(&raw_erased)),
            ],
        );
        field.remove(bench).await;
    }
}
