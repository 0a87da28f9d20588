//! Signatures over bodies (contract 6): RSA PKCS#1 v1.5 with SHA-256 as OpenDSR prescribes; RSA-PSS or ECDSA P-256
//! for a controller that is set so.

use std::path::Path;
use std::str::FromStr;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::request::status::names;

/// How the bodies for a controller are signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// RSA PKCS#1 v1.5 with SHA-256: OpenDSR's own.
    RsaPkcs1v15,
    /// RSA-PSS with SHA-256.
    RsaPss,
    /// ECDSA P-256 with SHA-256; the certificate is at `/opendsr_cert_ec.pem`.
    EcdsaP256,
}
names!(Algorithm, "signature algorithm", RsaPkcs1v15 = "rsa-pkcs1v15", RsaPss = "rsa-pss", EcdsaP256 = "ecdsa-p256");

/// Why a key or certificate cannot be used. The message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The key file is missing, unreadable, or no PKCS#8 PEM.
    #[error("the signing key {path} cannot be read as PKCS#8 PEM ({reason}); make one with `openssl genpkey`")]
    Key {
        /// The file.
        path: String,
        /// What the parser said.
        reason: String,
    },
    /// The certificate file is missing, unreadable, or no PEM chain.
    #[error("the signing certificate {path} cannot be read as an X.509 PEM chain ({reason})")]
    Certificate {
        /// The file.
        path: String,
        /// What the parser said.
        reason: String,
    },
    /// The certificate belongs to another key.
    #[error("the signing certificate {path} does not belong to the signing key")]
    Mismatch {
        /// The certificate's file.
        path: String,
    },
    /// The certificate does not name the processor's domain.
    #[error("the signing certificate {path} does not name the processor domain {domain}; it names {names}")]
    Domain {
        /// The certificate's file.
        path: String,
        /// `LETHE_PROCESSOR_DOMAIN`.
        domain: String,
        /// The names in the certificate.
        names: String,
    },
    /// A controller wants ECDSA and there is no such key.
    #[error("no P-256 key is configured; set LETHE_SIGNING_EC_KEY_FILE and LETHE_SIGNING_EC_CERT_FILE")]
    NoEcKey,
    /// The library refused to sign.
    #[error("signing failed")]
    Failed,
}

/// The keys that sign, checked against their certificates.
#[derive(Debug)]
pub struct Signer {
    rsa: RsaKeyPair,
    ec: Option<EcdsaKeyPair>,
    certificate: CertificateFacts,
    random: SystemRandom,
}

/// What an operator wants to know of the signing certificate.
#[derive(Clone, Debug)]
pub struct CertificateFacts {
    /// Common name and subject alternative names.
    pub names: Vec<String>,
    /// Seconds since 1970 after which receivers refuse it.
    pub not_after: i64,
}

impl Signer {
    /// Reads the RSA key and its certificate, and checks that the certificate belongs to the key.
    ///
    /// # Errors
    /// [`SigningError`].
    pub fn load(key: &Path, certificate: &Path) -> Result<Self, SigningError> {
        let pkcs8 = read_key(key)?;
        let rsa = RsaKeyPair::from_pkcs8(pkcs8.secret_pkcs8_der())
            .map_err(|error| SigningError::Key { path: key.display().to_string(), reason: error.to_string() })?;
        let certificate = read_certificate(certificate, rsa.public_key().as_ref())?;
        Ok(Self { rsa, ec: None, certificate, random: SystemRandom::new() })
    }

    /// Adds a P-256 key for the controllers that are set so.
    ///
    /// # Errors
    /// [`SigningError`].
    pub fn with_ec(mut self, key: &Path, certificate: &Path) -> Result<Self, SigningError> {
        let pkcs8 = read_key(key)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.secret_pkcs8_der())
            .map_err(|error| SigningError::Key { path: key.display().to_string(), reason: error.to_string() })?;
        read_certificate(certificate, pair.public_key().as_ref())?;
        self.ec = Some(pair);
        Ok(self)
    }

    /// What the certificate says.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateFacts {
        &self.certificate
    }

    /// The signature over exactly these bytes, base64 in one line. About half a millisecond of CPU with RSA-2048:
    /// not for an async thread.
    ///
    /// # Errors
    /// [`SigningError::NoEcKey`], [`SigningError::Failed`].
    pub fn sign(&self, algorithm: Algorithm, body: &[u8]) -> Result<String, SigningError> {
        let failed = |_| SigningError::Failed;
        let rsa = |padding| {
            let mut signature = vec![0; self.rsa.public_modulus_len()];
            self.rsa.sign(padding, &self.random, body, &mut signature).map_err(failed)?;
            Ok(STANDARD.encode(signature))
        };
        match algorithm {
            Algorithm::RsaPkcs1v15 => rsa(&RSA_PKCS1_SHA256),
            Algorithm::RsaPss => rsa(&RSA_PSS_SHA256),
            Algorithm::EcdsaP256 => {
                let pair = self.ec.as_ref().ok_or(SigningError::NoEcKey)?;
                Ok(STANDARD.encode(pair.sign(&self.random, body).map_err(failed)?))
            }
        }
    }
}

fn read_key(path: &Path) -> Result<PrivatePkcs8KeyDer<'static>, SigningError> {
    PrivatePkcs8KeyDer::from_pem_file(path)
        .map_err(|error| SigningError::Key { path: path.display().to_string(), reason: error.to_string() })
}

fn read_certificate(path: &Path, public_key: &[u8]) -> Result<CertificateFacts, SigningError> {
    let unreadable = |reason: String| SigningError::Certificate { path: path.display().to_string(), reason };
    let der = CertificateDer::from_pem_file(path).map_err(|error| unreadable(error.to_string()))?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| unreadable(error.to_string()))?;
    if certificate.public_key().subject_public_key.data.as_ref() != public_key {
        return Err(SigningError::Mismatch { path: path.display().to_string() });
    }
    let mut names: Vec<String> = certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok())
        .map(str::to_ascii_lowercase)
        .collect();
    if let Ok(Some(extension)) = certificate.subject_alternative_name() {
        names.extend(extension.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        }));
    }
    names.dedup();
    Ok(CertificateFacts { names, not_after: certificate.validity().not_after.timestamp() })
}

impl CertificateFacts {
    /// Whether the certificate names `domain`, directly or by a wildcard for its first label.
    #[must_use]
    pub fn covers(&self, domain: &str) -> bool {
        let domain = domain.to_ascii_lowercase();
        let wildcard = domain.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        self.names.iter().any(|name| *name == domain || Some(name) == wildcard.as_ref())
    }
}

/// The algorithm that the database holds for a controller; OpenDSR's own where the text is unknown to this version.
#[must_use]
pub fn algorithm_named(text: &str) -> Algorithm {
    Algorithm::from_str(text).unwrap_or(Algorithm::RsaPkcs1v15)
}

/// Signs many bodies off the async threads, on as many threads as there are cores. In order; a refusal of the library
/// is an error of that body alone.
pub async fn sign_all(
    signer: std::sync::Arc<Signer>,
    bodies: Vec<(Algorithm, Vec<u8>)>,
) -> Vec<Result<String, SigningError>> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = bodies.len().div_ceil(threads).max(1);
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
