//! The demo's own world: a database, a vhost, folders, and worker processes. All of it goes away at the end.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use lethe_db::controllers::{self, Credentials, NewController};
use lethe_db::{Db, migrate};
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_process::settings::secret;
use lethe_runtime::fleet::FLEET;
use tokio::process::{Child, Command};
use url::Url;
use uuid::Uuid;

/// The calendar of seconds, and what goes with it. The waiting period leaves time to cancel.
const SETTINGS: [(&str, &str); 15] = [
    ("LETHE_ERASURE_SCHEDULE", "*/15 * * * * *"),
    ("LETHE_ERASURE_WAITING_PERIOD", "15s"),
    ("LETHE_EXPEDITED_SCHEDULE", "*/5 * * * * *"),
    ("LETHE_ACCESS_SCHEDULE", "*/5 * * * * *"),
    ("LETHE_COMPLETION_MARGIN", "60s"),
    ("LETHE_RESULT_LIFETIME", "1h"),
    ("LETHE_CALLBACK_ALLOW", "127.0.0.0/8,http"),
    ("LETHE_CALLBACK_FIRST_RETRY", "500ms"),
    ("LETHE_CALLBACK_MAX_RETRY", "2s"),
    ("LETHE_CALLBACK_MAX_PROBE", "2s"),
    ("LETHE_REDRIVE_AFTER", "2s"),
    ("LETHE_ADMIN_LISTEN", "127.0.0.1:0"),
    ("LETHE_HTTP_LISTEN", "127.0.0.1:0"),
    // All of the traffic comes from one address, as fast as it can.
    ("LETHE_RATE_PER_ADDRESS", "1000000"),
    ("LETHE_RATE_PER_CONTROLLER", "1000000"),
];

pub(crate) struct World {
    pub(crate) db: Db,
    pub(crate) amqp_url: String,
    pub(crate) certificate: PathBuf,
    pub(crate) controllers: [ControllerId; 2],
    /// Of the controllers, in their order.
    pub(crate) credentials: Vec<Credentials>,
    /// Where the gateways listen.
    pub(crate) gateways: Vec<String>,
    name: String,
    admin: Db,
    management: Url,
    database_url: String,
    folder: PathBuf,
    workers: Vec<(&'static str, Child)>,
}

impl World {
    /// Makes database, vhost and folders, and adds two controllers.
    pub(crate) async fn prepare() -> anyhow::Result<Self> {
        let database_url = secret("DATABASE_URL", "DATABASE_URL_FILE")?;
        let amqp_url = secret("AMQP_URL", "AMQP_URL_FILE")?;
        let management = std::env::var("RABBITMQ_MANAGEMENT_URL").context(
            "RABBITMQ_MANAGEMENT_URL is not set; `make demo` sets it, it makes the demo's own vhost (http://user:password@host:15672)",
        )?;
        let certificate = std::env::var("LETHE_SIGNING_CERT_FILE")
            .context("LETHE_SIGNING_CERT_FILE is not set; `make demo` sets it")?;
        let name = format!("lethe_demo_{}", Uuid::new_v4().simple());
        let folder = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&folder)?;
        let admin = Db::new(&database_url, 1, "demo")?;
        admin
            .session()
            .await?
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .context("the demo makes a database of its own")?;
        let mut own_database = Url::parse(&database_url)?;
        own_database.set_path(&name);
        let mut own_vhost = Url::parse(&amqp_url)?;
        own_vhost.set_path(&name);
        let db = Db::new(own_database.as_str(), 8, "demo")?;
        let mut world = Self {
            db,
            amqp_url: own_vhost.to_string(),
            certificate: certificate.into(),
            controllers: ["acme".parse()?, "globex".parse()?],
            credentials: Vec::new(),
            gateways: Vec::new(),
            name,
            admin,
            management: management.parse()?,
            database_url: own_database.to_string(),
            folder,
            workers: Vec::new(),
        };
        world.make_vhost(own_vhost.username()).await?;
        migrate::migrate(&world.db).await?;
        for controller_id in world.controllers.clone() {
            let new = NewController {
                controller_id,
                amqp_user: None,
                any_amqp_user: true,
                algorithm: SignatureAlgorithm::RsaPkcs1v15,
                include_profile: true,
            };
            let added = controllers::add(&world.db, &new).await?;
            world.credentials.push(added.context("the demo's database is not empty")?);
        }
        Ok(world)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where result files go, and where the keys of their days of expiry lie.
    pub(crate) fn store(&self, name: &str) -> anyhow::Result<Url> {
        Url::from_directory_path(self.folder.join(name))
            .map_err(|()| anyhow::anyhow!("the folder for {name} has no absolute path"))
    }

