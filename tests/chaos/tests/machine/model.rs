//! Random interleavings of everything that moves a request, against a small model in memory.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use lethe_db::callbacks::{self, EndpointLimits, RetryPolicy};
use lethe_db::leader::Term;
use lethe_db::release::{self, SliceLimits};
use lethe_db::requests::{self, Cancellation, Overtaking};
use lethe_db::slices::{self, Claimed, Trouble, Turn, Verified};
use lethe_db::{DbError, batches, leader};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::request::{SliceId, Stage, SubjectRequestId};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use uuid::Uuid;

use super::bench::{Bench, LEADERSHIP, WAITING};

const REQUESTS: usize = 5;
const WORKERS: usize = 2;
const LEASE: i64 = 60;
const RETRY: i64 = 30;
/// With jitter 0 a wait is half of its step.
const CALLBACK_STEP: u64 = 20;

#[derive(Clone, Debug)]
enum Step {
    Submit(usize),
    Cancel(usize),
    Advance(i64),
    Close,
    Release,
    /// By a leader whose epoch is over.
    StaleLeader,
    Claim(usize),
    Finish(usize),
    GiveBack(usize),
    Complete,
    Deliver {
        fails: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..REQUESTS).prop_map(Step::Submit),
        2 => (0..REQUESTS).prop_map(Step::Cancel),
        4 => prop_oneof![Just(7_i64), Just(30), Just(61), Just(125)].prop_map(Step::Advance),
        2 => Just(Step::Close),
        3 => Just(Step::Release),
        1 => Just(Step::StaleLeader),
        3 => (0..WORKERS).prop_map(Step::Claim),
        3 => (0..WORKERS).prop_map(Step::Finish),
        1 => (0..WORKERS).prop_map(Step::GiveBack),
        1 => Just(Step::Complete),
        3 => any::<bool>().prop_map(|fails| Step::Deliver { fails }),
    ]
}

#[derive(Clone, Debug)]
struct Callback {
    state: &'static str,
    due: i64,
}

#[derive(Clone, Debug)]
struct Request {
    status: &'static str,
    tick: i64,
    slice: Option<SliceId>,
    callbacks: Vec<Callback>,
    cancelled_at: i64,
}

#[derive(Clone, Debug)]
struct Slice {
    done: bool,
    /// Claims so far; the last one holds it, unless it was given back.
    claims: usize,
    is_held: bool,
    expires: i64,
    due: i64,
}

/// What ought to be. Times are seconds since the clock's start, at half past a minute.
#[derive(Default)]
struct Model {
    now: i64,
    requests: BTreeMap<usize, Request>,
    early: HashMap<usize, (i64, i64)>,
    batches: BTreeMap<i64, &'static str>,
    slices: BTreeMap<SliceId, Slice>,
}

impl Model {
    fn next_tick(&self) -> i64 {
        (self.now + 30).div_euclid(60) * 60 + 30
    }

    fn enter(&mut self, number: usize, status: &'static str) {
        let now = self.now;
        let request = self.requests.get_mut(&number).unwrap();
        request.status = status;
        let free = request.callbacks.last().is_none_or(|last| last.state == "delivered");
        request.callbacks.push(Callback { state: if free { "ready" } else { "waiting" }, due: now });
    }

    fn submit(&mut self, number: usize) {
        let tick = self.next_tick();
        // A repetition opens the batch that it would be scheduled for now as well; nothing joins it.
        self.batches.entry(tick).or_insert("open");
        if self.requests.contains_key(&number) {
            return;
        }
        let request = Request { status: "", tick, slice: None, callbacks: vec![], cancelled_at: 0 };
        self.requests.insert(number, request);
        self.enter(number, "pending");
        if let Some((received, expires)) = self.early.get(&number).copied()
            && expires > self.now
        {
            self.early.remove(&number);
            self.enter(number, "cancelled");
            self.requests.get_mut(&number).unwrap().cancelled_at = received;
        }
    }

    /// The kind of the answer, and its time.
    fn cancel(&mut self, number: usize) -> (&'static str, i64) {
        let now = self.now;
        match self.requests.get(&number).map(|request| request.status) {
            Some("pending") => {
                self.enter(number, "cancelled");
                self.requests.get_mut(&number).unwrap().cancelled_at = now;
                ("cancelled", now)
            }
            Some("cancelled") => ("cancelled", self.requests[&number].cancelled_at),
            Some(_) => ("too late", 0),
            None => {
                let early = self.early.entry(number).or_insert((now, now + WAITING));
                if early.1 <= now {
                    early.0 = now;
                }
                early.1 = now + WAITING;
                ("remembered", early.0)
            }
        }
    }

