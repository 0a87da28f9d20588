//! The claims, checked from outside: in the subject data, in the files, and in what the controllers' servers got.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Cursor, Read};

use anyhow::Context as _;
use lethe_domain::request::{Mpid, RequestType};

use crate::people::People;
use crate::receiver::Received;
use crate::traffic::{Case, Sent, Twist};
use crate::world::World;

/// A claim and what was found.
pub(crate) struct Claim {
    pub(crate) what: &'static str,
    pub(crate) holds: bool,
    pub(crate) evidence: String,
}

fn claim(what: &'static str, wrong: usize, of: usize, things: &str) -> Claim {
    let evidence = if wrong == 0 { format!("{of} {things}") } else { format!("{wrong} of {of} {things} are wrong") };
    Claim { what, holds: wrong == 0 && of > 0, evidence }
}

/// What was seen from outside.
pub(crate) struct Seen<'a> {
    pub(crate) sent: &'a Sent,
    /// The results, by the id of their request.
    pub(crate) files: &'a BTreeMap<String, Vec<u8>>,
    pub(crate) callbacks: Vec<Received>,
    /// Whether all came to its end in time.
    pub(crate) finished: bool,
}

/// Checks every claim.
pub(crate) async fn all(world: &World, people: &People, cases: &[Case], seen: &Seen<'_>) -> anyhow::Result<Vec<Claim>> {
    let ended = if seen.finished { format!("{} requests", cases.len()) } else { "the time was up first".to_owned() };
    let mut claims = vec![Claim { what: "every request reached its end", holds: seen.finished, evidence: ended }];
    claims.extend(answers(cases, seen.sent));
    claims.extend(subject_data(world, people, cases).await?);
    claims.push(files(world, people, cases, seen.files).await?);
    claims.extend(callbacks(cases, &seen.callbacks));
    Ok(claims)
}

fn answers(cases: &[Case], sent: &Sent) -> Vec<Claim> {
    let of = |key: &str| sent.answers.get(key).map_or(&[][..], Vec::as_slice);
    let accepted =
        |case: &&Case| of(&case.request.subject_request_id.to_string()).iter().all(|(status, _)| *status == 201);
    let refused = cases.iter().filter(|case| !accepted(case)).count();
    let duplicates: Vec<_> = cases.iter().filter(|case| case.twist == Twist::Duplicate).collect();
    let differing = duplicates.iter().filter(|case| {
        let answers = of(&case.request.subject_request_id.to_string());
        answers.len() != 2 || answers[0].1["received_time"] != answers[1].1["received_time"]
    });
    let differing = differing.count();
    let cancelled: Vec<_> = cases.iter().filter(|case| case.is_cancelled()).collect();
    let uncancelled = cancelled.iter().filter(|case| {
        let answers = of(&format!("cancel {}", case.request.subject_request_id));
        answers.len() != 1 || answers[0].0 != 202
    });
    let uncancelled = uncancelled.count();
    let malformed = of("malformed");
    let wrong =
        malformed.iter().filter(|(status, _)| *status != 400).count() + sent.malformed.abs_diff(malformed.len());
    vec![
        claim("every request was answered 201", refused, cases.len(), "requests"),
        claim("duplicates got the first answer's times", differing, duplicates.len(), "duplicates"),
        claim("cancellations were answered 202", uncancelled, cancelled.len(), "cancellations"),
        claim("malformed messages were answered 400", wrong, sent.malformed, "messages"),
    ]
}

async fn subject_data(world: &World, people: &People, cases: &[Case]) -> anyhow::Result<Vec<Claim>> {
    let session = world.db.session().await?;
    let mut held: HashMap<(String, Mpid), (i64, i64, i64)> = HashMap::new();
    let tables = [
        "SELECT controller_id, mpid, count(*) FROM subject_data.profiles GROUP BY 1, 2",
        "SELECT controller_id, mpid, count(*) FROM subject_data.profile_identities GROUP BY 1, 2",
        "SELECT controller_id, mpid, count(*) FROM subject_data.event_batches GROUP BY 1, 2",
    ];
    for (index, table) in tables.into_iter().enumerate() {
        for row in session.query(table, &[]).await? {
            let counts = held.entry((row.get(0), row.get(1))).or_default();
            match index {
                0 => counts.0 = row.get(2),
                1 => counts.1 = row.get(2),
                _ => counts.2 = row.get(2),
            }
        }
    }
    let by_person: HashMap<usize, &Case> = cases.iter().map(|case| (case.person, case)).collect();
    let (mut left, mut erased) = (0, 0);
    let (mut touched, mut cancelled) = (0, 0);
    let (mut harmed, mut others) = (0, 0);
    for (index, person) in people.0.iter().enumerate() {
        let counts = held.get(&(person.controller_id.to_string(), Mpid(person.mpid))).copied().unwrap_or_default();
        let whole = counts == (1, 3, i64::from(person.event_batches));
        match by_person.get(&index) {
            Some(case) if case.is_cancelled() => {
                cancelled += 1;
                touched += usize::from(!whole);
            }
            Some(case) if case.request.subject_request_type == RequestType::Erasure => {
                erased += 1;
                left += usize::from(counts != (0, 0, 0));
            }
            _ => {
                others += 1;
                harmed += usize::from(!whole);
            }
        }
    }
    let receipts = session
        .query_one(
            "SELECT coalesce(sum(rows_deleted), 0)::bigint FROM lethe.erasure_receipts WHERE verified_at IS NOT NULL",
            &[],
        )
        .await?
        .get::<_, i64>(0);
    let gone: i64 = people
        .0
        .iter()
        .enumerate()
        .filter(|(index, _)| {
            by_person
                .get(index)
                .is_some_and(|case| !case.is_cancelled() && case.request.subject_request_type == RequestType::Erasure)
        })
        .map(|(_, person)| 4 + i64::from(person.event_batches))
        .sum();
    Ok(vec![
        claim("who asked for erasure is gone from every table", left, erased, "people"),
        claim("who cancelled is untouched", touched, cancelled, "people"),
        claim("everybody else is untouched", harmed, others, "people"),
        Claim {
            what: "the receipts count exactly what was erased",
            holds: receipts == gone,
            evidence: format!("{receipts} rows by receipts, {gone} by the generated data"),
        },
    ])
}