    async fn management_call(&self, method: reqwest::Method, path: &str, body: String) -> anyhow::Result<()> {
        let mut url = self.management.clone();
        let (user, password) = (url.username().to_owned(), url.password().map(str::to_owned));
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_path(path);
        let client = reqwest::Client::builder().no_proxy().build()?;
        let request = client
            .request(method, url)
            .basic_auth(user, password)
            .header("content-type", "application/json")
            .body(body);
        request.send().await?.error_for_status().context("RabbitMQ's management API refused")?;
        Ok(())
    }

    async fn make_vhost(&self, user: &str) -> anyhow::Result<()> {
        self.management_call(reqwest::Method::PUT, &format!("/api/vhosts/{}", self.name), String::new()).await?;
        let rights = r#"{"configure":".*","write":".*","read":".*"}"#.to_owned();
        self.management_call(reqwest::Method::PUT, &format!("/api/permissions/{}/{user}", self.name), rights).await
    }

    /// Starts `count` of each worker, and waits until all are ready.
    pub(crate) async fn start_workers(&mut self, count: u8) -> anyhow::Result<()> {
        let binaries = std::env::current_exe()?.parent().context("the binary lies nowhere")?.to_owned();
        let run_dir = self.folder.join("run");
        for worker in FLEET.map(|worker| worker.name) {
            for number in 1..=count {
                let log = File::create(self.folder.join(format!("{worker}-{number}.log")))?;
                let child = Command::new(binaries.join(worker))
                    .env("DATABASE_URL", &self.database_url)
                    .env("AMQP_URL", &self.amqp_url)
                    .env("LETHE_RESULT_STORE", self.store("results")?.as_str())
                    .env("LETHE_KEY_STORE", self.store("keys")?.as_str())
                    .env("LETHE_RUN_DIR", &run_dir)
                    .envs(SETTINGS)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(log)
                    .kill_on_drop(true)
                    .spawn()
                    .with_context(|| {
                        format!("{worker} cannot be started; build it with `make demo` or `make build`")
                    })?;
                self.workers.push((worker, child));
            }
        }
        let patience = Instant::now() + Duration::from_secs(30);
        let client = reqwest::Client::builder().no_proxy().build()?;
        for (worker, child) in &mut self.workers {
            let file = run_dir.join(format!("{worker}-{}.addr", child.id().unwrap_or_default()));
            loop {
                if let Some(status) = child.try_wait()? {
                    bail!("{worker} has ended with {status}");
                }
                if let Ok(address) = tokio::fs::read_to_string(&file).await
                    && client
                        .get(format!("http://{address}/readyz"))
                        .send()
                        .await
                        .is_ok_and(|answer| answer.status().is_success())
                {
                    break;
                }
                ensure!(Instant::now() < patience, "{worker} was not ready within 30 s");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            if *worker == "gateway" {
                let file = run_dir.join(format!("gateway-{}.http", child.id().unwrap_or_default()));
                self.gateways.push(format!("http://{}", tokio::fs::read_to_string(&file).await?));
            }
        }
        Ok(())
    }

    /// Tells every worker to stop; each must drain and exit 0.
    pub(crate) async fn stop_workers(&mut self) -> anyhow::Result<()> {
        for (_, child) in &self.workers {
            if let Some(pid) = child.id() {
                Command::new("kill").args(["-TERM", &pid.to_string()]).status().await?;
            }
        }
        for (worker, mut child) in self.workers.drain(..) {
            let status = tokio::time::timeout(Duration::from_secs(40), child.wait()).await;
            let status = status.with_context(|| format!("{worker} did not stop within 40 s"))??;
            ensure!(status.success(), "{worker} ended with {status}");
        }
        Ok(())
    }

    /// Removes everything; keeps the logs unless all went well.
    pub(crate) async fn tear_down(&mut self, all_well: bool) {
        for (_, mut child) in self.workers.drain(..) {
            let _ = child.kill().await;
        }
        let _ =
            self.management_call(reqwest::Method::DELETE, &format!("/api/vhosts/{}", self.name), String::new()).await;
        if let Ok(session) = self.admin.session().await {
            let _ = session.batch_execute(&format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name)).await;
        }
        if all_well {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
