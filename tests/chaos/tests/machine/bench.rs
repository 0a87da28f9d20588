//! What both need: a world with a clock that stands still unless it is told otherwise, an intake, and leaders.

use std::sync::{Arc, Mutex};

use jiff::SignedDuration;
use lethe_db::intake::{IntakeContext, RecordedGroup, Submission};
use lethe_db::requests::Target;
use lethe_db::{DbError, calendar, leader};
use lethe_domain::opendsr::{DeniedValues, Parser};
use lethe_domain::request::{Calendar, ControllerId, SubjectRequestId};
use lethe_testing::World;
use serde_json::json;
use uuid::Uuid;

/// From the closing of a batch to its run.
pub(crate) const WAITING: i64 = 120;
/// How long the leader leads.
pub(crate) const LEADERSHIP: std::time::Duration = std::time::Duration::from_secs(15);

pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) controller: ControllerId,
    intake: Mutex<Arc<IntakeContext>>,
    pub(crate) keys: Arc<lethe_domain::crypto::Keys>,
    parser: Parser,
}

impl Bench {
    /// `frozen`: the clock stands at half past a minute, and moves only by [`Bench::advance`].
    pub(crate) async fn new(frozen: bool) -> Self {
        let world = World::new().await;
        let controller = world.controller("acme").await;
        if frozen {
            world
                .run(
                    "CREATE OR REPLACE FUNCTION lethe.now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE AS
                     $$ SELECT timestamptz '2026-11-22T09:00:30Z' + shift FROM lethe.clock $$",
                )
                .await;
        }
        let (keys, parser) = (world.keys(), parser());
        let intake = Mutex::new(Arc::new(IntakeContext::new(keys.clone(), 1_000)));
        let bench = Self { world, controller, intake, keys, parser };
        let epoch = leader::acquire(&bench.world.db, Uuid::nil(), LEADERSHIP).await.unwrap().unwrap();
        calendar::store(&bench.world.db, epoch, &every_minute(), jiff::SignedDuration::from_hours(24)).await.unwrap();
        bench
    }

    /// An erasure with one callback URL.
    pub(crate) fn submission(&self, id: SubjectRequestId) -> Submission {
        let url = "https://controller.example/callbacks";
        let body = json!({
            "regulation": "gdpr", "subject_request_id": id, "subject_request_type": "erasure", "api_version": "3.0",
            "submitted_time": "2026-11-20T10:00:00Z", "status_callback_urls": [url],
            "subject_identities": {"email": {"value": "ada@example.com", "encoding": "raw"}},
        });
        let request = self.parser.request(body.to_string().as_bytes(), None).unwrap();
        let origins = vec![self.parser.addresses.check(url).unwrap()];
        Submission { controller_id: self.controller.clone(), request, origins }
    }

    pub(crate) async fn submit(&self, ids: &[SubjectRequestId]) -> Result<RecordedGroup, DbError> {
        let intake = self.intake.lock().unwrap().clone();
        let group: Vec<Submission> = ids.iter().map(|id| self.submission(*id)).collect();
        intake.record(&self.world.db, &group.iter().collect::<Vec<_>>()).await
    }

    pub(crate) fn targets(&self, ids: &[SubjectRequestId]) -> Vec<Target> {
        ids.iter().map(|id| (self.controller.clone(), *id)).collect()
    }

    /// What a process remembers of batches and endpoints, once the tables were emptied.
    pub(crate) fn forget(&self) {
        *self.intake.lock().unwrap() = Arc::new(IntakeContext::new(self.keys.clone(), 1_000));
    }

    pub(crate) async fn advance(&self, seconds: i64) {
        self.world.run(&format!("UPDATE lethe.clock SET shift = shift + interval '{seconds} s'")).await;
    }
}

fn parser() -> Parser {
    Parser { extension_domains: vec![], denied: DeniedValues::default(), addresses: "".parse().unwrap() }
}

fn every_minute() -> Calendar {
    let minute = || "* * * * *".parse().unwrap();
    Calendar {
        erasure: minute(),
        expedited: minute(),
        access: minute(),
        waiting_period: SignedDuration::from_secs(WAITING),
        completion_margin: SignedDuration::from_secs(60),
    }
}
