//! Controllers: who may hand requests over, and how.

use argon2::Argon2;
use argon2::password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use tokio_postgres::Row;

use super::pool::{Column, Session};
use super::{Db, DbError, statements};
use lethe_domain::crypto;
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;

statements! {
    BY_ID = "
        SELECT controller_id, amqp_user, any_amqp_user, signature_algorithm, include_profile, created_at
          FROM lethe.controllers WHERE controller_id = ANY ($1)";
    LIST = "
        SELECT controller_id, amqp_user, any_amqp_user, signature_algorithm, include_profile, created_at
          FROM lethe.controllers ORDER BY controller_id";
    ADD = "
        INSERT INTO lethe.controllers
            (controller_id, amqp_user, any_amqp_user, api_key, api_secret_hash, signature_algorithm, include_profile)
        VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (controller_id) DO NOTHING";
    CREATE_PARTITIONS = "SELECT lethe.create_partitions($1)";
    ROTATE_SECRET = "
        UPDATE lethe.controllers SET api_secret_hash = $2 WHERE controller_id = $1 RETURNING api_key";
    FIND_API_KEY = "SELECT controller_id, api_secret_hash, signature_algorithm FROM lethe.find_api_key($1)";
}

/// A controller as the workers see it.
#[derive(Clone, Debug)]
pub struct Controller {
    /// Its id.
    pub controller_id: ControllerId,
    /// The AMQP user that must publish its messages.
    pub amqp_user: Option<String>,
    /// Whether any AMQP user may publish for it.
    pub any_amqp_user: bool,
    /// How bodies for it are signed.
    pub algorithm: SignatureAlgorithm,
    /// Whether portability files hold `profile.jsonl`.
    pub include_profile: bool,
    /// When it was added.
    pub created_at: Timestamp,
}

/// A controller to be added.
#[derive(Clone, Debug)]
pub struct NewController {
    /// Its id.
    pub controller_id: ControllerId,
    /// The AMQP user that must publish its messages.
    pub amqp_user: Option<String>,
    /// Whether any AMQP user may publish for it.
    pub any_amqp_user: bool,
    /// How bodies for it are signed.
    pub algorithm: SignatureAlgorithm,
    /// Whether portability files hold `profile.jsonl`.
    pub include_profile: bool,
}

/// What the gateway's callers authenticate with. Shown once, stored as a hash.
#[derive(Debug)]
pub struct Credentials {
    /// The user name of Basic authentication.
    pub api_key: String,
    /// The password of Basic authentication.
    pub api_secret: String,
}

fn read(row: &Row) -> Result<Controller, DbError> {
    let id = row.get::<_, &str>("controller_id").parse();
    Ok(Controller {
        controller_id: id.map_err(|_| DbError::Unexpected { place: "controllers.controller_id" })?,
        amqp_user: row.get("amqp_user"),
        any_amqp_user: row.get("any_amqp_user"),
        algorithm: row.column("signature_algorithm")?,
        include_profile: row.get("include_profile"),
        created_at: row.get("created_at"),
    })
}

fn random_token() -> Result<String, DbError> {
    Ok(URL_SAFE_NO_PAD.encode(crypto::random::<24>()?))
}

fn hash(secret: &str) -> Result<String, DbError> {
    let hash = Argon2::default().hash_password(secret.as_bytes());
    Ok(hash.map_err(|_| DbError::Crypto(crypto::CryptoError::Random))?.to_string())
}

/// Those of the given controllers that exist.
///
/// # Errors
/// [`DbError`].
pub async fn by_id(session: &Session, ids: &[&str]) -> Result<Vec<Controller>, DbError> {
    session.query(BY_ID, &[&ids]).await?.iter().map(read).collect()
}

/// All controllers, by id.
///
/// # Errors
/// [`DbError`].
pub async fn list(session: &Session) -> Result<Vec<Controller>, DbError> {
    session.query(LIST, &[]).await?.iter().map(read).collect()
}

/// Adds a controller and its partitions of the subject data; `None` where the id is taken.
///
/// # Errors
/// [`DbError`].
pub async fn add(db: &Db, new: &NewController) -> Result<Option<Credentials>, DbError> {
    let credentials = Credentials { api_key: random_token()?, api_secret: random_token()? };
    let secret_hash = hash(&credentials.api_secret)?;
    let algorithm = new.algorithm;
    let tx = db.begin("add_controller").await?;
    let added = tx
        .execute(
            ADD,
            &[
                &new.controller_id,
                &new.amqp_user,
                &new.any_amqp_user,
                &credentials.api_key,
                &secret_hash,
                &algorithm,
                &new.include_profile,
            ],
        )
        .await?;
    if added == 0 {
        tx.rollback().await;
        return Ok(None);
    }
    tx.query(CREATE_PARTITIONS, &[&new.controller_id]).await?;
    tx.commit().await?;
    Ok(Some(credentials))
}

/// Gives a controller a new secret; the old one ends as soon as no gateway remembers it. `None` where there is no such controller.
///
/// # Errors
/// [`DbError`].
pub async fn rotate_secret(session: &Session, id: &ControllerId) -> Result<Option<Credentials>, DbError> {
    let api_secret = random_token()?;
    let secret_hash = hash(&api_secret)?;
    let row = session.query_opt(ROTATE_SECRET, &[id, &secret_hash]).await?;
    Ok(row.map(|row| Credentials { api_key: row.get("api_key"), api_secret }))
}

/// A controller as the gateway finds it by its API key.
#[derive(Clone, Debug)]
pub struct KeyHolder {
    /// Its id.
    pub controller_id: ControllerId,
    /// What its secret is verified against.
    pub api_secret_hash: String,
    /// How answers to it are signed.
    pub algorithm: SignatureAlgorithm,
}

/// The controller that an API key belongs to.
///
/// # Errors
/// [`DbError`].
pub async fn by_api_key(session: &Session, api_key: &str) -> Result<Option<KeyHolder>, DbError> {
    let Some(row) = session.query_opt(FIND_API_KEY, &[&api_key]).await? else { return Ok(None) };
    let id = row.get::<_, &str>("controller_id").parse();
    Ok(Some(KeyHolder {
        controller_id: id.map_err(|_| DbError::Unexpected { place: "controllers.controller_id" })?,
        api_secret_hash: row.get("api_secret_hash"),
        algorithm: row.column("signature_algorithm")?,
    }))
}

/// Whether a secret is the one of the hash. Some 20 ms of CPU: not for an async thread.
#[must_use]
pub fn is_secret(secret: &str, hash: &str) -> bool {
    PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(secret.as_bytes(), &hash).is_ok())
}

/// A hash that no secret has, to be verified against where there is no controller: the answer takes as long.
///
/// # Errors
/// [`DbError::Crypto`] where there is no randomness.
pub fn nobodys_hash() -> Result<String, DbError> {
    hash(&random_token()?)
}
