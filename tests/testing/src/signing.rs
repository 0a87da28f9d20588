//! Keys of a run: an RSA key, its certificate and a master key; and the checking of signatures as a controller does it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The domain that the tests' processor goes by.
pub const DOMAIN: &str = "localhost";

struct Material {
    key: String,
    certificate: String,
    public_key: Vec<u8>,
}

/// An RSA key takes a moment: one for a run.
fn material() -> &'static Material {
    static MATERIAL: OnceLock<Material> = OnceLock::new();
    MATERIAL.get_or_init(|| {
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let certificate = CertificateParams::new([DOMAIN.to_owned()]).unwrap().self_signed(&key).unwrap();
        let public_key = public_key_of(certificate.der());
        Material { key: key.serialize_pem(), certificate: certificate.pem(), public_key }
    })
}

/// Where the files of a test lie.
#[derive(Clone, Debug)]
pub struct KeyFiles {
    /// PKCS#8 PEM.
    pub key: PathBuf,
    /// X.509 PEM.
    pub certificate: PathBuf,
    /// Base64.
    pub master: PathBuf,
}

impl KeyFiles {
    /// Writes the files into `folder`; the master key is fresh.
    pub fn write(folder: &Path) -> Self {
        let files = Self {
            key: folder.join("signing-key.pem"),
            certificate: folder.join("signing-cert.pem"),
            master: folder.join("master.key"),
        };
        std::fs::write(&files.key, &material().key).unwrap();
        std::fs::write(&files.certificate, &material().certificate).unwrap();
        let master = lethe_domain::crypto::random::<32>().unwrap();
        std::fs::write(&files.master, STANDARD.encode(master)).unwrap();
        files
    }
}

/// A key and its certificate, beside the usual ones.
pub struct SigningPair {
    /// PKCS#8 PEM.
    pub key: PathBuf,
    /// X.509 PEM.
    pub certificate: PathBuf,
    /// That certificate, DER.
    pub der: Vec<u8>,
    public_key: Vec<u8>,
}

impl SigningPair {
    /// Makes a pair of this kind and writes it into `folder` under `name`. `until` is the year in which it expires.
    pub fn write(folder: &Path, name: &str, algorithm: SignatureAlgorithm, until: i32) -> Self {
        let key = match algorithm {
            SignatureAlgorithm::RsaPkcs1v15 | SignatureAlgorithm::RsaPss => {
                KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap()
            }
            SignatureAlgorithm::EcdsaP256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(),
        };
        let mut params = CertificateParams::new([DOMAIN.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        let pair = Self {
            key: folder.join(format!("{name}-key.pem")),
            certificate: folder.join(format!("{name}-cert.pem")),
            der: certificate.der().to_vec(),
            public_key: public_key_of(certificate.der()),
        };
        std::fs::write(&pair.key, key.serialize_pem()).unwrap();
        std::fs::write(&pair.certificate, certificate.pem()).unwrap();
        pair
    }

    /// Whether `signature` is this key's over exactly `body`.
    pub fn verifies(&self, algorithm: SignatureAlgorithm, signature: &str, body: &[u8]) -> bool {
        verifies_by(&self.public_key, algorithm, signature, body)
    }
}

fn public_key_of(der: &[u8]) -> Vec<u8> {
    let (_, parsed) = X509Certificate::from_der(der).unwrap();
    parsed.public_key().subject_public_key.data.to_vec()
}

/// Whether `signature` is ours over exactly `body`, by the public key in the certificate.
pub fn verifies(algorithm: SignatureAlgorithm, signature: &str, body: &[u8]) -> bool {
    verifies_by(&material().public_key, algorithm, signature, body)
}

fn verifies_by(public_key: &[u8], algorithm: SignatureAlgorithm, signature: &str, body: &[u8]) -> bool {
    let scheme: &dyn aws_lc_rs::signature::VerificationAlgorithm = match algorithm {
        SignatureAlgorithm::RsaPkcs1v15 => &RSA_PKCS1_2048_8192_SHA256,
        SignatureAlgorithm::RsaPss => &RSA_PSS_2048_8192_SHA256,
        SignatureAlgorithm::EcdsaP256 => &ECDSA_P256_SHA256_ASN1,
    };
    let Ok(signature) = STANDARD.decode(signature) else { return false };
    UnparsedPublicKey::new(scheme, public_key).verify(body, &signature).is_ok()
}
