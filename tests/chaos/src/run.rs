//! One run: a world, a fleet, traffic and harm; then calm, the hurdles mended, and the checker.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::checker::{self, Evidence, Trail, Violation};
use crate::defects::{OPEN_WEEKS_DROPPED, OUT_OF_THE_TRAIL};
use crate::driver::{self, Driver, Harm, Repertoire, Span};
use crate::fleet::Fleet;
use crate::latecomers::Latecomers;
use crate::plan::{self, HTTP_SENDER, Hurdle, Plan};
use crate::post::Post;
use crate::receiver::Receivers;
use crate::report::Report;
use crate::world::World;

/// A run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Everything follows from it.
    pub seed: u64,
    /// Subject requests.
    pub requests: usize,
    /// How long traffic and harm last.
    pub span: Duration,
    /// Processes of each worker.
    pub each: usize,
    /// The script of the servers, where they are ours alone.
    pub servers: Option<PathBuf>,
    /// A planted defect.
    pub defect: Option<String>,
    /// How long all may take to end once the harm is over.
    pub patience: Duration,
    /// Leave database, virtual host and folder.
    pub keep: bool,
}

impl Options {
    /// The short form: on servers that others use too.
    pub fn short(seed: u64) -> Self {
        Self {
            seed,
            requests: 150,
            span: Duration::from_secs(8),
            each: 2,
            servers: None,
            defect: None,
            patience: Duration::from_secs(90),
            keep: false,
        }
    }

    /// With a planted defect, a smaller run that brings it to light.
    #[must_use]
    pub fn with_defect(mut self, name: &str) -> Self {
        self.defect = Some(name.to_owned());
        // Where wake-ups are lost, being stuck is what is looked for; elsewhere it would only hide the defect.
        let patience =
            if matches!(name, "publish_lost" | "deaf_consumers" | "lost_commits_believed") { 12 } else { 90 };
        let span = match name {
            // A bad message must meet neighbours in its group.
            "no_split" => 1,
            // Somebody is outlived or replaced, and must meet what came of it; an erasure must begin beside an import.
            "no_lease_check" | "lost_commits_believed" | "writers_ignored" => 15,
            _ => 5,
        };
        (self.requests, self.span, self.patience) = (120, Duration::from_secs(span), Duration::from_secs(patience));
        self
    }

    fn repertoire(&self) -> Repertoire {
        let first = |name: &str| driver::slots(name, self.each).start;
        let only = self.defect.as_deref().map(|name| match name {
            "ack_before_commit" => {
                vec![
                    Harm::KillAt(first("identity-matcher"), "intake.before_commit".to_owned(), 2),
                    Harm::Kill(first("identity-matcher") + 1),
                ]
            }
            "no_lease_check" => vec![Harm::ZombieAt(first("access-compiler"), "compile.before_file".to_owned(), 1)],
            "deaf_consumers" => vec![Harm::CancelConsumers("dsr.erasure-execution")],
            "lost_commits_believed" => vec![Harm::FailoverWithLoss(1_500)],
            _ => vec![Harm::ClockJump],
        });
        Repertoire { each: self.each, own_servers: self.servers.is_some(), only }
    }
}

