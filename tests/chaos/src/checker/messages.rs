//! Guarantee 3: duplicate, late, reordered and malformed messages change nothing that they should not.

use std::collections::BTreeSet;

use lethe_broker::topology::{IDENTITY_MATCHING, QUEUES};

use crate::driver::NO_WAKE_UP;
use crate::plan::{HTTP_SENDER, LetterKind};

use super::{Evidence, Violation};

pub(super) async fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    if evidence.strangers > 0 {
        violations.push(Violation::of(3, format!("{} requests are there that nobody sent", evidence.strangers)));
    }
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        violations.extend(answers(evidence, number));
        if case.is_poison && evidence.rows.contains_key(&number) {
            violations
                .push(Violation::of(3, format!("{} is there, which the database refuses", evidence.name(number))));
        }
    }
    violations.extend(kept_copies(evidence).await);
    violations.extend(dead_wake_ups(evidence).await);
    violations
}

/// One content of an id is accepted, each time with the times of the first; another one is refused.
fn answers(evidence: &Evidence, number: usize) -> Vec<Violation> {
    let name = evidence.name(number);
    let mut violations: Vec<Violation> = malformed(evidence, number).collect();
    for kind in [LetterKind::Request, LetterKind::Conflict] {
        for (status, _) in evidence.answers(number, kind) {
            if !matches!(status, 201 | 409) {
                violations.push(Violation::of(3, format!("{name}: a request was answered {status}")));
            }
        }
    }
    if evidence.is_doubtful(number) {
        return violations;
    }
    let [first, second] = [LetterKind::Request, LetterKind::Conflict].map(|kind| evidence.answers(number, kind));
    let contents_accepted =
        [&first, &second].iter().filter(|answers| answers.iter().any(|(status, _)| *status == 201)).count();
    if contents_accepted > 1 {
        violations.push(Violation::of(3, format!("{name}: two contents were accepted")));
    }
    for answers in [&first, &second] {
        let statuses: BTreeSet<u16> = answers.iter().map(|(status, _)| *status).collect();
        if statuses.len() > 1 {
            violations.push(Violation::of(3, format!("{name}: the same request was answered {statuses:?}")));
        }
        let accepted = answers.iter().filter(|(status, _)| *status == 201);
        let times: BTreeSet<String> = accepted
            .map(|(_, body)| format!("{} {}", body["received_time"], body["expected_completion_time"]))
            .collect();
        if times.len() > 1 {
            violations
                .push(Violation::of(3, format!("{name}: its repetitions were answered with other times: {times:?}")));
        }
    }
    violations
}

fn malformed(evidence: &Evidence, number: usize) -> impl Iterator<Item = Violation> {
    let answers = evidence.answers(number, LetterKind::Malformed).into_iter();
    answers.filter(|(status, _)| *status != 400).map(move |(status, _)| {
        Violation::of(3, format!("{}: a malformed message was answered {status}", evidence.name(number)))
    })
}

/// Whatever happened to the servers, no cancellation, query or wake-up is to blame for it.
async fn dead_wake_ups(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for queue in QUEUES.iter().filter(|queue| **queue != IDENTITY_MATCHING) {
        let dead = evidence.world.dead_letters_of(queue).await;
        let count = dead.iter().filter(|body| *body != NO_WAKE_UP).count();
        if count > 0 {
            let what = format!("{count} messages of {} were dead-lettered, and nothing is wrong with them", queue.name);
            violations.push(Violation::of(5, what));
        }
    }
    violations
}

/// What was refused is kept: in `dsr.rejected` where it was answered, in the dead letters where the database refused it.
async fn kept_copies(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    let rejected: BTreeSet<usize> = evidence
        .world
        .messages("dsr.rejected")
        .await
        .iter()
        .filter_map(|message| message["properties"]["correlation_id"].as_str()?.parse().ok())
        .collect();
    let dead = evidence.world.dead_letters().await;
    for (index, (letter, fate)) in evidence.plan.letters.iter().zip(&evidence.fates).enumerate() {
        // Who calls the gateway has the answer in hand.
        let refused = letter.kind != LetterKind::Cancellation
            && letter.sender != HTTP_SENDER
            && fate.answers.iter().any(|(_, answer)| matches!(answer.status, 400 | 409));
        if refused && !rejected.contains(&index) {
            violations.push(Violation::of(
                3,
                format!("{}: no copy is kept of a message that was refused", evidence.name(letter.case)),
            ));
        }
        let is_poison = evidence.plan.cases[letter.case].is_poison;
        if is_poison
            && fate.counts(&evidence.purges)
            && !dead.iter().any(|body| body.contains(&evidence.plan.cases[letter.case].id))
        {
            violations.push(Violation::of(3, format!("{}: no dead letter is kept of it", evidence.name(letter.case))));
        }
    }
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        if !case.is_poison && dead.iter().any(|body| body.contains(&case.id)) {
            violations.push(Violation::of(
                5,
                format!("{}: was dead-lettered, and nothing is wrong with it", evidence.name(number)),
            ));
        }
    }
    violations
}
