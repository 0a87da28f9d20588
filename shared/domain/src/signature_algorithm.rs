//! How bodies are signed: what a controller is set to.

use crate::names::names;

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