/// Runs it.
pub async fn run(options: &Options) -> Report {
    let began = Instant::now();
    let (completed, says_completed) = mpsc::unbounded_channel();
    let receivers = Receivers::start(options.seed, completed).await;
    // Where they spoil all of their group, there is one in each group.
    let poisoned = if options.defect.as_deref() == Some("no_split") { 40 } else { 4 };
    let mut plan = plan::make(options.seed, options.requests, poisoned, options.span, &receivers.addresses);
    // Senders that publish again would hide what is lost.
    if options.defect.as_deref() == Some("ack_before_commit") {
        plan.letters.iter_mut().for_each(|letter| letter.is_careful &= letter.sender == HTTP_SENDER);
    }
    let plan = Arc::new(plan);
    let world = Arc::new(World::new(options.servers.clone()).await);
    world.furnish(&plan).await;
    match options.defect.as_deref() {
        Some(OUT_OF_THE_TRAIL) => world.leave_out_of_the_trail().await,
        Some(OPEN_WEEKS_DROPPED) => world.let_weeks_go().await,
        _ => {}
    }
    let sampler = checker::sample(plan.clone(), world.clone(), says_completed);
    let fleet = Fleet::start(world.clone(), options.each, options.defect.as_deref()).await;
    let driver = Driver::new(world.clone(), fleet.clone(), options.each);
    // What each process learns at first must be among what is lost.
    if options.defect.as_deref() == Some("lost_commits_believed") {
        driver.standby().await;
    }
    // A bad message must meet neighbours in its group: the matchers begin once all of it is queued.
    let is_held = options.defect.as_deref() == Some("no_split");
    let held = if is_held { driver::slots("identity-matcher", options.each) } else { 0..0 };
    for index in held.clone() {
        fleet.signal(index, "STOP").await;
    }
    let post = Post::open(plan.clone(), world.clone(), fleet.clone());
    let late = Latecomers::start(options.seed, plan.clone(), world.clone(), post.clone());
    driver.run(driver::schedule(options.seed, options.span, &options.repertoire()), options.span).await;
    for index in held {
        fleet.signal(index, "CONT").await;
    }

    receivers.calm();
    late.stop();
    let purges = driver.purges();
    let calm =
        Calm { world: &world, fleet: &fleet, post: &post, plan: &plan, purges: &purges, patience: options.patience };
    let mut violations = calm.settle(true).await;
    violations.extend(checker::hurdles_hold(&world, &plan, !driver.losses().is_empty()).await);
    world.mend_store().await;
    receivers.revive();
    if violations.is_empty() {
        violations.extend(calm.settle(false).await);
    }
    post.close();
    let trail = Trail::read(&world).await;
    let metrics = fleet.metrics().await;
    let undrained = fleet.stop().await;
    violations.extend(undrained.into_iter().map(|what| Violation::of(0, what)));
    violations.extend(fleet.deserters.lock().unwrap().drain(..).map(|what| Violation::of(0, what)));
    violations.extend(driver.found());

    let mut evidence = Evidence {
        plan: plan.clone(),
        world: world.clone(),
        fates: post.fates(),
        purges,
        arrivals: receivers.arrivals(),
        late_batches: late.batches(),
        late_twins: late.twins(),
        losses: driver.losses(),
        doubtful_rows: late.doubtful_rows(),
        trail,
        listed: BTreeMap::default(),
        rows: BTreeMap::default(),
        strangers: 0,
    };
    evidence.doubt_what_was_lost();
    evidence.read_rows().await;
    violations.extend(evidence.untimely(&sampler.lock().unwrap()));
    let (found, deliveries) = checker::check(&evidence, &metrics).await;
    violations.extend(found);
    let report = Report {
        seed: options.seed,
        defect: options.defect.clone(),
        elapsed: began.elapsed(),
        requests: plan.cases.len(),
        outcomes: evidence.outcomes(),
        doubtful: evidence.doubtful(),
        letters: plan.letters.len(),
        sent: evidence.fates.iter().map(|fate| fate.times as usize).sum(),
        answers: evidence.fates.iter().map(|fate| fate.answers.len()).sum(),
        deliveries,
        harm: driver.done(),
        fired: fleet.fired.load(Ordering::SeqCst),
        disk: world.disk,
        violations,
    };
    if !report.violations.is_empty() {
        report.keep_logs(&world.tests.folder.join("log"));
    }
    if options.keep {
        eprintln!("kept: database and virtual host {}, folder {}", world.tests.name, world.tests.folder.display());
        std::mem::forget(world);
    }
    report
}

/// Something of a request, as a list of the command line has it.
#[derive(Deserialize)]
struct OfRequest {
    subject_request_id: String,
}

