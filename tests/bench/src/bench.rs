//! What all rows work with: a database and a virtual host of their own, the servers' processes, the workers.

use std::time::Duration;

use jiff::Timestamp;
use lethe_broker::topology::QUEUES;
use lethe_db::calendar;
use lethe_db::{Db, leader};
use lethe_domain::request::{Calendar, ControllerId};
use lethe_testing::{Worker, World};
use reqwest::Method;

use crate::meter::Meter;
use crate::options::Sizes;
use crate::servers::Servers;

/// The product's own defaults, where the harness of the tests is more hasty.
const DEFAULTS: &[(&str, &str)] = &[
    ("LETHE_LOG", "info"),
    ("LETHE_CALLBACK_FIRST_RETRY", "30s"),
    ("LETHE_CALLBACK_MAX_RETRY", "6h"),
    ("LETHE_STORE_FIRST_RETRY", "5s"),
    ("LETHE_STORE_MAX_RETRY", "10m"),
    ("LETHE_SCHEDULER_INTERVAL", "500ms"),
    ("LETHE_REDRIVE_AFTER", "10s"),
];

/// The place of all rows.
pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) sizes: Sizes,
    pub(crate) servers: Servers,
    /// Sessions of the raw programs: PostgreSQL may keep their plans, which Lethe's sessions forgo.
    pub(crate) raw_db: Db,
}

impl Bench {
    pub(crate) async fn new(sizes: Sizes) -> Self {
        let world = World::new().await;
        let servers = Servers::find(&world.db, &world.management).await;
        // Without a space: written anew, the URL would have + for it, which PostgreSQL takes for itself.
        let separator = if world.database_url.contains('?') { '&' } else { '?' };
        let url = format!("{}{separator}options=-cplan_cache_mode%3Dauto", world.database_url);
        let raw_db = Db::new(&url, 16, "raw").unwrap();
        let bench = Self { world, sizes, servers, raw_db };
        bench.declare().await;
        bench.world.run(RAW_TABLES).await;
        bench
    }

    async fn declare(&self) {
        let broker = lethe_broker::Broker::new(&self.world.amqp_url, "lethe-bench").unwrap();
        broker.connect().await.unwrap();
    }

    pub(crate) async fn rabbitmq_version(&self) -> String {
        let overview = self.world.management.call(Method::GET, "/overview", None).await.unwrap();
        overview["rabbitmq_version"].as_str().unwrap_or_default().to_owned()
    }

    /// Starts workers of these kinds, all ready, with the product's defaults but for `settings`.
    pub(crate) async fn workers(&self, names: &[&str], settings: &[(&str, &str)]) -> Vec<Worker> {
        let settings: Vec<(&str, &str)> = DEFAULTS.iter().chain(settings).copied().collect();
        Worker::several(&self.world, names, &settings).await
    }

    /// Starts the clock of a run of Lethe.
    pub(crate) fn meter(&self, workers: &[Worker]) -> Meter {
        Meter::start(self.servers, workers.iter().map(Worker::id).collect())
    }

    /// Starts the clock of a raw run.
    pub(crate) fn raw_meter(&self) -> Meter {
        Meter::start(self.servers, Vec::new())
    }

    /// Removes all requests and work of both sides, empties the queues, and lets PostgreSQL write out what it owes, so
    /// that no run pays for the one before it.
    pub(crate) async fn clean(&self) {
        self.world
            .run(
                "TRUNCATE lethe.requests, lethe.request_details, lethe.batches, lethe.slices, lethe.endpoints, lethe.callbacks,
                          lethe.callback_attempts, lethe.slice_receipts, lethe.early_cancellations CASCADE;
                 TRUNCATE raw.requests, raw.request_mpids, raw.callbacks, raw.slices;
                 UPDATE lethe.lanes SET closed_through = '-infinity'",
            )
            .await;
        for queue in QUEUES {
            self.world.purge(queue.name).await;
        }
        self.settle().await;
    }