    fn close(&mut self) {
        let now = self.now;
        for (_, state) in self.batches.iter_mut().filter(|(tick, state)| **tick <= now && **state == "open") {
            *state = "closed";
        }
    }

    fn due(&self) -> Vec<i64> {
        let due = self.batches.iter().filter(|(tick, state)| **state == "closed" && **tick + WAITING <= self.now);
        due.map(|(tick, _)| *tick).collect()
    }

    /// `slices`: what the real release has made, one for each batch with pending requests, in order.
    fn release(&mut self, slices: &[SliceId]) {
        let mut slices = slices.iter();
        for tick in self.due() {
            let members: Vec<usize> = self
                .requests
                .iter()
                .filter(|(_, one)| one.tick == tick && one.status == "pending")
                .map(|(number, _)| *number)
                .collect();
            if !members.is_empty() {
                let slice = *slices.next().expect("a slice for what was pending");
                self.slices.insert(slice, Slice { done: false, claims: 0, is_held: false, expires: 0, due: self.now });
                for number in members {
                    self.enter(number, "in_progress");
                    self.requests.get_mut(&number).unwrap().slice = Some(slice);
                }
            }
            self.batches.insert(tick, "released");
        }
        assert_eq!(slices.next(), None, "no slice for nothing");
    }

    fn complete_batches(&mut self) {
        let open: Vec<i64> = self
            .requests
            .values()
            .filter(|one| one.slice.is_some_and(|slice| !self.slices[&slice].done))
            .map(|one| one.tick)
            .collect();
        for (tick, state) in &mut self.batches {
            if *state == "released" && !open.contains(tick) {
                *state = "completed";
            }
        }
    }

    fn due_callbacks(&self) -> Vec<(usize, usize)> {
        let all = self.requests.iter().flat_map(|(number, one)| {
            one.callbacks.iter().enumerate().map(move |(at, callback)| ((*number, at), callback))
        });
        all.filter(|(_, callback)| callback.state == "ready" && callback.due <= self.now)
            .map(|(place, _)| place)
            .collect()
    }

    fn deliver(&mut self, fails: bool) {
        let now = self.now;
        for (number, at) in self.due_callbacks() {
            let callbacks = &mut self.requests.get_mut(&number).unwrap().callbacks;
            if fails {
                callbacks[at].due = now + i64::try_from(CALLBACK_STEP / 2).unwrap();
                continue;
            }
            callbacks[at].state = "delivered";
            if let Some(next) = callbacks.get_mut(at + 1) {
                *next = Callback { state: "ready", due: now };
            }
        }
    }
}

/// The model, the real thing, and what its workers hold.
struct Pair<'a> {
    bench: &'a Bench,
    model: Model,
    ids: Vec<SubjectRequestId>,
    held: HashMap<usize, (Claimed, usize)>,
}

