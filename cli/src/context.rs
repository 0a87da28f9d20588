//! What commands work with: the database, the broker, the intake. Opened only by the commands that need them.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Args;
use lethe_audit::Signatory;
use lethe_broker::Broker;
use lethe_db::{Db, DbError, installation, migrate};
use lethe_domain::crypto::Keys;
use lethe_domain::request::{ControllerId, SubjectRequestId};
use lethe_process::settings::{ConfigError, secret};
use lethe_signing::SigningOptions;

/// The command was used wrongly; the message says how to use it.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The database, whatever its schema.
pub(crate) fn any_database() -> anyhow::Result<Db> {
    let url = secret("DATABASE_URL", "DATABASE_URL_FILE")?;
    Ok(Db::new(&url, 4, "lethe")?)
}

/// The database with the schema of this release.
pub(crate) async fn database() -> anyhow::Result<Db> {
    let db = any_database()?;
    migrate::check_version(&db).await.context("the database cannot be used; run `lethe doctor` for details")?;
    Ok(db)
}

/// The same, for a command that seals or opens.
pub(crate) async fn database_with(keys: &Keys) -> anyhow::Result<Db> {
    let db = database().await?;
    check_keys(&db, keys).await?;
    Ok(db)
}

/// The master key must be the one that the database is used with.
pub(crate) async fn check_keys(db: &Db, keys: &Keys) -> anyhow::Result<()> {
    match installation::check_master_key(db, keys).await {
        Err(error @ DbError::OtherMasterKey) => bail!(ConfigError::new("LETHE_MASTER_KEY_FILE", error)),
        checked => Ok(checked?),
    }
}

/// The broker.
pub(crate) fn broker() -> anyhow::Result<Broker> {
    Ok(Broker::new(&secret("AMQP_URL", "AMQP_URL_FILE")?, "lethe")?)
}

/// A request, by its controller and its id.
#[derive(Clone, Debug, Args)]
pub(crate) struct Target {
    /// The `subject_request_id`
    #[arg(value_name = "SUBJECT_REQUEST_ID")]
    pub(crate) id: SubjectRequestId,
    /// Whose request it is
    #[arg(long, value_name = "ID")]
    pub(crate) controller: ControllerId,
}

impl Target {
    pub(crate) fn pair(&self) -> (ControllerId, SubjectRequestId) {
        (self.controller.clone(), self.id)
    }
}

/// What it takes to sign certificates.
#[derive(Debug, Args)]
pub(crate) struct SignatoryArgs {
    #[command(flatten)]
    signing: SigningOptions,
}

impl SignatoryArgs {
    /// The same signatory that the workers have.
    pub(crate) fn open(&self) -> anyhow::Result<Arc<Signatory>> {
        let signatory = Signatory::new(self.signing.processor()?, &[]);
        Ok(Arc::new(signatory.map_err(|error| ConfigError::new("LETHE_SIGNING_CERT_FILE", error))?))
    }
}