    /// Waits until a look into the database gives `wanted`.
    pub(crate) async fn reaches(&self, sql: &str, wanted: u64) {
        let wanted = i64::try_from(wanted).unwrap();
        while self.count(sql).await != wanted {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a scheduler leads.
    pub(crate) async fn is_led(&self) {
        self.reaches("SELECT count(*) FROM lethe.leaders WHERE holder IS NOT NULL", 1).await;
    }

    /// Waits until the trail is sealed as far as it goes.
    pub(crate) async fn is_sealed(&self) {
        self.reaches("SELECT count(*) FROM (SELECT FROM lethe.audit_unsealed LIMIT 1) one", 0).await;
    }

    /// Lets PostgreSQL write out what it owes.
    pub(crate) async fn settle(&self) {
        self.world.run("CHECKPOINT").await;
    }

    /// Puts a calendar into force, as a scheduler would, without leaving one running.
    pub(crate) async fn calendar(&self, settings: &[(&str, &str)]) {
        let value = |name| settings.iter().find(|(key, _)| *key == name).unwrap().1;
        let calendar = Calendar {
            erasure: value("LETHE_ERASURE_SCHEDULE").parse().unwrap(),
            expedited: value("LETHE_EXPEDITED_SCHEDULE").parse().unwrap(),
            access: value("LETHE_ACCESS_SCHEDULE").parse().unwrap(),
            waiting_period: jiff::SignedDuration::ZERO,
            completion_margin: jiff::SignedDuration::from_secs(60),
        };
        let holder = uuid::Uuid::new_v4();
        let epoch = leader::acquire(&self.world.db, holder, Duration::from_secs(15)).await.unwrap();
        calendar::store(
            &self.world.db,
            epoch.expect("nobody leads"),
            &calendar,
            jiff::SignedDuration::from_hours(7 * 24),
        )
        .await
        .unwrap();
        leader::resign(&self.world.db.session().await.unwrap(), holder).await.unwrap();
    }

    /// Sets the one clock; it goes on from there.
    pub(crate) async fn set_clock(&self, instant: Timestamp) {
        self.world.set_clock(instant).await;
    }

    /// A controller, added where it is not there yet; `true` where it is new.
    pub(crate) async fn controller(&self, id: &str) -> (ControllerId, bool) {
        let known: Option<String> =
            self.world.optional("SELECT controller_id FROM lethe.controllers WHERE controller_id = $1", &[&id]).await;
        match known {
            Some(_) => (id.parse().unwrap(), false),
            None => (self.world.controller(id).await, true),
        }
    }

    /// A number out of the database.
    pub(crate) async fn count(&self, sql: &str) -> i64 {
        self.world.one(sql, &[]).await
    }
}

/// A calendar that ticks once a day: what is due is decided by moving the clock.
pub(crate) const DAILY: &[(&str, &str)] = &[
    ("LETHE_ERASURE_SCHEDULE", "0 12 * * *"),
    ("LETHE_ERASURE_WAITING_PERIOD", "0s"),
    ("LETHE_EXPEDITED_SCHEDULE", "0 12 * * *"),
    ("LETHE_ACCESS_SCHEDULE", "0 12 * * *"),
    ("LETHE_COMPLETION_MARGIN", "60s"),
];

/// The raw programs' tables: the least that the contract asks to be kept of a request, and nothing of what Lethe happens to
/// store. They stay as they are when Lethe's tables change, so that a leaner Lethe shows as a better ratio: the request under
/// its two keys, the profiles it was matched to, a state for each callback, the slices. No foreign keys, no triggers.
const RAW_TABLES: &str = "
    CREATE SCHEMA raw;
    CREATE TABLE raw.requests (
        request_key              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        controller_id            text NOT NULL,
        subject_request_id       uuid NOT NULL,
        status                   text NOT NULL,
        slice_id                 bigint,
        received_at              timestamptz NOT NULL,
        expected_completion_time timestamptz NOT NULL,
        body                     bytea NOT NULL,
        UNIQUE (controller_id, subject_request_id)
    ) WITH (fillfactor = 50);
    CREATE TABLE raw.request_mpids (
        request_key bigint NOT NULL,
        mpid        bigint NOT NULL,
        PRIMARY KEY (request_key, mpid)
    );
    CREATE TABLE raw.callbacks (
        request_key bigint NOT NULL,
        url_no      smallint NOT NULL,
        sequence    smallint NOT NULL,
        endpoint_id bigint NOT NULL,
        state       text NOT NULL,
        lease_token uuid,
        PRIMARY KEY (request_key, url_no, sequence)
    ) WITH (fillfactor = 70);
    CREATE INDEX ON raw.callbacks (endpoint_id) WHERE state = 'ready';
    CREATE TABLE raw.slices (
        slice_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        controller_id text NOT NULL,
        request_count integer NOT NULL
    )";
