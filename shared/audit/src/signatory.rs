//! Who signs the trail and the certificates, and whose signatures are accepted.

use std::path::{Path, PathBuf};

use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use lethe_domain::crypto;
use lethe_signing::Processor;

/// A certificate that is to be trusted cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the certificate {path} cannot be read as an X.509 PEM chain ({reason})")]
pub struct TrustError {
    /// The file, or what else it comes from.
    pub path: String,
    /// What the parser said.
    pub reason: String,
}

/// The certificates whose signatures are accepted: the current one, and those from before a change of keys.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Public keys as in the certificates, and the SHA-256 of these.
    keys: Vec<(Vec<u8>, String)>,
}

impl Trust {
    /// Trusts the first certificate of each of these PEM files.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn read<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> Result<Self, TrustError> {
        let mut trust = Self::default();
        for file in files {
            trust.add(&file.display().to_string(), &read(file)?)?;
        }
        Ok(trust)
    }

    /// Trusts the first certificate of a PEM chain; `name` is for the error.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn add(&mut self, name: &str, chain: &str) -> Result<(), TrustError> {
        let unreadable = |reason: String| TrustError { path: name.to_owned(), reason };
        let der = CertificateDer::from_pem_slice(chain.as_bytes()).map_err(|error| unreadable(error.to_string()))?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| unreadable(error.to_string()))?;
        let key = certificate.public_key().subject_public_key.data.to_vec();
        self.keys.push((key, crypto::hex(&crypto::sha256(&der))));
        Ok(())
    }

    /// The SHA-256 of each certificate, hexadecimal.
    pub(crate) fn fingerprints(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(_, fingerprint)| fingerprint.as_str())
    }

    /// Whether one of them has signed exactly these bytes: RSA PKCS#1 v1.5 with SHA-256, base64.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let Ok(signature) = STANDARD.decode(signature) else { return false };
        self.keys.iter().any(|(key, _)| {
            UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key).verify(message, &signature).is_ok()
        })
    }
}

fn read(path: &Path) -> Result<String, TrustError> {
    std::fs::read_to_string(path)
        .map_err(|error| TrustError { path: path.display().to_string(), reason: error.to_string() })
}

/// The processor as it signs the trail and the certificates.
#[derive(Clone, Debug)]
pub struct Signatory {
    /// Signs.
    pub processor: Processor,
    /// All of its certificates, and those that signed before them.
    pub trust: Trust,
}

impl Signatory {
    /// `processor` with its certificates; `former` are certificates that signed before.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn new(processor: Processor, former: &[PathBuf]) -> Result<Self, TrustError> {
        let mut trust = Trust::read(former)?;
        for certificate in processor.signer.certificates() {
            trust.add(&processor.domain, &certificate.chain)?;
        }
        Ok(Self { processor, trust })
    }
}
