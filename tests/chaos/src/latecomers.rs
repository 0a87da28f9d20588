//! Data that arrives while the requests are under way: event batches of people who asked, and profiles that carry an
//! identity which was asked about before they came.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lethe_db::DbError;
use lethe_domain::opendsr::DeniedValues;
use lethe_stores::import::{self, ProfileLine};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::people::{CANARY, CONTROLLERS};
use crate::plan::Plan;
use crate::post::Post;
use crate::world::World;

/// An event batch that came late.
#[derive(Clone, Debug)]
pub struct LateBatch {
    /// An index of people.
    pub person: usize,
    /// Its id in the table.
    pub id: i64,
    /// As the table has it.
    pub received_at: Timestamp,
    /// The one clock when it was written: committed, or by a transaction that an erasure which begins later waits for.
    pub there_at: Timestamp,
    /// When it was committed.
    pub committed_at: Instant,
}

/// A profile that came late.
#[derive(Clone, Debug)]
pub struct LateTwin {
    /// The case that it belongs to.
    pub case: usize,
    /// Its id.
    pub mpid: i64,
    /// The one clock before it was written.
    pub not_before: Timestamp,
    /// The one clock after its commit.
    pub there_at: Timestamp,
    /// When it was committed.
    pub committed_at: Instant,
}

/// All that came late.
#[derive(Default)]
pub struct Latecomers {
    batches: Mutex<Vec<LateBatch>>,
    twins: Mutex<Vec<LateTwin>>,
    doubtful_rows: AtomicI64,
    is_over: AtomicBool,
}

impl Latecomers {
    /// Begins to import.
    pub fn start(seed: u64, plan: Arc<Plan>, world: Arc<World>, post: Arc<Post>) -> Arc<Self> {
        let late = Arc::new(Self::default());
        tokio::spawn(late.clone().import_batches(seed, plan.clone(), world.clone()));
        tokio::spawn(late.clone().hold_imports(seed, plan.clone(), world.clone()));
        tokio::spawn(late.clone().import_twins(plan, world, post));
        late
    }

    /// Imports no more.
    pub fn stop(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// The event batches.
    pub fn batches(&self) -> Vec<LateBatch> {
        self.batches.lock().unwrap().clone()
    }

    /// The profiles.
    pub fn twins(&self) -> Vec<LateTwin> {
        self.twins.lock().unwrap().clone()
    }

    /// Rows of imports whose outcome is not known.
    pub fn doubtful_rows(&self) -> i64 {
        self.doubtful_rows.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    async fn import_batches(self: Arc<Self>, seed: u64, plan: Arc<Plan>, world: Arc<World>) {
        let mut random = StdRng::seed_from_u64(seed ^ 0x1A7E);
        let erased = erased(&plan);
        while !self.is_over() && !erased.is_empty() {
            let person = erased[random.random_range(0..erased.len())];
            let one = &plan.people[person];
            let body = json!({"mpid": one.mpid, "late": format!("{CANARY}")});
            // One that fails may be there or not: it is nobody's evidence.
            let inserted = world.attempt(INSERT, &[&CONTROLLERS[one.controller], &one.mpid, &body]).await;
            if let (Ok(rows), Some(there_at)) = (inserted, world.clock().await) {
                let (id, received_at) = (rows[0].get(0), rows[0].get(1));
                let committed_at = Instant::now();
                self.batches.lock().unwrap().push(LateBatch { person, id, received_at, there_at, committed_at });
            } else {
                self.doubtful_rows.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    }

    /// Imports that take seconds to commit: an erasure that begins meanwhile waits for them.
    async fn hold_imports(self: Arc<Self>, seed: u64, plan: Arc<Plan>, world: Arc<World>) {
        let mut random = StdRng::seed_from_u64(seed ^ 0x401D);
        let erased = erased(&plan);
        while !self.is_over() && !erased.is_empty() {
            let persons: Vec<usize> = (0..24).map(|_| erased[random.random_range(0..erased.len())]).collect();
            let controller = plan.people[persons[0]].controller;
            let theirs: Vec<usize> =
                persons.into_iter().filter(|person| plan.people[*person].controller == controller).collect();
            let held = Duration::from_millis(random.random_range(200..3_000));
            match hold(&world, &plan, &theirs, held).await {
                Ok(batches) => self.batches.lock().unwrap().extend(batches),
                Err(_) => drop(self.doubtful_rows.fetch_add(i64::try_from(theirs.len()).unwrap(), Ordering::SeqCst)),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn import_twins(self: Arc<Self>, plan: Arc<Plan>, world: Arc<World>, post: Arc<Post>) {
        let mut done = std::collections::BTreeSet::new();
        while !self.is_over() {
            let fates = post.fates();
            for (letter, fate) in plan.letters.iter().zip(&fates) {
                let case = &plan.cases[letter.case];
                let Some(mpid) = case.late_twin else { continue };
                let is_answered = fate.answers.iter().any(|(_, answer)| answer.status == 201);
                if !is_answered || !done.insert(letter.case) {
                    continue;
                }
                let email = &plan.people[case.matches[0]].email;
                let line = json!({"mpid": mpid, "identities": {"email": email}, "attributes": {}, "audiences": []});
                let line = ProfileLine::parse(&line.to_string(), &DeniedValues::default()).unwrap();
                let controller = CONTROLLERS[case.controller].parse().unwrap();
                let not_before = world.clock().await;
                let imported = import::profiles(&world.tests.db, &controller, &[line]).await;
                if let (Some(not_before), Ok(()), Some(there_at)) = (not_before, imported, world.clock().await) {
                    let (case, committed_at) = (letter.case, Instant::now());
                    self.twins.lock().unwrap().push(LateTwin { case, mpid, not_before, there_at, committed_at });
                } else {
                    self.doubtful_rows.fetch_add(2, Ordering::SeqCst);
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

const INSERT: &str = "INSERT INTO subject_data.event_batches (controller_id, mpid, body) VALUES ($1, $2, $3)
                      RETURNING id, received_at";

/// Those whose erasure is asked for.
fn erased(plan: &Plan) -> Vec<usize> {
    plan.cases.iter().filter(|case| case.kind.erases()).flat_map(|case| case.matches.clone()).collect()
}

/// Writes an event batch for each, in a transaction that stays open for a while.
async fn hold(world: &World, plan: &Plan, persons: &[usize], held: Duration) -> Result<Vec<LateBatch>, DbError> {
    let tx = world.tests.db.begin("held_import").await?;
    let mut written = Vec::new();
    for person in persons {
        let one = &plan.people[*person];
        let body = json!({"mpid": one.mpid, "late": format!("{CANARY}")});
        let rows = tx.raw().query(INSERT, &[&CONTROLLERS[one.controller], &one.mpid, &body]).await?;
        written.push((*person, rows[0].get(0), rows[0].get(1)));
    }
    let there_at = tx.raw().query("SELECT lethe.now()", &[]).await?[0].get(0);
    tokio::time::sleep(held).await;
    tx.commit().await?;
    let committed_at = Instant::now();
    let batch = |(person, id, received_at)| LateBatch { person, id, received_at, there_at, committed_at };
    Ok(written.into_iter().map(batch).collect())
}