/// A batch as `lethe batch list` has it.
#[derive(Deserialize)]
struct Batch {
    state: String,
    runs_at: Timestamp,
}

/// After the harm.
struct Calm<'a> {
    world: &'a World,
    fleet: &'a Fleet,
    post: &'a Post,
    plan: &'a Plan,
    purges: &'a [Span],
    patience: Duration,
}

impl Calm<'_> {
    /// Waits until everything has ended, but for what stands behind hurdles where these still stand.
    async fn settle(&self, hurdles: bool) -> Vec<Violation> {
        let began = Instant::now();
        let mut jumps = 0;
        loop {
            // One that was to stop itself may do so now.
            self.fleet.wake_all().await;
            let left = self.left(hurdles).await;
            if left.is_empty() {
                return vec![];
            }
            if began.elapsed() > self.patience {
                return left.into_iter().map(|what| Violation::of(5, format!("stuck: {what}"))).collect();
            }
            // Leases of the dead need not be sat out.
            if began.elapsed() > Duration::from_secs(3 + 10 * jumps) {
                self.world.jump(61.0).await;
                jumps += 1;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    async fn left(&self, hurdles: bool) -> Vec<String> {
        let except = |hurdle| -> BTreeSet<&str> {
            let cases = self.plan.cases.iter().filter(|case| hurdles && case.hurdle == Some(hurdle));
            cases.map(|case| case.id.as_str()).collect()
        };
        let (failing, dead) = (except(Hurdle::FailingStore), except(Hurdle::DeadEndpoint));
        let requests = async |status| -> usize {
            let listed: Vec<OfRequest> = self.world.list(&["request", "list", "--status", status]).await;
            listed.iter().filter(|one| !failing.contains(&one.subject_request_id.as_str())).count()
        };
        let callbacks = async |state| -> usize {
            let listed: Vec<OfRequest> = self.world.list(&["callback", "list", "--state", state]).await;
            let is_excused = |id: &str| failing.contains(&id) || dead.contains(&id);
            listed.iter().filter(|one| !is_excused(&one.subject_request_id)).count()
        };
        let batches = async {
            let now = self.world.clock().await.unwrap_or(Timestamp::MIN);
            let is_open = |batch: &&Batch| {
                batch.state != "completed" && batch.runs_at < now.saturating_sub(SignedDuration::from_secs(5)).unwrap()
            };
            let listed: Vec<Batch> = self.world.list(&["batch", "list"]).await;
            if hurdles { 0 } else { listed.iter().filter(is_open).count() }
        };
        let (pending, begun, waiting, ready, exhausted, batches) = futures_util::join!(
            requests("pending"),
            requests("in_progress"),
            callbacks("waiting"),
            callbacks("ready"),
            callbacks("exhausted"),
            batches
        );
        let mut left = Vec::new();
        let counts = [("requests", pending + begun), ("callbacks", waiting + ready + exhausted), ("batches", batches)];
        for (what, count) in counts {
            if count > 0 {
                left.push(format!("{count} {what} have not ended"));
            }
        }
        let letters = self.post.open_letters();
        if letters > 0 {
            left.push(format!("{letters} messages are not answered"));
        }
        // Looking moves the messages: only once all else has come to rest.
        if left.is_empty() {
            let fates = self.post.fates();
            let poisoned = self
                .plan
                .letters
                .iter()
                .zip(&fates)
                .filter(|(letter, fate)| self.plan.cases[letter.case].is_poison && fate.counts(self.purges));
            let dead = self.world.dead_letters().await;
            let is_kept = |id: &str| dead.iter().any(|body| body.contains(id));
            let open = poisoned.filter(|(letter, _)| !is_kept(&self.plan.cases[letter.case].id)).count();
            if open > 0 {
                left.push(format!("{open} poisoned messages are not dead-lettered"));
            }
        }
        left
    }
}
