//! Guarantee 7: the trail is whole, and says of each request what is so. It is read as an auditor has it, by `lethe audit
//! export`, and the requests as an operator sees them, by `lethe request list`: whatever tables lie behind.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use crate::world::World;

use super::{Evidence, Violation};

/// Sealing takes seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Controller and `subject_request_id`.
pub type Id = (String, String);

/// What the trail tells of a request.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// The statuses that it took, in order.
    pub statuses: Vec<String>,
    /// When it was released.
    pub in_progress_at: Option<Timestamp>,
    /// The starts of its erasures, and the rows that each has deleted.
    pub erasures: Vec<(Timestamp, i64)>,
}

/// What the trail tells.
#[derive(Clone, Debug, Default)]
pub struct Trail {
    /// By request.
    pub requests: BTreeMap<Id, Told>,
    /// What `lethe audit verify` says against it.
    pub refused: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Seal {},
    Request(OfRequest),
    Head {},
    End { unsealed: i64 },
}

/// What a set tells of one request. That it follows from the set, `lethe audit verify` says.
#[derive(Deserialize)]
struct OfRequest {
    chain: String,
    event: String,
    recorded_at: Timestamp,
    details: Value,
}

impl Trail {
    /// Reads it, once it is sealed to its end; after a while as far as it is.
    pub async fn read(world: &World) -> Self {
        let began = Instant::now();
        loop {
            let export = world.lethe(&["audit", "export"]).await;
            let lines: Vec<Line> = export.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let is_sealed = matches!(lines.last(), Some(Line::End { unsealed: 0 }));
            if is_sealed || began.elapsed() > PATIENCE {
                let file = world.tests.folder.join("trail.jsonl");
                std::fs::write(&file, &export).unwrap();
                let file = file.to_str().unwrap();
                let mut refused = None;
                for arguments in [&["audit", "verify"][..], &["audit", "verify", "--file", file]] {
                    let verified = lethe_testing::cli::lethe(&world.tests, arguments).await;
                    if verified.code != Some(0) {
                        refused = Some(format!("{}{}", verified.out, verified.err));
                    }
                }
                return Self { requests: requests(lines), refused };
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// What it tells of a request.
    pub fn of(&self, controller: &str, id: &str) -> Option<&Told> {
        self.requests.get(&(controller.to_owned(), id.to_owned()))
    }
}

fn requests(lines: Vec<Line>) -> BTreeMap<Id, Told> {
    let mut requests = BTreeMap::<Id, Told>::new();
    for line in lines {
        let Line::Request(OfRequest { chain, event, recorded_at, details }) = line else { continue };
        let Some(id) = details["subject_request_id"].as_str() else { continue };
        let told = requests.entry((chain, id.to_owned())).or_default();
        match event.as_str() {
            "request.received" => told.statuses.push("pending".to_owned()),
            "request.released" => {
                told.statuses.push("in_progress".to_owned());
                told.in_progress_at = Some(recorded_at);
            }
            "request.completed" => {
                told.statuses.push("completed".to_owned());
                for store in details["stores"].as_array().into_iter().flatten() {
                    let as_of = store["as_of"].as_str().and_then(|text| text.parse().ok());
                    told.erasures.push((as_of.unwrap_or(Timestamp::MAX), store["rows_deleted"].as_i64().unwrap_or(0)));
                }
            }
            "request.cancelled" => told.statuses.push("cancelled".to_owned()),
            _ => {}
        }
    }
    requests
}

pub(super) fn check(evidence: &Evidence) -> Vec<Violation> {
    let trail = &evidence.trail;
    let mut violations: Vec<Violation> =
        trail.refused.iter().map(|said| Violation::of(7, format!("the trail is not whole: {said}"))).collect();
    for (id, status) in &evidence.listed {
        let told = trail.requests.get(id).map(|told| told.statuses.as_slice()).unwrap_or_default();
        let fits = match status.as_str() {
            "pending" => told == ["pending"],
            "in_progress" => told == ["pending", "in_progress"],
            "completed" => told == ["pending", "in_progress", "completed"],
            "cancelled" => told == ["pending", "cancelled"],
            _ => false,
        };
        if !fits {
            violations.push(Violation::of(7, format!("{} {} is {status}, and the trail says {told:?}", id.0, id.1)));
        }
    }
    let unlisted = trail.requests.iter().filter(|(id, _)| !evidence.listed.contains_key(*id));
    violations.extend(
        unlisted.map(|(id, told)| Violation::of(7, format!("{} {} is in the trail only: {told:?}", id.0, id.1))),
    );
    violations
}
