//! Guarantee 2 for access and portability: every file is whole, and no file is left that nobody knows.

use std::collections::BTreeSet;

use crate::plan::Kind;

use super::{Evidence, Violation};

pub(super) async fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, case) in evidence.plan.cases.iter().enumerate() {
        if case.kind.erases() || !evidence.is_status(number, "completed") {
            continue;
        }
        let (world, id, zipped) = (evidence.world.clone(), case.id.clone(), case.kind == Kind::Portability);
        // In a task of its own: a file that cannot be opened is a finding, not the end.
        let lines = tokio::spawn(async move {
            let plain = lethe_testing::results::open(&world.tests, &id).await;
            if zipped {
                lethe_testing::results::unzip(plain).into_iter().flat_map(|(_, content)| content).collect()
            } else {
                plain
            }
        });
        let Ok(bytes) = lines.await else {
            violations.push(Violation::of(2, format!("{}: its file cannot be opened", evidence.name(number))));
            continue;
        };
        if let Some(wrong) = compare(evidence, number, &bytes) {
            violations.push(Violation::of(2, format!("{}: {wrong}", evidence.name(number))));
        }
    }
    violations.extend(orphans(evidence).await);
    violations
}

fn compare(evidence: &Evidence, number: usize, bytes: &[u8]) -> Option<String> {
    let case = &evidence.plan.cases[number];
    let people: Vec<_> = case.matches.iter().map(|person| &evidence.plan.people[*person]).collect();
    let Ok(text) = std::str::from_utf8(bytes) else { return Some("its file is not text".to_owned()) };
    let mut found: Vec<&str> = text.lines().collect();
    if found.len() < people.len() {
        return Some(format!("its file has {} lines", found.len()));
    }
    let profiles: BTreeSet<i64> = found
        .drain(..people.len())
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|profile| profile.get("audiences").is_none())
        .filter_map(|profile| profile["mpid"].as_i64())
        .collect();
    if profiles != people.iter().map(|person| person.mpid).collect() {
        return Some("its file has other profiles".to_owned());
    }
    let mut wanted: Vec<String> = people.iter().flat_map(|person| person.event_batches()).collect();
    wanted.sort_unstable();
    found.sort_unstable();
    (found != wanted)
        .then(|| format!("its file has {} event batches, not the {} stored ones", found.len(), wanted.len()))
}

/// A file that no result names is never deleted, and is personal data; but nobody has the key to one that was written when
/// the result was lost.
async fn orphans(evidence: &Evidence) -> Vec<Violation> {
    let sql = "SELECT object_path FROM lethe.results WHERE object_path IS NOT NULL";
    let known: BTreeSet<String> = evidence.world.patiently(sql, &[]).await.iter().map(|row| row.get(0)).collect();
    let folder = evidence.world.tests.folder.join("results");
    let files = lethe_testing::results::files_below(&folder);
    let names = files.iter().filter_map(|file| file.strip_prefix(&folder).ok()?.to_str());
    names
        .filter(|name| !known.contains(*name) && !evidence.was_written_during_loss(&folder.join(name)))
        .map(|name| Violation::of(2, format!("the file {name} is left in the result store, and no result names it")))
        .collect()
}
