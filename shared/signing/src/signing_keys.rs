//! Keys that sign, and their certificates: read once, checked against each other.

use std::path::Path;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use lethe_domain::signature_algorithm::SignatureAlgorithm;

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
    /// A controller wants ECDSA and there is no such key.
    #[error("no P-256 key is configured; set LETHE_SIGNING_EC_KEY_FILE and LETHE_SIGNING_EC_CERT_FILE")]
    NoEcKey,
    /// The library refused to sign.
    #[error("signing failed")]
    Failed,
}

/// An RSA key, and perhaps a P-256 key, each with the chain that verifies what it signs.
#[derive(Debug)]
pub struct SigningKeys {
    rsa: (RsaKeyPair, Certificate),
    ec: Option<(EcdsaKeyPair, Certificate)>,
    random: SystemRandom,
}

/// A certificate chain, its signing certificate first.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// PEM, certificates only.
    pub chain: String,
    /// Common name and subject alternative names.
    pub names: Vec<String>,
    /// Receivers refuse it afterwards.
    pub not_after: Timestamp,
}

impl SigningKeys {
    /// Reads the RSA key and its certificate, and checks that the certificate belongs to the key.
    ///
    /// # Errors
    /// [`SigningError`].
    pub fn load(key: &Path, certificate: &Path) -> Result<Self, SigningError> {
        let pkcs8 = read_key(key)?;
        let rsa = RsaKeyPair::from_pkcs8(pkcs8.secret_pkcs8_der())
            .map_err(|error| SigningError::Key { path: key.display().to_string(), reason: error.to_string() })?;
        let certificate = Certificate::read(certificate, rsa.public_key().as_ref())?;
        Ok(Self { rsa: (rsa, certificate), ec: None, random: SystemRandom::new() })
    }

    /// Adds a P-256 key for the controllers that are set so.
    ///
    /// # Errors
    /// [`SigningError`].
    pub(crate) fn with_ec(mut self, key: &Path, certificate: &Path) -> Result<Self, SigningError> {
        let pkcs8 = read_key(key)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.secret_pkcs8_der())
            .map_err(|error| SigningError::Key { path: key.display().to_string(), reason: error.to_string() })?;
        let certificate = Certificate::read(certificate, pair.public_key().as_ref())?;
        self.ec = Some((pair, certificate));
        Ok(self)
    }

    /// The certificate that verifies signatures of `algorithm`; `None` where there is no such key.
    #[must_use]
    pub fn certificate(&self, algorithm: SignatureAlgorithm) -> Option<&Certificate> {
        match algorithm {
            SignatureAlgorithm::RsaPkcs1v15 | SignatureAlgorithm::RsaPss => Some(&self.rsa.1),
            SignatureAlgorithm::EcdsaP256 => self.ec.as_ref().map(|(_, certificate)| certificate),
        }
    }

    /// All certificates: RSA first.
    pub fn certificates(&self) -> impl Iterator<Item = &Certificate> {
        std::iter::once(&self.rsa.1).chain(self.ec.as_ref().map(|(_, certificate)| certificate))
    }

    /// The signature over exactly these bytes, base64 in one line.
    pub(super) fn sign(&self, algorithm: SignatureAlgorithm, body: &[u8]) -> Result<String, SigningError> {
        let failed = |_| SigningError::Failed;
        let rsa = |padding| {
            let key = &self.rsa.0;
            let mut signature = vec![0; key.public_modulus_len()];
            key.sign(padding, &self.random, body, &mut signature).map_err(failed)?;
            Ok(STANDARD.encode(signature))
        };
        match algorithm {
            SignatureAlgorithm::RsaPkcs1v15 => rsa(&RSA_PKCS1_SHA256),
            SignatureAlgorithm::RsaPss => rsa(&RSA_PSS_SHA256),
            SignatureAlgorithm::EcdsaP256 => {
                let (pair, _) = self.ec.as_ref().ok_or(SigningError::NoEcKey)?;
                Ok(STANDARD.encode(pair.sign(&self.random, body).map_err(failed)?))
            }
        }
    }
}

fn read_key(path: &Path) -> Result<PrivatePkcs8KeyDer<'static>, SigningError> {
    PrivatePkcs8KeyDer::from_pem_file(path)
        .map_err(|error| SigningError::Key { path: path.display().to_string(), reason: error.to_string() })
}

impl Certificate {
    fn read(path: &Path, public_key: &[u8]) -> Result<Self, SigningError> {
        let unreadable = |reason: String| SigningError::Certificate { path: path.display().to_string(), reason };
        let chain: Result<Vec<CertificateDer<'_>>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        let chain = chain.map_err(|error| unreadable(error.to_string()))?;
        let der = chain.first().ok_or_else(|| unreadable("there is no certificate in it".to_owned()))?;
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
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
        let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp());
        let not_after = not_after.map_err(|error| unreadable(error.to_string()))?;
        // Written anew rather than handed on: the file may hold more than certificates.
        Ok(Self { chain: chain.iter().map(|der| to_pem(der)).collect(), names, not_after })
    }

    /// Whether the certificate names `domain`, directly or by a wildcard for its first label.
    #[must_use]
    pub fn covers(&self, domain: &str) -> bool {
        let domain = domain.to_ascii_lowercase();
        let wildcard = domain.split_once('.').map(|(_, parent)| format!("*.{parent}"));
        self.names.iter().any(|name| *name == domain || Some(name) == wildcard.as_ref())
    }
}

fn to_pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    // Base64 is ASCII: any position is one between characters.
    for start in (0..text.len()).step_by(64) {
        pem.push_str(&text[start..text.len().min(start + 64)]);
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
