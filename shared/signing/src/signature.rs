//! Signatures over bodies (contract 6): RSA PKCS#1 v1.5 with SHA-256 as OpenDSR prescribes; RSA-PSS or ECDSA P-256
//! for a controller that is configured for it.

use std::sync::LazyLock;

use jiff::Timestamp;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use tokio::sync::Semaphore;

use super::signing_keys::{Certificate, SigningError, SigningKeys};

/// Signs, with the keys whose turn it is.
///
/// Keys are rotated at a set instant: until then the previous ones sign, from then on the new ones. Receivers keep
/// certificates for a while, so the previous keys remain at hand as long as their certificate is valid.
#[derive(Debug)]
pub struct Signer {
    keys: SigningKeys,
    previous: Option<Previous>,
}

#[derive(Debug)]
struct Previous {
    keys: SigningKeys,
    /// From here on they no longer sign first.
    until: Timestamp,
}

/// Which keys sign: what they have signed may be given again for as long as that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Turn {
    /// The previous ones, until the set instant.
    Previous,
    /// The present ones.
    Present,
}

impl Signer {
    /// Signs with `keys` only.
    #[must_use]
    pub const fn new(keys: SigningKeys) -> Self {
        Self { keys, previous: None }
    }

    /// Signs with `previous` until the given instant.
    #[must_use]
    pub(crate) fn rotating_from(mut self, previous: SigningKeys, until: Timestamp) -> Self {
        self.previous = Some(Previous { keys: previous, until });
        self
    }

    /// The keys that sign first at `now`. A previous set without a P-256 key leaves that one to the new set.
    fn keys_at(&self, now: Timestamp, algorithm: SignatureAlgorithm) -> &SigningKeys {
        match &self.previous {
            Some(previous) if now < previous.until && previous.keys.certificate(algorithm).is_some() => &previous.keys,
            _ => &self.keys,
        }
    }

    /// Whose turn it is to sign.
    #[must_use]
    pub fn turn(&self) -> Turn {
        match &self.previous {
            Some(previous) if Timestamp::now() < previous.until => Turn::Previous,
            _ => Turn::Present,
        }
    }

    /// The certificate that verifies what is signed now; `None` for ECDSA without such a key.
    #[must_use]
    pub fn certificate(&self, algorithm: SignatureAlgorithm) -> Option<&Certificate> {
        self.keys_at(Timestamp::now(), algorithm).certificate(algorithm)
    }

    /// All certificates, those of the previous keys last.
    pub fn certificates(&self) -> impl Iterator<Item = &Certificate> {
        self.keys.certificates().chain(self.previous.iter().flat_map(|previous| previous.keys.certificates()))
    }

    /// The signature over exactly these bytes, base64 in one line. About half a millisecond of CPU with RSA-2048:
    /// not for an async thread.
    ///
    /// # Errors
    /// [`SigningError::NoEcKey`], [`SigningError::Failed`].
    pub fn sign(&self, algorithm: SignatureAlgorithm, body: &[u8]) -> Result<String, SigningError> {
        self.keys_at(Timestamp::now(), algorithm).sign(algorithm, body)
    }

    /// The same with the previous key, for a receiver that still keeps its certificate; `None` before the switch,
    /// without such a key, and once that certificate has expired.
    ///
    /// # Errors
    /// [`SigningError::Failed`].
    #[must_use]
    pub fn sign_with_previous(
        &self,
        algorithm: SignatureAlgorithm,
        body: &[u8],
    ) -> Option<Result<String, SigningError>> {
        let now = Timestamp::now();
        let previous = self.previous.as_ref().filter(|previous| now >= previous.until)?;
        previous.keys.certificate(algorithm).filter(|certificate| now < certificate.not_after)?;
        Some(previous.keys.sign(algorithm, body))
    }
}

/// As many as there are cores: more would only take turns.
static THREADS: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
static SIGNING: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(*THREADS));

/// Signs off the async threads, where `sign` says how; at once no more than there are cores.
///
/// # Errors
/// Those of `sign`; [`SigningError::Failed`] where it panics.
pub async fn off_thread<T: Send + 'static>(
    sign: impl FnOnce() -> Result<T, SigningError> + Send + 'static,
) -> Result<T, SigningError> {
    // Never closed.
    let _permit = SIGNING.acquire().await.map_err(|_| SigningError::Failed)?;
    tokio::task::spawn_blocking(sign).await.map_err(|_| SigningError::Failed)?
}

/// Signs many bodies off the async threads, on as many threads as there are cores. In order; a refusal of the library
/// is an error of that body alone.
pub async fn sign_all(
    signer: std::sync::Arc<Signer>,
    bodies: Vec<(SignatureAlgorithm, Vec<u8>)>,
) -> Vec<Result<String, SigningError>> {
    let share = bodies.len().div_ceil(*THREADS).max(1);
    let mut bodies = bodies.into_iter().peekable();
    let mut shares = Vec::new();
    while bodies.peek().is_some() {
        let mine: Vec<_> = bodies.by_ref().take(share).collect();
        let (signer, count) = (signer.clone(), mine.len());
        let sign = move || mine.iter().map(|(algorithm, body)| signer.sign(*algorithm, body)).collect::<Vec<_>>();
        shares.push((count, tokio::task::spawn_blocking(sign)));
    }
    let mut signatures = Vec::new();
    for (count, share) in shares {
        let failed = |_| (0..count).map(|_| Err(SigningError::Failed)).collect();
        signatures.extend(share.await.unwrap_or_else(failed));
    }
    signatures
}
