//! Guarantee 1: what was confirmed or answered survives.

use crate::plan::LetterKind;

use super::{Evidence, Violation};

pub(super) fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        if case.is_poison || evidence.rows.contains_key(&number) {
            continue;
        }
        let kinds = [LetterKind::Request, LetterKind::Conflict];
        // What was answered before a copy was made, or after it took over, is durable whatever else was lost.
        let answered = kinds.iter().any(|kind| {
            evidence.letters(number, *kind).any(|(_, fate)| {
                fate.answers.iter().any(|(at, answer)| answer.status == 201 && !evidence.is_during_loss(*at))
            })
        });
        let confirmed = !evidence.is_doubtful(number)
            && kinds.iter().any(|kind| evidence.letters(number, *kind).any(|(_, fate)| fate.counts(&evidence.purges)));
        if answered || confirmed {
            let how = if answered { "answered 201" } else { "confirmed" };
            violations.push(Violation::of(1, format!("{} was {how} and is not there", evidence.name(number))));
        }
    }
    violations
}