impl Pair<'_> {
    async fn take(&mut self, step: &Step) {
        let db = &self.bench.world.db;
        match *step {
            Step::Submit(number) => {
                self.bench.submit(&[self.ids[number]]).await.unwrap();
                self.model.submit(number);
            }
            Step::Cancel(number) => {
                let target = (self.bench.controller.clone(), self.ids[number]);
                let (outcomes, _) = requests::cancel(db, &[target], Overtaking::Remember).await.unwrap();
                let found = match outcomes[0] {
                    Cancellation::Cancelled { received_at, .. } => ("cancelled", Self::seconds(received_at)),
                    Cancellation::TooLate(_) => ("too late", 0),
                    Cancellation::Remembered { received_at } => ("remembered", Self::seconds(received_at)),
                    Cancellation::Unknown => ("unknown", 0),
                };
                assert_eq!(found, self.model.cancel(number));
            }
            Step::Advance(seconds) => {
                self.bench.advance(seconds).await;
                self.model.now += seconds;
            }
            Step::Close => {
                let epoch = self.epoch().await;
                batches::close_due(db, &Term::without_clock(epoch)).await.unwrap();
                self.model.close();
            }
            Step::Release => self.release().await,
            Step::StaleLeader => {
                let stale = self.epoch().await - 1;
                assert!(matches!(
                    batches::close_due(db, &Term::without_clock(stale)).await,
                    Err(DbError::LeadershipLost)
                ));
                assert!(matches!(batches::complete(db, stale).await, Err(DbError::LeadershipLost)));
            }
            Step::Claim(worker) => self.claim(worker).await,
            Step::Finish(worker) => self.finish(worker).await,
            Step::GiveBack(worker) => {
                let Some((claimed, generation)) = self.held.get(&worker) else { return };
                let step = Duration::from_secs(RETRY.unsigned_abs());
                let backoff = BackoffPolicy::new(step, step).unwrap();
                slices::give_back(db, claimed, backoff, Trouble::Slice, "test", 1.0).await.unwrap();
                let now = self.model.now;
                let slice = self.model.slices.get_mut(&claimed.slice_id).unwrap();
                if slice.is_held && slice.claims == *generation && !slice.done {
                    (slice.is_held, slice.due) = (false, now + RETRY);
                }
            }
            Step::Complete => {
                let epoch = self.epoch().await;
                batches::complete(db, epoch).await.unwrap();
                self.model.complete_batches();
            }
            Step::Deliver { fails } => self.deliver(fails).await,
        }
    }

    fn seconds(instant: jiff::Timestamp) -> i64 {
        instant.as_second() - "2026-11-22T09:00:30Z".parse::<jiff::Timestamp>().unwrap().as_second()
    }

    async fn epoch(&self) -> i64 {
        leader::acquire(&self.bench.world.db, Uuid::nil(), LEADERSHIP).await.unwrap().unwrap()
    }

    async fn release(&mut self) {
        let (db, epoch) = (&self.bench.world.db, self.epoch().await);
        let (term, stale) = (Term::without_clock(epoch), Term::without_clock(epoch - 1));
        let due = batches::to_release(&db.session().await.unwrap()).await.unwrap();
        assert_eq!(due.len(), self.model.due().len());
        let mut made = Vec::new();
        for one in due {
            let batch = (one.batch.batch_id, one.batch.lane);
            let stale = release::step(db, &self.bench.keys, &stale, batch, 1_000, SliceLimits::default()).await;
            assert!(matches!(stale, Err(DbError::LeadershipLost)));
            loop {
                let step =
                    release::step(db, &self.bench.keys, &term, batch, 1_000, SliceLimits::default()).await.unwrap();
                made.extend(step.slices);
                if step.finished {
                    break;
                }
            }
        }
        self.model.release(&made);
    }

    async fn claim(&mut self, worker: usize) {
        let now = self.model.now;
        let session = self.bench.world.db.session().await.unwrap();
        let claimed = slices::claim(&session, Stage::Erasure, &Turn::default()).await.unwrap();
        let is_free = |slice: &Slice| !slice.done && slice.due <= now && (!slice.is_held || slice.expires <= now);
        let Some(claimed) = claimed else {
            assert!(!self.model.slices.values().any(is_free), "nothing is claimed of {:?}", self.model.slices);
            return;
        };
        let slice = self.model.slices.get_mut(&claimed.slice_id).unwrap();
        assert!(is_free(slice), "claimed {slice:?}");
        (slice.claims, slice.is_held, slice.expires) = (slice.claims + 1, true, now + LEASE);
        self.held.insert(worker, (claimed, slice.claims));
    }

    async fn finish(&mut self, worker: usize) {
        let Some((claimed, generation)) = self.held.get(&worker) else { return };
        let db = &self.bench.world.db;
        let slice = self.model.slices.get_mut(&claimed.slice_id).unwrap();
        let ours = slice.is_held && slice.claims == *generation && !slice.done;
        let members = slices::members(&db.session().await.unwrap(), claimed.slice_id).await.unwrap();
        let keys: Vec<_> = members.iter().map(|member| member.request_key).collect();
        let receipts = slices::open_receipts(&db.session().await.unwrap(), claimed, "postgres").await.unwrap();
        let verified = Verified { receipts, arrived: keys.iter().map(|key| (*key, 0)).collect() };
        let finished = slices::finish_erasure(db, claimed, &members, &[verified]).await;
        if !ours {
            assert!(matches!(finished, Err(DbError::LeaseLost)), "{finished:?}");
            return;
        }
        assert!(finished.unwrap().slice_done);
        (slice.done, slice.is_held) = (true, false);
        let id = claimed.slice_id;
        let done: Vec<usize> =
            self.model.requests.iter().filter(|(_, one)| one.slice == Some(id)).map(|(number, _)| *number).collect();
        for number in done {
            self.model.enter(number, "completed");
        }
    }

    async fn deliver(&mut self, fails: bool) {
        let db = &self.bench.world.db;
        let session = db.session().await.unwrap();
        let endpoints = session.raw().query("SELECT endpoint_id FROM lethe.endpoints", &[]).await.unwrap();
        let Some(endpoint) = endpoints.first() else { return };
        let limits = EndpointLimits { in_flight: 100, lease: Duration::from_mins(1) };
        let claimed = callbacks::claim(&session, &self.bench.keys, limits, &[(endpoint.get(0), 100)]).await.unwrap();
        assert_eq!(claimed.len(), self.model.due_callbacks().len(), "due callbacks");
        let attempt = DeliveryAttempt {
            duration: Duration::ZERO,
            status_code: Some(if fails { 404 } else { 202 }),
            error_class: fails.then_some("status_4xx"),
            reason: None,
            endpoint_trouble: false,
            retry_after: None,
        };
        let group: Vec<_> = claimed.into_iter().map(|one| (one, attempt.clone())).collect();
        let step = Duration::from_secs(CALLBACK_STEP);
        let backoff = BackoffPolicy::new(step, step).unwrap();
        let policy = RetryPolicy {
            backoff,
            give_up: Duration::from_hours(900),
            breaker_threshold: 10,
            probe: backoff,
            longest_pause: step,
        };
        callbacks::record(db, &policy, &group, || 0.0).await.unwrap();
        // Recorded twice, it is no longer ours and changes nothing.
        callbacks::record(db, &policy, &group, || 0.0).await.unwrap();
        self.model.deliver(fails);
    }

    async fn compare(&self, after: &Step) {
        let session = self.bench.world.db.session().await.unwrap();
        let sql = "SELECT r.subject_request_id, r.status,
                          (SELECT coalesce(array_agg(c.state ORDER BY c.sequence), '{}') FROM lethe.callbacks c
                            WHERE c.request_key = r.request_key)
                     FROM lethe.requests r";
        let real: BTreeMap<usize, (String, Vec<String>)> = session
            .raw()
            .query(sql, &[])
            .await
            .unwrap()
            .iter()
            .map(|row| {
                (
                    self.ids.iter().position(|id| *id == row.get::<_, SubjectRequestId>(0)).unwrap(),
                    (row.get(1), row.get(2)),
                )
            })
            .collect();
        let states = |one: &Request| one.callbacks.iter().map(|callback| callback.state.to_owned()).collect();
        let model: BTreeMap<usize, (String, Vec<String>)> =
            self.model.requests.iter().map(|(number, one)| (*number, (one.status.to_owned(), states(one)))).collect();
        assert_eq!(real, model, "requests after {after:?}");
        let rows = session.raw().query("SELECT state FROM lethe.batches ORDER BY tick_at", &[]).await.unwrap();
        let real: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(real, self.model.batches.values().copied().collect::<Vec<_>>(), "batches after {after:?}");
    }
}

