//! A world of its own for each test.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use lethe_broker::topology::QueueState;
use lethe_db::Db;
use lethe_db::controllers::{self, NewController};
use lethe_db::installation;
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::DeniedValues;
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_stores::import::{self, EventBatchLine, ProfileLine};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_postgres::types::{FromSqlOwned, ToSql};

use crate::servers::{self, Management};
use crate::signing::KeyFiles;
use crate::wait::{becomes, eventually_some, seconds};

/// A database, a virtual host, folders and keys that nobody else uses; gone when it is dropped.
pub struct World {
    /// The database and the virtual host are called so.
    pub name: String,
    /// PostgreSQL, as workers reach it.
    pub database_url: String,
    /// RabbitMQ, as workers reach it.
    pub amqp_url: String,
    /// The database, with a pool of its own.
    pub db: Db,
    /// The management API of RabbitMQ.
    pub management: Management,
    /// Keys, results, logs.
    pub folder: PathBuf,
    /// Keys of this world.
    pub files: KeyFiles,
    /// API key and secret by controller.
    credentials: Mutex<HashMap<String, (String, String)>>,
}

impl World {
    /// Makes one.
    pub async fn new() -> Self {
        let name = servers::unique_name();
        let management = Management::new();
        let database_url = servers::create_database(&name).await;
        let amqp_url = management.create_vhost(&name).await;
        let folder = std::env::temp_dir().join(&name);
        for part in ["keys", "results", "log", "run"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        let db = Db::new(&database_url, 16, "lethe-testing").unwrap();
        let files = KeyFiles::write(&folder);
        // A gateway alone waits until somebody has said so.
        let keys = Keys::from_master_key(&std::fs::read_to_string(&files.master).unwrap()).unwrap();
        installation::check_master_key(&db, &keys).await.unwrap();
        Self { name, database_url, amqp_url, db, management, folder, files, credentials: Mutex::default() }
    }

    /// What workers derive from the master key.
    pub fn keys(&self) -> Arc<Keys> {
        Arc::new(Keys::from_master_key(&std::fs::read_to_string(&self.files.master).unwrap()).unwrap())
    }

    /// Adds a controller that our AMQP user publishes for.
    pub async fn controller(&self, id: &str) -> ControllerId {
        self.controller_with(id, |new| new.amqp_user = Some(self.management.user())).await
    }

    /// Adds a controller as `change` makes it.
    pub async fn controller_with(&self, id: &str, change: impl FnOnce(&mut NewController)) -> ControllerId {
        let mut new = NewController {
            controller_id: id.parse().unwrap(),
            amqp_user: None,
            any_amqp_user: false,
            algorithm: SignatureAlgorithm::RsaPkcs1v15,
            include_profile: true,
        };
        change(&mut new);
        let credentials = controllers::add(&self.db, &new).await.unwrap().expect("the controller is new");
        let pair = (credentials.api_key, credentials.api_secret);
        self.credentials.lock().unwrap().insert(id.to_owned(), pair);
        new.controller_id
    }

    /// API key and secret of a controller of this world.
    pub fn credentials(&self, controller: &str) -> (String, String) {
        self.credentials.lock().unwrap()[controller].clone()
    }

    /// Imports a profile with these identities.
    pub async fn profile(&self, controller: &ControllerId, mpid: i64, identities: &[(&str, &str)]) {
        let identities: serde_json::Map<String, Value> =
            identities.iter().map(|(kind, value)| ((*kind).to_owned(), json!(value))).collect();
        let line =
            json!({"mpid": mpid, "identities": identities, "attributes": {"city": "Ghent"}, "audiences": ["secret"]});
        self.profiles(controller, &[line.to_string()]).await;
    }

    /// Imports profiles, one JSON object each.
    pub async fn profiles(&self, controller: &ControllerId, lines: &[String]) {
        let lines: Vec<ProfileLine> =
            lines.iter().map(|line| ProfileLine::parse(line, &DeniedValues::default()).unwrap()).collect();
        import::profiles(&self.db, controller, &lines).await.unwrap();
    }

    /// Imports event batches, one JSON object each.
    pub async fn event_batches(&self, controller: &ControllerId, lines: &[String]) {
        let lines: Vec<EventBatchLine> = lines.iter().map(|line| EventBatchLine::parse(line).unwrap()).collect();
        import::event_batches(&self.db, controller, &lines).await.unwrap();
    }

    /// A profile with an e-mail address and `batches` event batches: what most tests erase.
    pub async fn person(&self, controller: &ControllerId, mpid: i64, email: &str, batches: usize) {
        self.profile(controller, mpid, &[("email", email)]).await;
        let lines: Vec<String> = (0..batches).map(|n| json!({"mpid": mpid, "n": n}).to_string()).collect();
        self.event_batches(controller, &lines).await;
    }

    /// Rows of a profile in the three tables of the built-in store.
    pub async fn rows_of(&self, controller: &ControllerId, mpid: i64) -> (i64, i64, i64) {
        let count =
            |table| format!("(SELECT count(*) FROM subject_data.{table} WHERE controller_id = $1 AND mpid = $2)");
        let sql = format!("SELECT {}, {}, {}", count("profiles"), count("profile_identities"), count("event_batches"));
        let session = self.db.session().await.unwrap();
        let row = session.raw().query_one(&sql, &[controller, &mpid]).await.unwrap();
        (row.get(0), row.get(1), row.get(2))
    }

    /// The first column of the first row.
    pub async fn one<T: FromSqlOwned>(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> T {
        self.optional(sql, params).await.unwrap_or_else(|| panic!("no row: {sql}"))
    }

    /// The first column of the first row, where there is one.
    pub async fn optional<T: FromSqlOwned>(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Option<T> {
        let session = self.db.session().await.unwrap();
        session.raw().query(sql, params).await.unwrap().first().map(|row| row.get(0))
    }

    /// How many requests the trail tells of under an event, as in `requests.purged`.
    pub async fn told(&self, event: &str) -> i64 {
        let sql =
            "SELECT coalesce(sum(json_array_length(requests)), 0)::bigint FROM lethe.audit_entries WHERE event = $1";
        self.one(sql, &[&event]).await
    }

    /// The first column of all rows.
    pub async fn all<T: FromSqlOwned>(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Vec<T> {
        let session = self.db.session().await.unwrap();
        session.raw().query(sql, params).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    /// Runs statements.
    pub async fn run(&self, sql: &str) {
        self.db.session().await.unwrap().batch_execute(sql).await.unwrap();
    }

    /// The status of a request; empty where there is none.
    pub async fn status(&self, id: &str) -> String {
        let sql = "SELECT status FROM lethe.requests WHERE subject_request_id::text = $1";
        self.optional(sql, &[&id]).await.unwrap_or_default()
    }

    /// Waits until a request has this status.
    pub async fn reaches(&self, id: &str, status: &str) {
        becomes("the status of a request", seconds(20), status.to_owned(), async || self.status(id).await).await;
    }

    /// Waits until so many requests have this status.
    pub async fn count_reaches(&self, status: &str, count: i64) {
        let what = format!("requests that are {status}");
        becomes(&what, seconds(60), count, async || self.in_status(status).await).await;
    }

    /// The number of requests in a status.
    pub async fn in_status(&self, status: &str) -> i64 {
        self.one("SELECT count(*) FROM lethe.requests WHERE status = $1", &[&status]).await
    }

    /// The one clock.
    pub async fn now(&self) -> Timestamp {
        self.one("SELECT lethe.now()", &[]).await
    }

    /// Sets the one clock; it goes on from there. What was written before must not count as what came later: so tests
    /// live in a future that stays one for long.
    pub async fn set_clock(&self, instant: Timestamp) {
        let session = self.db.session().await.unwrap();
        let sql = "UPDATE lethe.clock SET shift = $1 - clock_timestamp()";
        session.raw().execute(sql, &[&instant]).await.unwrap();
    }

    /// When the batch of a request closes and when it runs.
    pub async fn slot_of(&self, id: &str) -> (Timestamp, Timestamp) {
        let sql = "SELECT b.tick_at, b.runs_at FROM lethe.requests JOIN lethe.batches b USING (batch_id)
                    WHERE subject_request_id::text = $1";
        let session = self.db.session().await.unwrap();
        let row = session.raw().query_one(sql, &[&id]).await.unwrap();
        (row.get(0), row.get(1))
    }

    /// Messages of a queue that are ready.
    pub async fn messages(&self, queue: &str) -> u64 {
        self.queue_state(queue).await.ready.into()
    }

    /// What the broker tells of a queue, as soon as there is one.
    pub async fn queue_state(&self, queue: &str) -> QueueState {
        // The management API's own figures lag behind; a passive declaration does not.
        let broker = lethe_broker::Broker::new(&self.amqp_url, "lethe-testing").unwrap();
        let publisher = lethe_broker::Publisher::new(broker);
        let tells = async || publisher.queue_state(queue).await.ok();
        eventually_some("RabbitMQ tells of a queue", seconds(10), tells).await
    }

    /// Takes up to `count` messages out of a queue, as the management API shows them.
    pub async fn take_messages(&self, queue: &str, count: u32) -> Vec<Value> {
        let body = json!({"count": count, "ackmode": "ack_requeue_false", "encoding": "auto"});
        let path = format!("/queues/{}/{queue}/get", self.name);
        let messages = self.management.call(Method::POST, &path, Some(body)).await;
        messages.and_then(|list| list.as_array().cloned()).unwrap_or_default()
    }

    /// Empties a queue.
    pub async fn purge(&self, queue: &str) {
        self.management.call(Method::DELETE, &format!("/queues/{}/{queue}/contents", self.name), None).await;
    }

    /// Closes every AMQP connection of this world, as an operator would.
    pub async fn close_connections(&self) -> usize {
        let list = self.management.call(Method::GET, &format!("/vhosts/{}/connections", self.name), None).await;
        let list = list.and_then(|list| list.as_array().cloned()).unwrap_or_default();
        for connection in &list {
            let name = connection["name"].as_str().unwrap().replace(' ', "%20").replace('>', "%3E");
            self.management.call(Method::DELETE, &format!("/connections/{name}"), None).await;
        }
        list.len()
    }
}

impl Drop for World {
    /// On a thread of its own: the runtime of the test is busy dropping us.
    fn drop(&mut self) {
        let (name, management, folder) = (self.name.clone(), Management::new(), self.folder.clone());
        let removal = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _ = std::fs::remove_dir_all(folder);
            // Apart, so that one that fails does not leave the other behind.
            let database = name.clone();
            let dropped = runtime.spawn(async move { servers::drop_database(&database).await });
            let deleted = runtime.spawn(async move { management.delete_vhost(&name).await });
            runtime.block_on(async { futures_util::join!(dropped, deleted) })
        });
        let _ = removal.join();
    }
}
