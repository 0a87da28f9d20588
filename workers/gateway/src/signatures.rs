//! Signatures over answers, remembered by what they are over: whoever asks again and again where a request stands is mostly
//! told the same, and an RSA signature costs more than all the rest of such a call.

use std::sync::Arc;

use lethe_domain::crypto::{self, Digest};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature::{self, Signer, Turn};
use lethe_signing::signing_keys::SigningError;
use moka::future::Cache;

/// Signatures that are remembered at most, with some hundred bytes each.
const REMEMBERED: u64 = 20_000;

/// What a signature was made for: by which keys, how, and over which bytes.
type Key = (Turn, SignatureAlgorithm, Digest);

/// Signs answers.
pub(crate) struct Signatures {
    signer: Arc<Signer>,
    known: Cache<Key, Arc<str>>,
}

impl Signatures {
    pub(crate) fn new(signer: Arc<Signer>) -> Self {
        Self { signer, known: Cache::new(REMEMBERED) }
    }

    /// The signature over an answer that nobody will get a second time.
    pub(crate) async fn once(&self, algorithm: SignatureAlgorithm, body: &[u8]) -> Result<Arc<str>, SigningError> {
        let (signer, body) = (self.signer.clone(), body.to_vec());
        signature::off_thread(move || signer.sign(algorithm, &body)).await.map(Arc::from)
    }

    /// The signature over an answer that may be given again: one that was made before, as long as the same keys sign.
    pub(crate) async fn again(&self, algorithm: SignatureAlgorithm, body: &[u8]) -> Result<Arc<str>, SigningError> {
        let key = (self.signer.turn(), algorithm, crypto::sha256(body));
        if let Some(signature) = self.known.get(&key).await {
            metrics::counter!("lethe_http_signatures_total", "remembered" => "true").increment(1);
            return Ok(signature);
        }
        metrics::counter!("lethe_http_signatures_total", "remembered" => "false").increment(1);
        let signature = self.once(algorithm, body).await?;
        // It may have been the turn of others meanwhile.
        if self.signer.turn() == key.0 {
            self.known.insert(key, signature.clone()).await;
        }
        Ok(signature)
    }
}
