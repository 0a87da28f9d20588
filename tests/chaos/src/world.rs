//! A world that can be harmed: the tests' world (database, virtual host, folders), proxies on the way to its servers, a
//! result store that can be full, and the hurdles that one controller lays for the others.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lethe_broker::topology::{self, Queue};
use lethe_testing::proxy::{Proxy, Way};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::plan::{Hurdle, POISON_TIME, Plan};

/// Which pair of proxies a worker goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// One half of the fleet.
    First,
    /// The other.
    Second,
}

/// How the disk of the result store is made full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// It is a small file system of its own.
    Small,
    /// None could be mounted: the folder is replaced by a file for a while, which fails otherwise than a full disk.
    Replaced,
}

/// The world.
pub struct World {
    /// Database, virtual host, folders, keys.
    pub tests: lethe_testing::World,
    /// Where the result store lies.
    pub disk: Disk,
    /// The script that restarts the servers; `None` where others use them too.
    pub servers: Option<PathBuf>,
    /// To PostgreSQL by the first and the second route, then to RabbitMQ.
    pub proxies: [Proxy; 4],
}

/// How long the checker and the harness wait for a server that was harmed.
const PATIENCE: Duration = Duration::from_mins(1);

impl World {
    /// Makes one; `servers` where the servers are ours alone.
    pub async fn new(servers: Option<PathBuf>) -> Self {
        let tests = lethe_testing::World::new().await;
        let disk = mount(&tests.folder.join("results")).await;
        let proxies = [
            Proxy::start(&tests.database_url, Way::Open).await,
            Proxy::start(&tests.database_url, Way::Open).await,
            Proxy::start(&tests.amqp_url, Way::Open).await,
            Proxy::start(&tests.amqp_url, Way::Open).await,
        ];
        Self { tests, disk, servers, proxies }
    }

    /// The URLs of both servers by a route.
    pub fn through(&self, route: Route) -> (String, String) {
        let number = usize::from(route == Route::Second);
        (self.proxies[number].through(&self.tests.database_url), self.proxies[2 + number].through(&self.tests.amqp_url))
    }

    /// Imports the people, adds the controllers, and lays the hurdles.
    pub async fn furnish(&self, plan: &Plan) {
        for (number, controller) in crate::people::CONTROLLERS.iter().enumerate() {
            let id = self.tests.controller(controller).await;
            let theirs = plan.people.iter().filter(|person| person.controller == number);
            let profiles: Vec<String> = theirs.clone().map(crate::people::Person::profile).collect();
            let batches: Vec<String> = theirs.flat_map(crate::people::Person::event_batches).collect();
            for lines in profiles.chunks(2_000) {
                self.tests.profiles(&id, lines).await;
            }
            for lines in batches.chunks(2_000) {
                self.tests.event_batches(&id, lines).await;
            }
        }
        let failing: Vec<String> = plan
            .cases
            .iter()
            .filter(|case| case.hurdle == Some(Hurdle::FailingStore))
            .flat_map(|case| case.matches.iter().map(|person| plan.people[*person].mpid.to_string()))
            .collect();
        let failing = if failing.is_empty() { "NULL".to_owned() } else { failing.join(",") };
        let sql = format!(
            "CREATE SCHEMA chaos;
             CREATE TABLE chaos.marks (mark uuid);
             CREATE FUNCTION chaos.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN RAISE EXCEPTION 'refused by the fault suite' USING ERRCODE = TG_ARGV[0]; END $$;
             CREATE TRIGGER poison BEFORE INSERT ON lethe.requests FOR EACH ROW
               WHEN (NEW.submitted_time = '{POISON_TIME}') EXECUTE FUNCTION chaos.refuse('22000');
             CREATE TRIGGER failing_store BEFORE DELETE ON subject_data.profiles FOR EACH ROW
               WHEN (OLD.mpid IN ({failing})) EXECUTE FUNCTION chaos.refuse('58030')"
        );
        self.tests.run(&sql).await;
    }

    /// Plants a defect: the trail leaves one request out of each set of several completions.
    pub async fn leave_out_of_the_trail(&self) {
        let sql = "
            CREATE FUNCTION chaos.forget() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                NEW.requests := (SELECT json_agg(line ORDER BY place)
                                   FROM json_array_elements(NEW.requests) WITH ORDINALITY AS q (line, place) WHERE place > 1);
                RETURN NEW;
            END $$;
            CREATE TRIGGER forgetful BEFORE INSERT ON lethe.audit_entries FOR EACH ROW
              WHEN (NEW.event = 'requests.completed' AND json_array_length(NEW.requests) > 1) EXECUTE FUNCTION chaos.forget()";
        self.tests.run(sql).await;
    }

    /// Plants `open_weeks_dropped`: the database lets a week go whatever is in it.
    pub async fn let_weeks_go(&self) {
        let sql = "
            DO $$
            BEGIN
                EXECUTE replace(pg_get_functiondef('lethe.drop_week(bigint, interval)'::regprocedure),
                                'r.status IN (''pending'', ''in_progress'')', 'false');
            END $$";
        self.tests.run(sql).await;
    }

    /// The failing store works again.
    pub async fn mend_store(&self) {
        self.patiently("ALTER TABLE subject_data.profiles DISABLE TRIGGER failing_store", &[]).await;
    }

