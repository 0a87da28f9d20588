//! The servers that tests run against, and each test's own corner of them.

use std::sync::OnceLock;

use aws_lc_rs::digest;
use lethe_db::Db;
use reqwest::Method;
use serde_json::{Value, json};
use url::Url;

use crate::wait::{patiently, seconds};

/// A variable that `.local/env` sets.
pub fn setting(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run `make test`, or `make servers` and `. .local/env`"))
}

fn with_database(database: &str) -> String {
    let mut url: Url = setting("DATABASE_URL").parse().expect("DATABASE_URL is a URL");
    url.set_path(database);
    url.to_string()
}

fn administrator() -> Db {
    Db::new(&setting("DATABASE_URL"), 1, "lethe-testing").expect("DATABASE_URL can be used")
}

/// The hash of all migrations: a template made by others is not ours.
fn migrations_hash() -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/db/schema/migrations");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut context = digest::Context::new(&digest::SHA256);
    for file in files {
        context.update(file.file_name().unwrap().as_encoded_bytes());
        context.update(&std::fs::read(&file).unwrap());
    }
    lethe_domain::crypto::hex(&context.finish().as_ref()[..6])
}

/// Serialises the making of the template over all test processes.
const TEMPLATE_LOCK: &str = "SELECT pg_advisory_lock(5499812999)";
const TEMPLATE_UNLOCK: &str = "SELECT pg_advisory_unlock(5499812999)";

/// Makes the migrated template once; under another name first, so that what is there is whole.
async fn template() -> String {
    let name = format!("lethe_template_{}", migrations_hash());
    let db = administrator();
    let session = db.session().await.expect("PostgreSQL answers");
    session.batch_execute(TEMPLATE_LOCK).await.unwrap();
    let exists = session.raw().query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&name]).await.unwrap();
    if exists.is_none() {
        let draft = format!("{name}_draft");
        session.batch_execute(&format!("DROP DATABASE IF EXISTS {draft} WITH (FORCE)")).await.unwrap();
        session.batch_execute(&format!("CREATE DATABASE {draft}")).await.unwrap();
        migrate(&with_database(&draft)).await;
        // The closed session may live on for an instant; a template must have none.
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
        session.raw().query(others, &[&draft]).await.unwrap();
        session.batch_execute(&format!("ALTER DATABASE {draft} RENAME TO {name}")).await.unwrap();
    }
    session.batch_execute(TEMPLATE_UNLOCK).await.unwrap();
    name
}

async fn migrate(url: &str) {
    let db = Db::new(url, 1, "lethe-testing").unwrap();
    lethe_db::migrate::migrate(&db).await.expect("the migrations run");
}

/// Makes a migrated database; returns its URL.
pub async fn create_database(name: &str) -> String {
    static TEMPLATE: tokio::sync::OnceCell<String> = tokio::sync::OnceCell::const_new();
    let template = TEMPLATE.get_or_init(template).await;
    let db = administrator();
    let session = db.session().await.expect("PostgreSQL answers");
    session.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template}")).await.unwrap();
    with_database(name)
}

/// Makes an empty database; returns its URL.
pub async fn create_empty_database(name: &str) -> String {
    let db = administrator();
    db.session().await.expect("PostgreSQL answers").batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    with_database(name)
}

/// Drops it, whoever is connected.
pub async fn drop_database(name: &str) {
    let drop = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    administrator().session().await.unwrap().batch_execute(&drop).await.unwrap();
}

/// The management API of RabbitMQ.
#[derive(Clone, Debug)]
pub struct Management {
    base: Url,
    client: reqwest::Client,
}

impl Management {
    /// Of the server that tests run against.
    pub fn new() -> Self {
        let base = setting("RABBITMQ_MANAGEMENT_URL").parse().expect("RABBITMQ_MANAGEMENT_URL is a URL");
        Self { base, client: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    /// The AMQP user, which is the one of the management API as well.
    pub fn user(&self) -> String {
        let url: Url = setting("AMQP_URL").parse().expect("AMQP_URL is a URL");
        url.username().to_owned()
    }

    /// Sends a request below `/api`; `None` for 404.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Option<Value> {
        let answer = self.try_call(method, path, body).await.expect("the management API of RabbitMQ answers");
        let (status, text) = answer;
        assert!(status.is_success() || status.as_u16() == 404, "{path}: {status} {text}");
        status.is_success().then(|| serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Sends a request below `/api` to a server that may be away.
    ///
    /// # Errors
    /// Where it does not answer.
    pub async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> reqwest::Result<(reqwest::StatusCode, String)> {
        let mut url = self.base.clone();
        let (user, password) = (url.username().to_owned(), url.password().unwrap_or_default().to_owned());
        url.set_username("").unwrap();
        url.set_password(None).unwrap();
        let url = format!("{}/api{path}", url.as_str().trim_end_matches('/'));
        let mut request = self.client.request(method, url).basic_auth(user, Some(password));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let answer = request.timeout(patiently(seconds(20))).send().await?;
        Ok((answer.status(), answer.text().await?))
    }

    /// Makes a virtual host that our user may use; returns its AMQP URL.
    pub async fn create_vhost(&self, name: &str) -> String {
        self.call(Method::PUT, &format!("/vhosts/{name}"), Some(json!({}))).await;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        self.call(Method::PUT, &format!("/permissions/{name}/{}", self.user()), Some(all)).await;
        let mut url: Url = setting("AMQP_URL").parse().expect("AMQP_URL is a URL");
        url.set_path(name);
        url.to_string()
    }

    /// Removes it and everything in it.
    pub async fn delete_vhost(&self, name: &str) {
        self.call(Method::DELETE, &format!("/vhosts/{name}"), None).await;
    }
}

impl Default for Management {
    fn default() -> Self {
        Self::new()
    }
}

/// A short name that nobody else has.
pub fn unique_name() -> String {
    static RUN: OnceLock<String> = OnceLock::new();
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    let run = RUN.get_or_init(|| uuid::Uuid::new_v4().simple().to_string()[..8].to_owned());
    format!("lethe_test_{run}_{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}
