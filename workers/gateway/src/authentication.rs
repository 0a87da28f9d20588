//! Basic authentication with the API key and secret of a controller (contract 9).

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe::callback::signature::Algorithm;
use lethe::crypto;
use lethe::db::controllers::{self, KeyHolder};
use lethe::db::{Db, DbError};
use lethe::request::ControllerId;
use moka::future::Cache;
use tokio::sync::Semaphore;

use crate::answers::Refusal;
use crate::routes::{ClientAddress, Gateway};

/// A verified pair is remembered so long, so that hashing does not bound what one controller can do. A secret that was
/// rotated works so long, too.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(30);
const REMEMBERED_AT_MOST: u64 = 10_000;

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) controller_id: ControllerId,
    pub(crate) algorithm: Algorithm,
}

/// Who has been verified lately, by keyed digest of key and secret.
pub(crate) struct Callers {
    db: Db,
    verified: Cache<Vec<u8>, Caller>,
    /// Of this process alone.
    digest_key: hmac::Key,
    nobodys_hash: String,
    /// Hashing is meant to be expensive: as much of it at once as there are cores.
    hashing: Semaphore,
}

impl Callers {
    pub(crate) fn new(db: Db) -> Result<Self, DbError> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            db,
            verified: Cache::builder().max_capacity(REMEMBERED_AT_MOST).time_to_live(REMEMBERED).build(),
            digest_key: hmac::Key::new(hmac::HMAC_SHA256, &crypto::random::<32>()?),
            nobodys_hash: controllers::nobodys_hash()?,
            hashing: Semaphore::new(cores),
        })
    }

    /// The controller that these credentials belong to. `may_log_in` is asked only where they have to be verified.
    async fn find(
        &self,
        credentials: &Credentials,
        domain: &str,
        may_log_in: impl FnOnce() -> Result<(), Refusal> + Send,
    ) -> Result<Caller, Refusal> {
        let digest = hmac::sign(&self.digest_key, &credentials.digest_input()).as_ref().to_vec();
        // Calls that come at the same time with the same credentials wait for one verification.
        let verified = self.verified.try_get_with(digest, async {
            may_log_in()?;
            self.verify(credentials).await?.ok_or_else(|| {
                metrics::counter!("lethe_http_logins_failed_total").increment(1);
                Refusal::unauthorized(domain)
            })
        });
        verified.await.map_err(|refusal| Refusal::clone(&refusal))
    }

    async fn verify(&self, credentials: &Credentials) -> Result<Option<Caller>, Refusal> {
        let holder = controllers::by_api_key(&self.db.session().await?, &credentials.api_key).await?;
        let hash = holder.as_ref().map_or_else(|| self.nobodys_hash.clone(), |holder| holder.api_secret_hash.clone());
        let secret = credentials.api_secret.clone();
        let _place = self.hashing.acquire().await;
        let is_secret = tokio::task::spawn_blocking(move || controllers::is_secret(&secret, &hash)).await;
        let known = |KeyHolder { controller_id, algorithm, .. }| Caller { controller_id, algorithm };
        Ok(holder.filter(|_| is_secret.unwrap_or(false)).map(known))
    }
}

struct Credentials {
    api_key: String,
    api_secret: String,
}

impl Credentials {
    fn of(parts: &Parts) -> Option<Self> {
        let (scheme, encoded) = parts.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (api_key, api_secret) = text.split_once(':')?;
        // PostgreSQL has no text with a NUL in it, and no key has one.
        (!api_key.contains('\0')).then(|| Self { api_key: api_key.to_owned(), api_secret: api_secret.to_owned() })
    }

    /// The length keeps key and secret apart.
    fn digest_input(&self) -> Vec<u8> {
        let length = self.api_key.len().to_be_bytes();
        [length.as_slice(), self.api_key.as_bytes(), self.api_secret.as_bytes()].concat()
    }
}

impl FromRequestParts<Arc<Gateway>> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Refusal> {
        let domain = &gateway.processor.domain;
        let credentials = Credentials::of(parts).ok_or_else(|| Refusal::unauthorized(domain))?;
        let address = parts.extensions.get::<ClientAddress>().copied();
        let may_log_in = || address.map_or(Ok(()), |ClientAddress(address)| gateway.limits.login(address));
        let caller = gateway.callers.find(&credentials, domain, may_log_in).await?;
        gateway.limits.controller(&caller.controller_id)?;
        Ok(caller)
    }
}
