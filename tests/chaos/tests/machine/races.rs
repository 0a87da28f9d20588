//! Races by the thousand: the real functions of the database, called at the same time from many sides.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lethe_db::intake::Recorded;
use lethe_db::leader::Term;
use lethe_db::release::{self, SliceLimits};
use lethe_db::requests::{self, Cancellation, Overtaking};
use lethe_db::slices::{self, Turn, Verified};
use lethe_db::{DbError, batches, leader};
use lethe_domain::request::{RequestKey, RequestStatus, Stage, SubjectRequestId};
use lethe_testing::wait::{eventually, seconds};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use uuid::Uuid;

use super::bench::{Bench, LEADERSHIP};

/// A request and its cancellation come at the same instant: whichever is first, the request ends as cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_that_meets_its_request_wins() {
    const ROUNDS: usize = 125;
    const AT_ONCE: usize = 8;
    let bench = Arc::new(Bench::new(true).await);
    let mut tasks = Vec::new();
    for lane in 0..6 {
        let bench = bench.clone();
        tasks.push(tokio::spawn(async move {
            for _ in (lane..ROUNDS).step_by(6) {
                let ids: Vec<_> = (0..AT_ONCE).map(|_| SubjectRequestId::random()).collect();
                let targets = bench.targets(&ids);
                let cancel = requests::cancel(&bench.world.db, &targets, Overtaking::Remember);
                let (submitted, cancelled) = futures_util::join!(bench.submit(&ids), cancel);
                submitted.unwrap();
                for outcome in cancelled.unwrap().0 {
                    assert!(!matches!(outcome, Cancellation::TooLate(_) | Cancellation::Unknown), "{outcome:?}");
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(bench.world.in_status("cancelled").await, i64::try_from(ROUNDS * AT_ONCE).unwrap());
}

/// What counts is when a request was received; that its transaction takes longer than the cancellation is remembered
/// changes nothing, and nobody forgets the cancellation meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_intake_that_takes_long_still_meets_the_cancellation_that_overtook_it() {
    let bench = Arc::new(Bench::new(true).await);
    let id = SubjectRequestId::random();
    requests::cancel(&bench.world.db, &bench.targets(&[id]), Overtaking::Remember).await.unwrap();
    let lock = bench.world.db.begin("lock").await.unwrap();
    lock.batch_execute("LOCK TABLE lethe.requests IN EXCLUSIVE MODE").await.unwrap();
    let submit = tokio::spawn({
        let bench = bench.clone();
        async move { bench.submit(&[id]).await.unwrap() }
    });
    eventually("the intake waits for the lock", seconds(5), async || {
        bench
            .world
            .one(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'lethe.requests'::regclass)",
                &[],
            )
            .await
    })
    .await;
    bench.advance(super::bench::WAITING + 1).await;
    let forget = tokio::spawn({
        let bench = bench.clone();
        async move {
            let epoch = leader::acquire(&bench.world.db, Uuid::nil(), LEADERSHIP).await.unwrap().unwrap();
            requests::forget_cancellations(&bench.world.db, &Term::without_clock(epoch), 100).await.unwrap()
        }
    });
    eventually("the forgetting waits for the intake", seconds(5), async || {
        let sql =
            "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND mode = 'ExclusiveLock'
                                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
        bench.world.one(sql, &[]).await
    })
    .await;
    lock.commit().await.unwrap();
    submit.await.unwrap();
    assert_eq!(forget.await.unwrap(), 0, "the intake has taken it");
    assert_eq!(bench.world.status(&id.to_string()).await, "cancelled");
}

const REQUESTS: usize = 600;

/// Everything at once: each request by two senders, cancellations at any time, two schedulers that depose each other,
/// two executors that claim the same slices, and a clock that jumps over ticks and leases.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_storm_every_request_has_one_outcome_and_every_answer_fits_it() {
    let storm = Arc::new(Storm::begin().await);
    let senders: Vec<_> = (0..4).map(|lane| tokio::spawn(storm.clone().send(lane))).collect();
    let cancellers: Vec<_> = (0..2).map(|lane| tokio::spawn(storm.clone().cancel(lane))).collect();
    let others = [
        tokio::spawn(storm.clone().schedule()),
        tokio::spawn(storm.clone().schedule()),
        tokio::spawn(storm.clone().execute()),
        tokio::spawn(storm.clone().execute()),
        tokio::spawn(storm.clone().jump()),
    ];
    for task in senders.into_iter().chain(cancellers) {
        task.await.unwrap();
    }
    let world = &storm.bench.world;
    eventually("everything has ended", seconds(60), async || {
        world.in_status("pending").await + world.in_status("in_progress").await == 0
    })
    .await;
    storm.is_over.store(true, Ordering::SeqCst);
    for task in others {
        task.await.unwrap();
    }
    storm.judge().await;
}

struct Storm {
    bench: Arc<Bench>,
    ids: Vec<SubjectRequestId>,
    is_over: AtomicBool,
    /// The answers, by request.
    firsts: Mutex<HashMap<SubjectRequestId, Vec<bool>>>,
    cancelled: Mutex<HashMap<SubjectRequestId, Vec<Cancellation>>>,
    completed: AtomicUsize,
    refused: AtomicUsize,
}

impl Storm {
    async fn begin() -> Self {
        Self {
            bench: Arc::new(Bench::new(false).await),
            ids: (0..REQUESTS).map(|_| SubjectRequestId::random()).collect(),
            is_over: AtomicBool::default(),
            firsts: Mutex::default(),
            cancelled: Mutex::default(),
            completed: AtomicUsize::default(),
            refused: AtomicUsize::default(),
        }
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// Two lanes send each half of the requests.
    async fn send(self: Arc<Self>, lane: usize) {
        for group in self.ids.chunks(6).skip(lane % 2).step_by(2) {
            let recorded = self.bench.submit(group).await.unwrap();
            for (id, outcome) in group.iter().zip(recorded.outcomes) {
                let Recorded::Accepted { first, .. } = outcome else { panic!("the same content") };
                self.firsts.lock().unwrap().entry(*id).or_default().push(first);
            }
        }
    }

    async fn cancel(self: Arc<Self>, lane: usize) {
        let mut random = StdRng::seed_from_u64(lane as u64);
        for _ in 0..REQUESTS / 12 {
            let ids: Vec<_> = (0..4).map(|_| self.ids[random.random_range(0..self.ids.len())]).collect();
            // Only requests that are known: what is remembered may run out as the clock jumps.
            let targets = self.bench.targets(&ids);
            let (outcomes, _) = requests::cancel(&self.bench.world.db, &targets, Overtaking::Refuse).await.unwrap();
            for (id, outcome) in ids.into_iter().zip(outcomes) {
                self.cancelled.lock().unwrap().entry(id).or_default().push(outcome);
            }
        }
    }

    async fn jump(self: Arc<Self>) {
        let mut random = StdRng::seed_from_u64(7);
        while !self.is_over() {
            self.bench.advance(random.random_range(3..70)).await;
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    }

    async fn schedule(self: Arc<Self>) {
        let (db, me) = (&self.bench.world.db, Uuid::new_v4());
        // The epoch is asked for rarely, so that it is often over.
        while !self.is_over() {
            let Some(epoch) = leader::acquire(db, me, LEADERSHIP).await.unwrap() else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            for _ in 0..20 {
                match self.round(epoch).await {
                    Ok(()) => {}
                    Err(DbError::LeadershipLost) => {
                        self.refused.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    async fn round(&self, epoch: i64) -> Result<(), DbError> {
        let (db, term) = (&self.bench.world.db, Term::without_clock(epoch));
        batches::close_due(db, &term).await?;
        let due = batches::to_release(&db.session().await?).await?;
        for one in due {
            let limits = SliceLimits { step: 20, requests: 7, mpids: 100 };
            let batch = (one.batch.batch_id, one.batch.lane);
            release::step(db, &self.bench.keys, &term, batch, 1_000, limits).await?;
        }
        batches::complete(db, epoch).await.map(drop)
    }

    async fn execute(self: Arc<Self>) {
        let db = &self.bench.world.db;
        while !self.is_over() {
            let session = db.session().await.unwrap();
            while let Some(claimed) = slices::claim(&session, Stage::Erasure, &Turn::default()).await.unwrap() {
                match self.attempt(&claimed).await {
                    Ok(completed) => drop(self.completed.fetch_add(completed, Ordering::SeqCst)),
                    Err(DbError::LeaseLost) => drop(self.refused.fetch_add(1, Ordering::SeqCst)),
                    Err(error) => panic!("{error}"),
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn attempt(&self, claimed: &slices::Claimed) -> Result<usize, DbError> {
        let db = &self.bench.world.db;
        let members = slices::members(&db.session().await?, claimed.slice_id).await?;
        let keys: Vec<RequestKey> = members.iter().map(|member| member.request_key).collect();
        let receipts = slices::open_receipts(&db.session().await?, claimed, "postgres").await?;
        let verified = Verified { receipts, arrived: keys.iter().map(|key| (*key, 0)).collect() };
        Ok(slices::finish_erasure(db, claimed, &members, &[verified]).await?.completed)
    }

    async fn judge(&self) {
        let world = &self.bench.world;
        for (id, firsts) in self.firsts.lock().unwrap().iter() {
            assert_eq!(firsts.iter().filter(|first| **first).count(), 1, "{id} was recorded as new more than once");
        }
        let session = world.db.session().await.unwrap();
        let rows = session.raw().query("SELECT subject_request_id, status FROM lethe.requests", &[]).await.unwrap();
        let statuses: HashMap<SubjectRequestId, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(statuses.len(), REQUESTS);
        for (id, outcomes) in self.cancelled.lock().unwrap().iter() {
            for outcome in outcomes {
                match outcome {
                    Cancellation::Cancelled { .. } => assert_eq!(statuses[id], "cancelled"),
                    Cancellation::TooLate(status) => {
                        assert_ne!(*status, RequestStatus::Pending);
                        assert_eq!(statuses[id], "completed");
                    }
                    Cancellation::Remembered { .. } => panic!("it was not to be remembered"),
                    Cancellation::Unknown => {}
                }
            }
        }
        let completed = i64::try_from(self.completed.load(Ordering::SeqCst)).unwrap();
        assert_eq!(world.in_status("completed").await, completed, "each completed once");
        let in_slices = "SELECT coalesce(sum(request_count), 0)::bigint FROM lethe.slices";
        assert_eq!(world.one::<i64>(in_slices, &[]).await, completed, "each released once");
        for (what, sql) in [
            (
                "received at or behind its tick",
                "SELECT count(*) FROM lethe.requests r JOIN lethe.batches b USING (batch_id) WHERE r.received_at >= b.tick_at",
            ),
            (
                "released before its time",
                "SELECT count(*) FROM lethe.requests r JOIN lethe.batches b USING (batch_id) WHERE r.in_progress_at < b.runs_at",
            ),
            (
                "cancelled after it began",
                "SELECT count(*) FROM lethe.requests WHERE status = 'cancelled' AND slice_id IS NOT NULL",
            ),
            (
                "a tick with two batches",
                "SELECT count(*) FROM (SELECT FROM lethe.batches GROUP BY lane, tick_at HAVING count(*) > 1) twice",
            ),
        ] {
            assert_eq!(world.one::<i64>(sql, &[]).await, 0, "{what}");
        }
        assert!(self.refused.load(Ordering::SeqCst) > 0, "nobody was ever refused: no race");
        assert!(world.in_status("cancelled").await > 0 && completed > 0);
    }
}