/// Plays `steps` on tables that are empty and a clock that is set back to its start; what endpoints remember of claims
/// stays, as it does when the clock of a server is set back.
async fn play(bench: &Bench, steps: &[Step]) {
    bench
        .world
        .run(
            "TRUNCATE lethe.requests, lethe.request_details, lethe.batches, lethe.slices, lethe.callbacks, lethe.early_cancellations,
                      lethe.slice_receipts, lethe.callback_attempts CASCADE;
             UPDATE lethe.clock SET shift = '0'; UPDATE lethe.lanes SET closed_through = '-infinity';
             UPDATE lethe.leaders SET expires_at = '-infinity'",
        )
        .await;
    // What a process remembers of batches is of a database that is gone.
    bench.forget();
    let ids = (0..REQUESTS).map(|_| SubjectRequestId::random()).collect();
    let mut pair = Pair { bench, model: Model::default(), ids, held: HashMap::new() };
    for step in steps {
        pair.take(step).await;
        pair.compare(step).await;
    }
}

/// Found by [`random_interleavings_agree_with_the_model`]: the claim at 155 s did not see the callback of 0 s, since the last
/// claim before the clock was set back had been at the same instant, give or take some seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_where_one_was_before_the_clock_was_set_back_sees_what_is_due() {
    let bench = Bench::new(true).await;
    let found = [
        Step::Submit(0),
        Step::Advance(125),
        Step::Advance(30),
        Step::Deliver { fails: true },
        Step::Advance(7),
        Step::Submit(4),
        Step::Deliver { fails: true },
        Step::Submit(4),
        Step::Deliver { fails: false },
    ];
    // From five seconds before the first claim of the sequence to two seconds after it.
    for before in [0, 1, 2, 5, 7] {
        play(&bench, &[Step::Submit(0), Step::Advance(150 + before), Step::Deliver { fails: false }]).await;
        play(&bench, &found).await;
    }
}

#[test]
fn random_interleavings_agree_with_the_model() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let bench = runtime.block_on(Bench::new(true));
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&vec(step(), 20..50), |steps| {
        runtime.block_on(play(&bench, &steps));
        Ok(())
    });
    outcome.unwrap();
    runtime.block_on(async { drop(bench) });
}
