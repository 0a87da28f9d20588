//! Basic authentication with the API key and secret of a controller (contract 9).

use std::time::Duration;

use aws_lc_rs::hmac;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe_db::controllers::{self, KeyHolder};
use lethe_db::{Db, DbError};
use lethe_domain::crypto;
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use moka::future::Cache;
use tokio::sync::Semaphore;

use crate::refusal::Refusal;

/// How long a verified pair is remembered, so that hashing does not bound what one controller can do. A rotated secret
/// still works for that long, too.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(30);
const REMEMBERED_AT_MOST: u64 = 10_000;

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) controller_id: ControllerId,
    pub(crate) algorithm: SignatureAlgorithm,
}

/// Who has been verified lately, by keyed digest of key and secret.
pub(crate) struct Callers {
    db: Db,
    verified: Cache<Vec<u8>, Caller>,
    /// Of this process alone.
    digest_key: hmac::Key,
    nobodys_hash: String,
    /// Credentials that are being verified, or wait for it.
    verifying: Semaphore,
    /// Hashing is meant to be expensive: at most as many hashes at once as there are cores.
    hashing: Semaphore,
    /// The part of that for keys that do not exist.
    pretending: Semaphore,
}

impl Callers {
    /// Where `calls` may be under way, an eighth of them may be verifying credentials.
    pub(crate) fn new(db: Db, calls: usize) -> Result<Self, DbError> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            db,
            verified: Cache::builder().max_capacity(REMEMBERED_AT_MOST).time_to_live(REMEMBERED).build(),
            digest_key: hmac::Key::new(hmac::HMAC_SHA256, &crypto::random::<32>()?),
            nobodys_hash: controllers::nobodys_hash()?,
            verifying: Semaphore::new((calls / 8).max(2)),
            hashing: Semaphore::new(cores),
            pretending: Semaphore::new(1),
        })
    }

    /// The controller that these credentials belong to. `may_log_in` is asked only where they have to be verified.
    pub(crate) async fn find(
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
        // Whoever waits here holds the place of a call. Only a few may, so that callers who are already verified keep
        // places for themselves.
        let busy = |_| Refusal::later("this server is verifying as many credentials as it allows; try again");
        let _waiting = self.verifying.try_acquire().map_err(busy)?;
        let holder = controllers::by_api_key(&self.db.session().await?, &credentials.api_key).await?;
        // A key that does not exist costs as much time as one that does, so that nobody can tell them apart. Many such
        // calls must not keep the others from the cores, though: then all but one are refused at once.
        let pretending = match &holder {
            Some(_) => None,
            None => match self.pretending.try_acquire() {
                Ok(place) => Some(place),
                Err(_) => return Ok(None),
            },
        };
        let hash = holder.as_ref().map_or_else(|| self.nobodys_hash.clone(), |holder| holder.api_secret_hash.clone());
        let secret = credentials.api_secret.clone();
        let place = self.hashing.acquire().await;
        let is_secret = tokio::task::spawn_blocking(move || controllers::is_secret(&secret, &hash)).await;
        drop((place, pretending));
        let known = |KeyHolder { controller_id, algorithm, .. }| Caller { controller_id, algorithm };
        Ok(holder.filter(|_| is_secret.unwrap_or(false)).map(known))
    }
}

/// The key and the secret that a call carries.
pub(crate) struct Credentials {
    api_key: String,
    api_secret: String,
}

impl Credentials {
    pub(crate) fn of(parts: &Parts) -> Option<Self> {
        let (scheme, encoded) = parts.headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (api_key, api_secret) = text.split_once(':')?;
        // PostgreSQL cannot store text with a NUL in it, so no key has one.
        (!api_key.contains('\0')).then(|| Self { api_key: api_key.to_owned(), api_secret: api_secret.to_owned() })
    }

    /// The length keeps key and secret apart.
    fn digest_input(&self) -> Vec<u8> {
        let length = self.api_key.len().to_be_bytes();
        [length.as_slice(), self.api_key.as_bytes(), self.api_secret.as_bytes()].concat()
    }
}
