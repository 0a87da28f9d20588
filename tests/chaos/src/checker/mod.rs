//! The checker: reads the end state from outside and lists every violation. It judges by the plan, plain SQL on the subject
//! data, files, what the controllers' side saw, and what an operator and an auditor are shown: the command line's lists and
//! the exported trail. Of Lethe's own code it uses only the decryption of result files; of its own tables only what the
//! checks of `integrity` and `privacy` are about.

mod callbacks;
mod durability;
mod integrity;
mod isolation;
mod messages;
mod outcome;
mod privacy;
mod results;
mod trail;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use crate::driver::Span;
use crate::latecomers::{LateBatch, LateTwin};
use crate::people::CONTROLLERS;
use crate::plan::{LetterKind, Plan};
use crate::post::Fate;
use crate::receiver::Arrival;
use crate::world::World;

pub use callbacks::Deliveries;
pub use isolation::hurdles_hold;
pub use outcome::{Sampler, sample};
pub use trail::{Id, Trail};

/// What was said just before its cause was lost arrives no later than this: a process may have stood still meanwhile, until
/// its leases had run out (`Driver::outlive`).
const ON_ITS_WAY: Duration = Duration::from_secs(6);

/// Something that a guarantee rules out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The guarantee, 1 to 6 (contract 12); 7 for the trail (ADR 0011).
    pub guarantee: u8,
    /// What was seen.
    pub what: String,
}

impl Violation {
    /// A violation of a guarantee.
    pub fn of(guarantee: u8, what: impl Into<String>) -> Self {
        Self { guarantee, what: what.into() }
    }
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct Row {
    /// The status.
    pub status: String,
    /// When it was received.
    pub received_at: Timestamp,
    /// When its batch runs.
    pub runs_at: Option<Timestamp>,
    /// When it was released.
    pub in_progress_at: Option<Timestamp>,
}

/// What there is at the end of a run.
pub struct Evidence {
    /// What was to be.
    pub plan: Arc<Plan>,
    /// The world.
    pub world: Arc<World>,
    /// What became of the letters.
    pub fates: Vec<Fate>,
    /// When the queues of requests were emptied.
    pub purges: Vec<Span>,
    /// What the receivers got.
    pub arrivals: Vec<Arrival>,
    /// Event batches that came late.
    pub late_batches: Vec<LateBatch>,
    /// Profiles that came late.
    pub late_twins: Vec<LateTwin>,
    /// When PostgreSQL confirmed what it then lost.
    pub losses: Vec<Span>,
    /// Rows that came late and of which it is not known whether they came.
    pub doubtful_rows: i64,
    /// What the trail tells.
    pub trail: Trail,
    /// The statuses of all requests, as an operator sees them.
    pub listed: BTreeMap<Id, String>,
    /// The requests that there are, by case.
    pub rows: BTreeMap<usize, Row>,
    /// Requests that nobody sent.
    pub strangers: usize,
}

/// A request as `lethe request list` has it.
#[derive(Deserialize)]
struct Listed {
    controller_id: String,
    subject_request_id: String,
    status: String,
    received_at: Timestamp,
    batch_id: Option<i64>,
}

/// A batch as `lethe batch list` has it.
#[derive(Deserialize)]
struct Batch {
    batch_id: i64,
    runs_at: Timestamp,
}

impl Evidence {
    /// Reads the requests.
    pub async fn read_rows(&mut self) {
        let by_id: BTreeMap<Id, usize> = self
            .plan
            .cases
            .iter()
            .enumerate()
            .map(|(number, case)| ((CONTROLLERS[case.controller].to_owned(), case.id.clone()), number))
            .collect();
        let batches: Vec<Batch> = self.world.list(&["batch", "list"]).await;
        let runs_at: BTreeMap<i64, Timestamp> = batches.iter().map(|batch| (batch.batch_id, batch.runs_at)).collect();
        for listed in self.world.list::<Listed>(&["request", "list"]).await {
            let Listed { controller_id, subject_request_id, status, received_at, batch_id } = listed;
            let id = (controller_id, subject_request_id);
            self.listed.insert(id.clone(), status.clone());
            match by_id.get(&id) {
                Some(case) => {
                    let in_progress_at = self.trail.requests.get(&id).and_then(|told| told.in_progress_at);
                    let runs_at = batch_id.and_then(|batch| runs_at.get(&batch).copied());
                    self.rows.insert(*case, Row { status, received_at, runs_at, in_progress_at });
                }
                None => self.strangers += 1,
            }
        }
    }

