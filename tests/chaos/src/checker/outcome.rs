//! Guarantee 2: every request has one outcome, and the subject data is exactly what the outcomes say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::mpsc;

use crate::fleet::WAITING_PERIOD;
use crate::people::CONTROLLERS;
use crate::plan::{LetterKind, Plan};
use crate::world::World;

use super::{Evidence, Violation};

/// What samples of the subject data showed while the run went on.
pub type Sampler = Arc<Mutex<Vec<(Instant, Violation)>>>;

/// Looks, whenever a controller is told that an erasure is completed, whether what it had then is gone.
pub fn sample(plan: Arc<Plan>, world: Arc<World>, mut completed: mpsc::UnboundedReceiver<String>) -> Sampler {
    let sampler = Sampler::default();
    let found = sampler.clone();
    tokio::spawn(async move {
        while let Some(id) = completed.recv().await {
            let told_at = Instant::now();
            let Some(case) = plan.cases.iter().find(|case| case.id == id && case.kind.erases()) else { continue };
            let mpids: Vec<i64> = case.matches.iter().map(|person| plan.people[*person].mpid).collect();
            let sql = "SELECT (SELECT count(*) FROM subject_data.profiles WHERE controller_id = $1 AND mpid = ANY ($2))
                            + (SELECT count(*) FROM subject_data.event_batches
                                WHERE controller_id = $1 AND mpid = ANY ($2) AND body->>'late' IS NULL)";
            let rows = world.patiently(sql, &[&CONTROLLERS[case.controller], &mpids]).await;
            let left: i64 = rows[0].get(0);
            if left > 0 {
                let what = format!("{id} was said to be completed while {left} rows were left");
                found.lock().unwrap().push((told_at, Violation::of(2, what)));
            }
        }
    });
    sampler
}

pub(super) async fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = statuses(evidence);
    violations.extend(cancellations(evidence));
    violations.extend(unverified(evidence));
    violations.extend(subject_data(evidence).await);
    violations
}

/// An erasure of somebody is completed by what was verified in each store.
fn unverified(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        let erased = case.kind.erases() && !case.matches.is_empty() && evidence.is_status(number, "completed");
        let told = evidence.trail.of(CONTROLLERS[case.controller], &case.id);
        if erased && told.is_none_or(|told| told.erasures.is_empty()) {
            let what = format!("{} is completed, and no erasure of it was verified", evidence.name(number));
            violations.push(Violation::of(2, what));
        }
    }
    violations
}

fn statuses(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, row) in &evidence.rows {
        let name = evidence.name(*number);
        let mut wrong = |what: String| violations.push(Violation::of(2, format!("{name} {what}")));
        match row.status.as_str() {
            "completed" => match (row.runs_at, row.in_progress_at) {
                (Some(runs_at), Some(begun)) if begun < runs_at => wrong(format!("began at {begun}, before {runs_at}")),
                (Some(_), Some(_)) => {}
                _ => wrong("is completed and never began".to_owned()),
            },
            "cancelled" if row.in_progress_at.is_some() => wrong("is cancelled and had begun".to_owned()),
            "cancelled" if !evidence.plan.cases[*number].is_cancelled => wrong("was cancelled by nobody".to_owned()),
            "cancelled" => {}
            other => wrong(format!("ended as {other}")),
        }
    }
    violations
}

/// The answers to cancellations fit the outcomes, and those that came in time have won.
fn cancellations(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, row) in evidence.rows.iter().filter(|(number, _)| !evidence.is_doubtful(**number)) {
        let name = evidence.name(*number);
        let mut times = BTreeSet::new();
        for (status, body) in evidence.answers(*number, LetterKind::Cancellation) {
            let received: Option<Timestamp> = body["received_time"].as_str().and_then(|text| text.parse().ok());
            match status {
                // One that was remembered may be forgotten before its request comes; the next one then counts.
                202 if row.status == "cancelled" && body["api_version"].is_null() => {}
                202 if row.status == "cancelled" => drop(times.insert(body["received_time"].to_string())),
                202 => {
                    // Remembered for a request that took longer to come than a waiting period.
                    let late = received
                        .is_some_and(|at| row.received_at >= at + SignedDuration::try_from(WAITING_PERIOD).unwrap());
                    if !(body["api_version"].is_null() && late) {
                        violations.push(Violation::of(
                            2,
                            format!("{name}: its cancellation was answered 202 with {body}, it is {row:?}"),
                        ));
                    }
                }
                409 if row.status == "cancelled" => {
                    violations.push(Violation::of(
                        2,
                        format!("{name}: its cancellation was answered 409 with {body}, it is cancelled"),
                    ));
                }
                409 => {}
                other => violations.push(Violation::of(3, format!("{name}: its cancellation was answered {other}"))),
            }
        }
        if times.len() > 1 {
            violations
                .push(Violation::of(3, format!("{name}: its cancellations were answered with {} times", times.len())));
        }
        violations.extend(too_late(evidence, *number));
    }
    violations
}