    /// What the operator's command line prints; asks until it can.
    pub async fn lethe(&self, arguments: &[&str]) -> String {
        let started = Instant::now();
        loop {
            let ran = lethe_testing::cli::lethe(&self.tests, arguments).await;
            if ran.code == Some(0) {
                return ran.out;
            }
            assert!(started.elapsed() < PATIENCE, "lethe {arguments:?}: {}{}", ran.out, ran.err);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A list of the operator's command line, whole.
    pub async fn list<T: DeserializeOwned>(&self, what: &[&str]) -> Vec<T> {
        let out = self.lethe(&[what, &["--limit", "100000", "--output", "json"]].concat()).await;
        serde_json::from_str(&out).unwrap()
    }

    /// Asks until the database answers.
    pub async fn patiently(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        let started = Instant::now();
        loop {
            match self.attempt(sql, params).await {
                Ok(rows) => return rows,
                Err(error) => assert!(started.elapsed() < PATIENCE, "{sql}: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Asks once.
    ///
    /// # Errors
    /// Where the database does not answer, or refuses.
    pub async fn attempt(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, lethe_db::DbError> {
        let session = self.tests.db.session().await?;
        Ok(session.raw().query(sql, params).await?)
    }

    /// The first column of the first row, as a count.
    pub async fn count(&self, sql: &str) -> i64 {
        self.patiently(sql, &[]).await[0].get(0)
    }

    /// The one clock, where the database answers at once.
    pub async fn clock(&self) -> Option<Timestamp> {
        let now = self.attempt("SELECT lethe.now()", &[]);
        tokio::time::timeout(Duration::from_secs(5), now).await.ok()?.ok().map(|rows| rows[0].get(0))
    }

    /// What a queue holds, as the management API shows it; it stays there. Asks until the broker answers.
    pub async fn messages(&self, queue: &str) -> Vec<Value> {
        self.try_messages(queue).await.unwrap_or_else(|said| panic!("{queue}: {said}"))
    }

    /// The same of a queue of wake-ups, which RabbitMQ may have lost, all but its name, when it was killed. Workers make such a
    /// queue anew; here they have ended.
    pub async fn wake_ups(&self, queue: &str) -> Vec<Value> {
        self.try_messages(queue).await.unwrap_or_else(|said| {
            eprintln!("{queue} was lost by RabbitMQ, and what was in it: {said}");
            vec![]
        })
    }

    async fn try_messages(&self, queue: &str) -> Result<Vec<Value>, String> {
        let body = json!({"count": 100_000, "ackmode": "ack_requeue_true", "encoding": "auto"});
        let path = format!("/queues/{}/{queue}/get", self.tests.name);
        let started = Instant::now();
        loop {
            let said = match self.tests.management.try_call(Method::POST, &path, Some(body.clone())).await {
                Ok((status, text)) if status.is_success() => return Ok(serde_json::from_str(&text).unwrap()),
                Ok((status, _)) if status.as_u16() == 404 => return Ok(vec![]),
                Ok((status, text)) => format!("{status} {text}"),
                Err(error) => error.to_string(),
            };
            if started.elapsed() > PATIENCE {
                return Err(said);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The bodies of the requests that were dead-lettered.
    pub async fn dead_letters(&self) -> Vec<String> {
        self.dead_letters_of(&topology::IDENTITY_MATCHING).await
    }

    /// The bodies of what a queue could not handle.
    pub async fn dead_letters_of(&self, queue: &Queue) -> Vec<String> {
        let messages = self.messages(&topology::dead_letters_of(queue.name)).await;
        messages.iter().map(|message| message["payload"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Lets time pass at once: leases run out, ticks come.
    pub async fn jump(&self, seconds: f64) {
        self.patiently("UPDATE lethe.clock SET shift = shift + make_interval(secs => $1)", &[&seconds]).await;
    }

    /// Runs the script of the local servers.
    pub async fn run_servers(&self, arguments: &[&str]) -> bool {
        let Some(mut command) = self.script(arguments) else { return false };
        command.stdout(Stdio::null()).status().await.is_ok_and(|status| status.success())
    }

    /// Runs the script of the local servers; what it prints.
    pub async fn ask_servers(&self, arguments: &[&str]) -> String {
        let Some(mut command) = self.script(arguments) else { return String::new() };
        command.output().await.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }

    fn script(&self, arguments: &[&str]) -> Option<Command> {
        let mut command = Command::new(self.servers.as_ref()?);
        // What .local/env exports would be taken for servers of somebody else.
        command.args(arguments).env_remove("DATABASE_URL").env_remove("AMQP_URL");
        command.stdin(Stdio::null()).stderr(Stdio::null());
        Some(command)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.disk == Disk::Small {
            let _ = std::process::Command::new("umount").arg("-l").arg(self.tests.folder.join("results")).status();
        }
    }
}

/// Mounts a file system of 24 MiB on the folder of the result store.
async fn mount(folder: &std::path::Path) -> Disk {
    let mut command = Command::new("mount");
    command.args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(folder).stderr(Stdio::null());
    match command.status().await {
        Ok(status) if status.success() => Disk::Small,
        _ => Disk::Replaced,
    }
}