    /// What was imported while commits were lost may be there or not.
    pub fn doubt_what_was_lost(&mut self) {
        let losses = self.losses.clone();
        let is_lost = |at: Instant| losses.iter().any(|(began, ended)| *began <= at && at <= *ended);
        let (batches, twins) = (self.late_batches.len(), self.late_twins.len());
        self.late_batches.retain(|batch| !is_lost(batch.committed_at));
        self.late_twins.retain(|twin| !is_lost(twin.committed_at));
        let doubted = (batches - self.late_batches.len()) + 2 * (twins - self.late_twins.len());
        self.doubtful_rows += i64::try_from(doubted).unwrap_or(i64::MAX);
    }

    /// What samples showed of completed erasures, but for those whose completion was lost.
    pub fn untimely(&self, samples: &[(Instant, Violation)]) -> Vec<Violation> {
        samples.iter().filter(|(at, _)| !self.is_during_loss(*at)).map(|(_, violation)| violation.clone()).collect()
    }

    /// An answer or a callback may be on its way for a moment after what it tells of was lost.
    fn is_during_loss(&self, at: Instant) -> bool {
        self.losses.iter().any(|(began, ended)| *began <= at && at <= *ended + ON_ITS_WAY)
    }

    fn was_written_during_loss(&self, file: &Path) -> bool {
        let age = std::fs::metadata(file).and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
        age.and_then(|age| Instant::now().checked_sub(age)).is_some_and(|at| self.is_during_loss(at))
    }

    /// Something was said about the case while commits were lost, so that it need not be so any more. How it ends, and what
    /// becomes of the data, must still fit.
    fn is_doubtful(&self, case: usize) -> bool {
        let urls = &self.plan.cases[case].urls;
        let letters = self.plan.letters.iter().zip(&self.fates).filter(|(letter, _)| letter.case == case);
        let said = |fate: &Fate| {
            let is_open =
                fate.answers.is_empty() && self.losses.iter().any(|(_, ended)| fate.first_sent < Some(*ended));
            is_open || fate.answers.iter().any(|(at, _)| self.is_during_loss(*at))
        };
        !self.losses.is_empty()
            && (letters.into_iter().any(|(_, fate)| said(fate))
                || self.arrivals.iter().any(|arrival| urls.contains(&arrival.url) && self.is_during_loss(arrival.at)))
    }

    /// Requests that are not judged in every point.
    pub fn doubtful(&self) -> usize {
        (0..self.plan.cases.len()).filter(|case| self.is_doubtful(*case)).count()
    }

    /// How many requests ended how.
    pub fn outcomes(&self) -> BTreeMap<String, usize> {
        let mut outcomes = BTreeMap::new();
        for number in 0..self.plan.cases.len() {
            let status = self.rows.get(&number).map_or("not there", |row| row.status.as_str());
            *outcomes.entry(status.to_owned()).or_default() += 1;
        }
        outcomes
    }

    /// The letters of a case of one kind, each with its fate.
    fn letters(&self, case: usize, kind: LetterKind) -> impl Iterator<Item = (usize, &Fate)> {
        let letters = self.plan.letters.iter().zip(&self.fates).enumerate();
        letters
            .filter(move |(_, (letter, _))| letter.case == case && letter.kind == kind)
            .map(|(index, (_, fate))| (index, fate))
    }

    /// The statuses and bodies of the answers to the letters of a case of one kind.
    fn answers(&self, case: usize, kind: LetterKind) -> Vec<(u16, Value)> {
        self.letters(case, kind)
            .flat_map(|(_, fate)| fate.answers.iter().map(|(_, answer)| (answer.status, answer.json())))
            .collect()
    }

    fn is_status(&self, case: usize, status: &str) -> bool {
        self.rows.get(&case).is_some_and(|row| row.status == status)
    }

    fn name(&self, case: usize) -> String {
        let case = &self.plan.cases[case];
        format!("{} {} ({:?})", CONTROLLERS[case.controller], case.id, case.kind)
    }
}

/// All violations.
pub async fn check(evidence: &Evidence, metrics: &[String]) -> (Vec<Violation>, Deliveries) {
    let mut violations = durability::check(evidence);
    violations.extend(outcome::check(evidence).await);
    violations.extend(integrity::check(evidence).await);
    violations.extend(results::check(evidence).await);
    violations.extend(messages::check(evidence).await);
    let (found, deliveries) = callbacks::check(evidence);
    violations.extend(found);
    violations.extend(privacy::check(evidence, metrics).await);
    violations.extend(trail::check(evidence));
    (violations, deliveries)
}