/// A cancellation that was confirmed before the batch of its request was due must win, however late either is handled.
fn too_late(evidence: &Evidence, number: usize) -> Option<Violation> {
    let row = &evidence.rows[&number];
    if row.status == "cancelled" {
        return None;
    }
    let known = evidence
        .letters(number, LetterKind::Request)
        .flat_map(|(_, fate)| &fate.answers)
        .filter(|(_, answer)| answer.status == 201)
        .map(|(at, _)| *at)
        .min()?;
    let in_time = evidence.letters(number, LetterKind::Cancellation).find(|(_, fate)| {
        let before = fate.confirmed_by_clock.zip(row.runs_at).is_some_and(|(at, runs_at)| at < runs_at);
        before && fate.counts(&evidence.purges) && fate.first_sent.is_some_and(|sent| sent > known)
    })?;
    let at = in_time.1.confirmed_by_clock;
    Some(Violation::of(
        2,
        format!(
            "{}: cancelled in time at {at:?}, released at {:?} all the same",
            evidence.name(number),
            row.in_progress_at
        ),
    ))
}

type Held = BTreeMap<(String, i64), (i64, i64, i64)>;

async fn held(world: &World) -> Held {
    let mut held = Held::new();
    for (index, table) in ["profiles", "profile_identities", "event_batches"].into_iter().enumerate() {
        let filter = if index == 2 { "WHERE body->>'late' IS NULL" } else { "" };
        let sql = format!("SELECT controller_id, mpid, count(*) FROM subject_data.{table} {filter} GROUP BY 1, 2");
        for row in world.patiently(&sql, &[]).await {
            let rows = held.entry((row.get(0), row.get(1))).or_default();
            *[&mut rows.0, &mut rows.1, &mut rows.2][index] = row.get(2);
        }
    }
    held
}

/// The starts of the executions that cover each person, by index.
fn starts(evidence: &Evidence) -> BTreeMap<usize, Vec<Timestamp>> {
    let mut starts: BTreeMap<usize, Vec<Timestamp>> = BTreeMap::new();
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        if case.kind.erases() && evidence.is_status(number, "completed") {
            let told = evidence.trail.of(CONTROLLERS[case.controller], &case.id);
            let as_of = told.and_then(|told| told.erasures.iter().map(|(as_of, _)| *as_of).max());
            for person in &case.matches {
                // Without a receipt: the beginning of time, so that whatever is left is seen.
                starts.entry(*person).or_default().push(as_of.unwrap_or(Timestamp::MIN));
            }
        }
    }
    starts
}

async fn subject_data(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    let (held, starts) = (held(&evidence.world).await, starts(evidence));
    let circles = circles(&evidence.plan);
    let mut gone: BTreeMap<usize, i64> = BTreeMap::new();
    for (number, person) in evidence.plan.people.iter().enumerate() {
        let key = (CONTROLLERS[person.controller].to_owned(), person.mpid);
        let rows = held.get(&key).copied().unwrap_or_default();
        let erased = starts.contains_key(&number);
        let wanted = if erased { (0, 0, 0) } else { person.rows() };
        if rows != wanted {
            let what = if erased { "whose erasure is completed" } else { "whom nobody erased" };
            violations
                .push(Violation::of(2, format!("{} {}, {what}, has {rows:?} rows, not {wanted:?}", key.0, key.1)));
        }
        if erased {
            *gone.entry(circles[number]).or_default() += 2 + i64::from(person.batches) + 2;
        }
    }
    let (late_gone, found) = late_batches(evidence, &starts).await;
    violations.extend(found);
    let (twins_gone, found) = late_twins(evidence, &held);
    violations.extend(found);
    for (person, rows) in late_gone.into_iter().chain(twins_gone) {
        *gone.entry(circles[person]).or_default() += rows;
    }
    violations.extend(receipts(evidence, &circles, &gone));
    violations
}

/// People whom the same requests match, directly or by others: each by the first of them. Who of them was erased by which
/// request is not said, but together the receipts must fit.
fn circles(plan: &Plan) -> Vec<usize> {
    let mut circles: Vec<usize> = (0..plan.people.len()).collect();
    for case in plan.cases.iter().filter(|case| case.kind.erases()) {
        let joined: BTreeSet<usize> = case.matches.iter().map(|person| circles[*person]).collect();
        let Some(first) = joined.first() else { continue };
        circles.iter_mut().filter(|circle| joined.contains(circle)).for_each(|circle| *circle = *first);
    }
    circles
}

