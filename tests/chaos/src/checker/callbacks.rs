//! Guarantee 4: callbacks arrive in order, at least once, with a valid signature, and say what is so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use crate::people::CONTROLLERS;
use crate::plan::LetterKind;
use crate::receiver::Arrival;

use super::{Evidence, Violation};

/// Figures of the deliveries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deliveries {
    /// Attempts that arrived.
    pub attempts: usize,
    /// Callbacks that were accepted.
    pub accepted: usize,
    /// Attempts on a callback that had been accepted already.
    pub repeats: usize,
    /// Of these, the ones that came after a successor: a courier that stood still for longer than its lease.
    pub late_repeats: usize,
}

pub(super) fn check(evidence: &Evidence) -> (Vec<Violation>, Deliveries) {
    let (mut violations, mut deliveries) = (Vec::new(), Deliveries::default());
    let mut by_url: BTreeMap<&str, Vec<&Arrival>> = BTreeMap::new();
    for arrival in &evidence.arrivals {
        by_url.entry(&arrival.url).or_default().push(arrival);
    }
    deliveries.attempts = evidence.arrivals.len();
    let mut known = BTreeSet::new();
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        let is_doubtful = evidence.is_doubtful(number);
        for url in case.urls.iter().filter(|_| is_doubtful || evidence.rows.contains_key(&number)) {
            known.insert(url.as_str());
            let arrivals = by_url.get(url.as_str()).map_or(&[][..], Vec::as_slice);
            // Whether it is signed, and about what, does not depend on what was lost.
            let wrong = arrivals.iter().filter_map(|arrival| identity(evidence, number, url, arrival));
            violations.extend(wrong.map(|what| Violation::of(4, format!("{}: {what}", evidence.name(number)))));
            if is_doubtful {
                continue;
            }
            violations.extend(of_url(evidence, number, arrivals, &mut deliveries));
        }
    }
    for url in by_url.keys().filter(|url| !known.contains(*url)) {
        violations.push(Violation::of(4, format!("a callback came to {url}, for which there is no request")));
    }
    (violations, deliveries)
}

/// What is known of one callback.
struct Seen {
    first_at: Instant,
    accepted_at: Option<Instant>,
    ids: BTreeSet<String>,
}

fn of_url(evidence: &Evidence, number: usize, arrivals: &[&Arrival], deliveries: &mut Deliveries) -> Vec<Violation> {
    let name = evidence.name(number);
    let status = evidence.rows[&number].status.as_str();
    let wanted: &[&str] =
        if status == "cancelled" { &["pending", "cancelled"] } else { &["pending", "in_progress", "completed"] };
    let mut violations = Vec::new();
    let mut seen: BTreeMap<&str, Seen> = BTreeMap::new();
    for arrival in arrivals {
        violations.extend(content(evidence, number, arrival).map(|what| Violation::of(4, format!("{name}: {what}"))));
        let status = arrival.text("request_status");
        let one = seen.entry(status).or_insert_with(|| Seen {
            first_at: arrival.at,
            accepted_at: None,
            ids: BTreeSet::new(),
        });
        one.ids.insert(arrival.callback_id.clone());
        if one.accepted_at.is_some_and(|accepted| accepted < arrival.at) {
            deliveries.repeats += 1;
            let place = wanted.iter().position(|one| *one == status);
            let successor = place.and_then(|place| wanted.get(place + 1)).and_then(|next| seen.get(next));
            deliveries.late_repeats += usize::from(successor.is_some_and(|next| next.first_at < arrival.at));
        }
        if let (Some(one), Some(at)) = (seen.get_mut(status), arrival.accepted_at) {
            one.accepted_at = Some(one.accepted_at.map_or(at, |before| before.min(at)));
        }
    }
    for status in seen.keys().filter(|status| !wanted.contains(*status)) {
        violations.push(Violation::of(4, format!("{name}: a callback says {status}")));
    }
    let mut before: Option<(&str, Instant)> = None;
    for status in wanted {
        let Some(one) = seen.get(status) else {
            violations.push(Violation::of(4, format!("{name}: the callback {status} never came")));
            break;
        };
        if one.ids.len() != 1 {
            violations.push(Violation::of(4, format!("{name}: the callback {status} has {} ids", one.ids.len())));
        }
        if let Some((previous, accepted)) = before.filter(|(_, accepted)| one.first_at < *accepted) {
            let early = accepted - one.first_at;
            violations
                .push(Violation::of(4, format!("{name}: {status} came {early:?} before {previous} was accepted")));
        }
        let Some(accepted) = one.accepted_at else {
            violations.push(Violation::of(4, format!("{name}: the callback {status} was never accepted")));
            break;
        };
        deliveries.accepted += 1;
        before = Some((status, accepted));
    }
    violations
}

fn identity(evidence: &Evidence, number: usize, url: &str, arrival: &Arrival) -> Option<&'static str> {
    let case = &evidence.plan.cases[number];
    if !arrival.is_signed {
        return Some("a callback has no valid signature");
    }
    let same = arrival.text("controller_id") == CONTROLLERS[case.controller]
        && arrival.text("subject_request_id") == case.id
        && arrival.text("status_callback_url") == url
        && arrival.text("api_version") == case.version;
    (!same).then_some("a callback is about something else")
}

fn content(evidence: &Evidence, number: usize, arrival: &Arrival) -> Option<String> {
    let case = &evidence.plan.cases[number];
    let completed = arrival.text("request_status") == "completed";
    let has_result = !arrival.body["results_url"].is_null();
    if has_result != (completed && !case.kind.erases()) {
        return Some(format!(
            "a callback {} has results_url {}",
            arrival.text("request_status"),
            arrival.body["results_url"]
        ));
    }
    let lines: usize = case.matches.iter().map(|person| 1 + evidence.plan.people[*person].batches as usize).sum();
    if has_result && arrival.body["results_count"] != lines {
        return Some(format!("results_count is {}, not {lines}", arrival.body["results_count"]));
    }
    let answers = [LetterKind::Request, LetterKind::Conflict].map(|kind| evidence.answers(number, kind)).concat();
    let scheduled =
        answers.iter().find(|(status, _)| *status == 201).map(|(_, body)| &body["expected_completion_time"]);
    let differs = scheduled.is_some_and(|scheduled| *scheduled != arrival.body["expected_completion_time"]);
    differs.then(|| "a callback has another expected_completion_time than the answer".to_owned())
}
