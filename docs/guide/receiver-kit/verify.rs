//! Verifies a callback of Lethe. Needs the crates `aws-lc-rs`, `base64`, `jiff`, `serde_json` and `x509-parser`.
//!
//! ```text
//! verify CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use x509_parser::oid_registry::{
    OID_PKCS1_RSAENCRYPTION, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
    OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384,
};
use x509_parser::prelude::{ASN1Time, GeneralName, Pem, X509Certificate};

/// The callback must not be believed; the text says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub &'static str);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Refused {}

/// Whether `body` (the raw bytes) was signed by `domain`.
///
/// `certificate`: what is at `https://<domain>/opendsr_cert.pem`, the signing certificate first.
/// `at`: the time to judge the certificate by. `roots`: PEM of the authorities to trust.
pub fn verify(
    certificate: &[u8],
    domain: &str,
    headers: &BTreeMap<String, String>,
    body: &[u8],
    at: Timestamp,
    roots: Option<&[u8]>,
) -> Result<(), Refused> {
    let named =
        |wanted: &str| headers.iter().find(|(name, value)| name.eq_ignore_ascii_case(wanted) && !value.is_empty());
    let header = |v3: &str, v1: &str| named(v3).or_else(|| named(v1)).map(|(_, value)| value);
    let sender = header("X-OpenDSR-Processor-Domain", "X-OpenGDPR-Processor-Domain");
    if !sender.ok_or(Refused("processor domain header missing"))?.eq_ignore_ascii_case(domain) {
        return Err(Refused("processor domain not trusted"));
    }
    let signature = header("X-OpenDSR-Signature", "X-OpenGDPR-Signature").ok_or(Refused("signature header missing"))?;
    let signature = STANDARD.decode(signature).map_err(|_| Refused("signature is not base64"))?;
    let key = signing_key(certificate, domain, at, roots)?;
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key)
        .verify(body, &signature)
        .map_err(|_| Refused("signature does not match"))
}

/// The public key in the certificate, once the certificate has been checked.
fn signing_key(pem: &[u8], domain: &str, at: Timestamp, roots: Option<&[u8]>) -> Result<Vec<u8>, Refused> {
    let unreadable = Refused("certificate cannot be read");
    let (pem, roots) = (blocks(pem)?, roots.map(blocks).transpose()?);
    let chain = certificates(&pem)?;
    let leaf = chain.first().ok_or(unreadable)?;
    let anchors = match &roots {
        Some(roots) => certificates(roots)?,
        None => chain.iter().rev().take(1).cloned().collect(),
    };
    let at = ASN1Time::from_timestamp(at.as_second()).map_err(|_| unreadable)?;
    if !chain.iter().all(|one| one.validity().is_valid_at(at)) {
        return Err(Refused("certificate expired or not yet valid"));
    }
    let wildcard = format!("*.{}", domain.split_once('.').map_or("", |(_, parent)| parent));
    if !names(leaf).iter().any(|name| name.eq_ignore_ascii_case(domain) || name.eq_ignore_ascii_case(&wildcard)) {
        return Err(Refused("certificate names another domain"));
    }
    if !trusted(&chain, &anchors) {
        return Err(Refused("certificate chain not trusted"));
    }
    if leaf.public_key().algorithm.algorithm != OID_PKCS1_RSAENCRYPTION {
        return Err(Refused("certificate key is not RSA"));
    }
    Ok(leaf.public_key().subject_public_key.data.to_vec())
}

fn blocks(pem: &[u8]) -> Result<Vec<Pem>, Refused> {
    Pem::iter_from_buffer(pem).collect::<Result<_, _>>().map_err(|_| Refused("certificate cannot be read"))
}

fn certificates(blocks: &[Pem]) -> Result<Vec<X509Certificate<'_>>, Refused> {
    let parsed = blocks.iter().map(Pem::parse_x509).collect::<Result<_, _>>();
    parsed.map_err(|_| Refused("certificate cannot be read"))
}

/// The common name and the DNS names.
fn names<'a>(certificate: &'a X509Certificate<'_>) -> Vec<&'a str> {
    let mut names: Vec<&str> = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok()).collect();
    if let Ok(Some(extension)) = certificate.subject_alternative_name() {
        names.extend(extension.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        }));
    }
    names
}

/// Whether each certificate was issued by the next one, up to an anchor.
fn trusted(chain: &[X509Certificate<'_>], anchors: &[X509Certificate<'_>]) -> bool {
    for (index, certificate) in chain.iter().enumerate() {
        if anchors.iter().any(|anchor| anchor.as_raw() == certificate.as_raw() || issued(certificate, anchor)) {
            return true;
        }
        if !chain.get(index + 1).is_some_and(|issuer| issued(certificate, issuer)) {
            return false;
        }
    }
    false
}

/// Whether `issuer` is an authority and signed `certificate`.
fn issued(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> bool {
    let algorithm = &certificate.signature_algorithm.algorithm;
    let known: [(_, &'static dyn VerificationAlgorithm); 5] = [
        (OID_PKCS1_SHA256WITHRSA, &RSA_PKCS1_2048_8192_SHA256),
        (OID_PKCS1_SHA384WITHRSA, &RSA_PKCS1_2048_8192_SHA384),
        (OID_PKCS1_SHA512WITHRSA, &RSA_PKCS1_2048_8192_SHA512),
        (OID_SIG_ECDSA_WITH_SHA256, &ECDSA_P256_SHA256_ASN1),
        (OID_SIG_ECDSA_WITH_SHA384, &ECDSA_P384_SHA384_ASN1),
    ];
    let Some((_, algorithm)) = known.into_iter().find(|(oid, _)| oid == algorithm) else { return false };
    let key = UnparsedPublicKey::new(algorithm, &issuer.public_key().subject_public_key.data);
    issuer.is_ca()
        && certificate.issuer().as_raw() == issuer.subject().as_raw()
        && key.verify(certificate.tbs_certificate.as_ref(), &certificate.signature_value.data).is_ok()
}

/// The program, without the printing.
pub fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let usage = "usage: verify CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]";
    let mut next = || arguments.next().ok_or(usage);
    let (certificate, domain, headers, body) = (next()?, next()?, next()?, next()?);
    let (mut at, mut roots) = (Timestamp::now(), None);
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or(usage)?;
        match option.as_str() {
            "--at" => at = value.parse()?,
            "--roots" => roots = Some(std::fs::read(value)?),
            _ => return Err(usage.into()),
        }
    }
    let (certificate, body) = (std::fs::read(certificate)?, std::fs::read(body)?);
    let headers = serde_json::from_slice(&std::fs::read(headers)?)?;
    Ok(verify(&certificate, &domain, &headers, &body, at, roots.as_deref())?)
}

/// `valid` and 0, or the reason and 1.
pub fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => {
            println!("valid");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