/// Compares every download with what the store holds, byte by byte.
async fn files(
    world: &World,
    people: &People,
    cases: &[Case],
    files: &BTreeMap<String, Vec<u8>>,
) -> anyhow::Result<Claim> {
    let session = world.db.session().await?;
    let compiled: Vec<&Case> =
        cases.iter().filter(|case| case.request.subject_request_type != RequestType::Erasure).collect();
    let mut wrong = files.len().abs_diff(compiled.len());
    for case in &compiled {
        let checked = async {
            let plain = files.get(&case.request.subject_request_id.to_string()).context("there is no result")?;
            let person = people.0.get(case.person).context("nobody")?;
            let bodies = session
                .query("SELECT body::text FROM subject_data.event_batches WHERE controller_id = $1 AND mpid = $2 ORDER BY id", &[&person.controller_id, &Mpid(person.mpid)])
                .await?;
            let events: String = bodies.iter().flat_map(|row| [row.get::<_, &str>(0), "\n"]).collect();
            let (profile, found) = if case.request.subject_request_type == RequestType::Portability {
                unzip(plain)?
            } else {
                let text = String::from_utf8(plain.clone())?;
                text.split_once('\n').map(|(profile, rest)| (profile.to_owned(), rest.to_owned())).context("no line")?
            };
            let whole = found == events && profile.contains(&person.mpid.to_string()) && !profile.contains("audiences");
            anyhow::Ok(whole)
        };
        wrong += usize::from(!checked.await.unwrap_or(false));
    }
    Ok(claim("every download is complete and verbatim", wrong, compiled.len(), "files"))
}

/// The profile, and all event batches in order.
fn unzip(bytes: &[u8]) -> anyhow::Result<(String, String)> {
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes))?;
    let (mut profile, mut events) = (String::new(), String::new());
    for index in 0..archive.len() {
        let mut file = archive.by_index(index)?;
        if file.name()? == "profile.jsonl" {
            file.read_to_string(&mut profile)?;
        } else {
            file.read_to_string(&mut events)?;
        }
    }
    Ok((profile, events))
}

fn callbacks(cases: &[Case], received: &[Received]) -> Vec<Claim> {
    let unsigned = received.iter().filter(|callback| !callback.signed).count();
    // At least once: a callback that came twice has the same id and counts once, where it came first.
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut orders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut counts: HashMap<&str, Option<i64>> = HashMap::new();
    for callback in received {
        if seen.insert(&callback.callback_id) {
            orders.entry(&callback.subject_request_id).or_default().push(&callback.status);
            counts.insert(&callback.subject_request_id, callback.results_count);
        }
    }
    let (mut disordered, mut example) = (0, String::new());
    for case in cases {
        let id = case.request.subject_request_id.to_string();
        let expected: &[&str] =
            if case.is_cancelled() { &["pending", "cancelled"] } else { &["pending", "in_progress", "completed"] };
        let compiled = case.request.subject_request_type != RequestType::Erasure;
        let counted = counts.get(id.as_str()).copied().flatten().is_some() == compiled;
        let arrived = orders.get(id.as_str()).map_or(&[][..], Vec::as_slice);
        if arrived != expected || !counted {
            disordered += 1;
            example = format!(" (for instance {id}: {arrived:?}, results_count as expected: {counted})");
        }
    }
    let strangers = received.iter().filter(|callback| !callback.url.ends_with("/callbacks")).count();
    let mut in_order = claim("callbacks arrived in order, none missing", disordered, cases.len(), "requests");
    in_order.evidence.push_str(&example);
    vec![claim("every callback is signed", unsigned + strangers, received.len(), "callbacks"), in_order]
}
