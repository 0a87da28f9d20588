//! How bodies are signed: what a controller is set to.

use crate::request::status::names;

/// How the bodies for a controller are signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignatureAlgorithm {
    /// RSA PKCS#1 v1.5 with SHA-256: OpenDSR's own.
    RsaPkcs1v15,
    /// RSA-PSS with SHA-256.
    RsaPss,
    /// ECDSA P-256 with SHA-256; the certificate is at `/opendsr_cert_ec.pem`.
    EcdsaP256,
}
names!(
    SignatureAlgorithm,
    "signature algorithm",
    RsaPkcs1v15 = "rsa-pkcs1v15",
    RsaPss = "rsa-pss",
    EcdsaP256 = "ecdsa-p256"
);

impl SignatureAlgorithm {
    /// The algorithm that is stored for a controller; OpenDSR's own if the text is unknown to this version.
    #[must_use]
    pub fn stored(text: &str) -> Self {
        text.parse().unwrap_or(Self::RsaPkcs1v15)
    }
}
