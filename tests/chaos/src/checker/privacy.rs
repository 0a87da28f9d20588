//! Guarantee 6: no personal data where none belongs.

use crate::people::CANARY;

use super::{Evidence, Violation};

/// What operators see of failures.
const TEXTS: [&str; 4] = [
    "SELECT last_error FROM lethe.slices WHERE last_error IS NOT NULL",
    "SELECT failure FROM lethe.erasure_receipts WHERE failure IS NOT NULL",
    "SELECT DISTINCT error_class FROM lethe.callback_attempts WHERE error_class IS NOT NULL",
    "SELECT DISTINCT host FROM lethe.endpoints",
];

pub(super) async fn check(evidence: &Evidence, metrics: &[String]) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut look = |place: &str, text: &str| {
        let devices = evidence.plan.people.iter().step_by(10).map(|person| person.device.as_str());
        if let Some(found) = devices.chain([CANARY]).find(|value| text.contains(*value)) {
            let line = text.lines().find(|line| line.contains(found)).unwrap_or_default();
            violations.push(Violation::of(6, format!("{place} holds personal data: {line}")));
        }
    };
    for file in lethe_testing::results::files_below(&evidence.world.tests.folder.join("log")) {
        look(&file.display().to_string(), &String::from_utf8_lossy(&std::fs::read(&file).unwrap_or_default()));
    }
    for text in metrics {
        look("a page of metrics", text);
    }
    for sql in TEXTS {
        for row in evidence.world.patiently(sql, &[]).await {
            look(sql, row.get(0));
        }
    }
    for queue in ["dsr.erasure-execution", "dsr.access-compilation", "dsr.callback-delivery"] {
        for name in [queue.to_owned(), format!("{queue}.dead")] {
            for message in evidence.world.wake_ups(&name).await {
                look(&name, &message.to_string());
            }
        }
    }
    violations
}
