//! Keys of a run: an RSA key, its certificate and a master key; and the checking of signatures as a controller does it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lethe::callback::signature::Algorithm;
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256, RsaKeySize};
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
        let (_, parsed) = X509Certificate::from_der(certificate.der()).unwrap();
        let public_key = parsed.public_key().subject_public_key.data.to_vec();
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
        let master = lethe::crypto::random::<32>().unwrap();
        std::fs::write(&files.master, STANDARD.encode(master)).unwrap();
        files
    }
}

/// Whether `signature` is ours over exactly `body`, by the public key in the certificate.
pub fn verifies(algorithm: Algorithm, signature: &str, body: &[u8]) -> bool {
    let scheme: &dyn aws_lc_rs::signature::VerificationAlgorithm = match algorithm {
        Algorithm::RsaPkcs1v15 => &RSA_PKCS1_2048_8192_SHA256,
        Algorithm::RsaPss => &RSA_PSS_2048_8192_SHA256,
        Algorithm::EcdsaP256 => return false,
    };
    let Ok(signature) = STANDARD.decode(signature) else { return false };
    UnparsedPublicKey::new(scheme, &material().public_key).verify(body, &signature).is_ok()
}