/// The receipts count what is gone, people by people.
fn receipts(evidence: &Evidence, circles: &[usize], gone: &BTreeMap<usize, i64>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut counted: BTreeMap<usize, i64> = BTreeMap::new();
    for case in evidence.plan.cases.iter().filter(|case| case.kind.erases()) {
        let told = evidence.trail.of(CONTROLLERS[case.controller], &case.id);
        let rows: i64 = told.into_iter().flat_map(|told| &told.erasures).map(|(_, rows)| rows).sum();
        match case.matches.first() {
            Some(person) => *counted.entry(circles[*person]).or_default() += rows,
            None if rows > 0 => {
                violations.push(Violation::of(2, format!("{} matches nobody, and has erased {rows} rows", case.id)));
            }
            None => {}
        }
    }
    let all: BTreeSet<usize> = gone.keys().chain(counted.keys()).copied().collect();
    for circle in all {
        let [gone, counted] = [gone, &counted].map(|rows| rows.get(&circle).copied().unwrap_or_default());
        if counted < gone || counted > gone + evidence.doubtful_rows {
            let who = person(evidence, circle);
            violations.push(Violation::of(2, format!("the receipts of {who} count {counted} rows, {gone} are gone")));
        }
    }
    violations
}

/// What was there before the start is gone, what came later is there.
async fn late_batches(
    evidence: &Evidence,
    starts: &BTreeMap<usize, Vec<Timestamp>>,
) -> (Vec<(usize, i64)>, Vec<Violation>) {
    let sql = "SELECT id FROM subject_data.event_batches WHERE body->>'late' IS NOT NULL";
    let there: BTreeSet<i64> = evidence.world.patiently(sql, &[]).await.iter().map(|row| row.get(0)).collect();
    let (mut gone, mut violations) = (Vec::new(), Vec::new());
    for batch in &evidence.late_batches {
        // A second erasure finds nobody once the first has taken the identities: the first one covers, all may erase.
        let earliest = starts.get(&batch.person).and_then(|starts| starts.iter().min());
        let latest = starts.get(&batch.person).and_then(|starts| starts.iter().max());
        let is_there = there.contains(&batch.id);
        gone.push((batch.person, i64::from(!is_there)));
        let covered = earliest.is_some_and(|earliest| batch.there_at < *earliest);
        let kept = latest.is_none_or(|latest| batch.received_at > *latest);
        if covered && is_there {
            violations.push(Violation::of(
                2,
                format!(
                    "event batch of {} was there before the erasure began at {earliest:?} and is left: {batch:?}",
                    person(evidence, batch.person)
                ),
            ));
        }
        if kept && !is_there {
            violations.push(Violation::of(
                2,
                format!(
                    "event batch of {} was not covered by the erasure at {latest:?} and is gone: {batch:?}",
                    person(evidence, batch.person)
                ),
            ));
        }
    }
    (gone, violations)
}

/// A person and the cases that match them.
fn person(evidence: &Evidence, number: usize) -> String {
    let cases = evidence.plan.cases.iter().enumerate().filter(|(_, case)| case.matches.contains(&number));
    let cases: Vec<String> =
        cases.map(|(case, _)| format!("{} {:?}", evidence.name(case), evidence.rows.get(&case))).collect();
    format!("{} ({})", evidence.plan.people[number].mpid, cases.join(", "))
}

/// A profile that came before the release of a request that matches it is erased with it, one that came after it is not.
fn late_twins(evidence: &Evidence, held: &Held) -> (Vec<(usize, i64)>, Vec<Violation>) {
    let (mut gone, mut violations) = (Vec::new(), Vec::new());
    for twin in &evidence.late_twins {
        let case = &evidence.plan.cases[twin.case];
        let is_there = held.get(&(CONTROLLERS[case.controller].to_owned(), twin.mpid)).is_some_and(|rows| rows.0 > 0);
        let person = case.matches[0];
        gone.push((person, if is_there { 0 } else { 2 }));
        let due = evidence.rows.get(&twin.case).and_then(|row| row.runs_at);
        let covered = due.is_some_and(|due| twin.there_at < due);
        if covered && evidence.is_status(twin.case, "completed") && is_there {
            violations.push(Violation::of(
                2,
                format!("{}: a profile that came before its release is left", evidence.name(twin.case)),
            ));
        }
        let others = evidence.plan.cases.iter().enumerate().filter(|(_, case)| case.matches.contains(&person));
        let mut released = others.filter_map(|(number, _)| evidence.rows.get(&number)?.in_progress_at);
        if !is_there && released.all(|released| released < twin.not_before) {
            let what = format!("{}: a profile that came after its release is gone", evidence.name(twin.case));
            violations.push(Violation::of(2, what));
        }
    }
    (gone, violations)
}
