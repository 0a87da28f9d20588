//! Verifying a certificate, without a network and without a database.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::line::CompletedLine;
use super::{ALGORITHM, AuditPosition, Document, FORMAT, Statement};
use crate::Trust;
use crate::export::read_digest;
use lethe_domain::audit_chain::{Columns, Entry, Set};
use lethe_domain::crypto::{Digest, hex, sha256};
use lethe_domain::merkle;

/// Why a file proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not written as certificates are.
    #[error("the file is not a certificate, or it was changed")]
    Format,
    /// Another algorithm.
    #[error("the algorithm is not rsa-pkcs1v15-sha256")]
    SignatureAlgorithm,
    /// No X.509 chain.
    #[error("the certificate chain cannot be read")]
    Chain,
    /// Not signed by the key of the chain, or changed since.
    #[error("the signature does not match the statement: one of them was changed")]
    Signature,
    /// The statement names another chain.
    #[error("the certificate chain is not the one that the statement names: it was changed")]
    OtherChain,
    /// The chain is for another domain than the statement.
    #[error("the signing certificate does not name {domain}, the processor in the statement")]
    Domain {
        /// The domain in the statement.
        domain: String,
    },
    /// The proof does not lead from the line to the digest.
    #[error("the line of the audit trail is not part of the digest that the certificate names")]
    NotIncluded,
    /// The line tells something else.
    #[error("the audit trail contradicts the certificate")]
    OtherLine,
    /// Not among those that are trusted.
    #[error("the signing certificate (SHA-256 {fingerprint}) is not a trusted one")]
    Untrusted {
        /// SHA-256 of the certificate, hexadecimal.
        fingerprint: String,
    },
}

/// A file that proves what it says, as far as its signing certificate is the processor's.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What is certified.
    pub statement: Statement,
    /// SHA-256 of the signing certificate, hexadecimal.
    pub fingerprint: String,
}

/// Verifies the bytes of a file. With `trusted` the signing certificate must be one of these; without, whoever asks has
/// to compare the fingerprint with that of the processor's certificate.
///
/// # Errors
/// [`Refused`].
pub fn verify(file: &[u8], trusted: Option<&Trust>) -> Result<Verified, Refused> {
    let document: Document = serde_json::from_slice(file).map_err(|_| Refused::Format)?;
    // One way to write it: what reads the same and is written otherwise was changed.
    if document.write().as_bytes() != file {
        return Err(Refused::Format);
    }
    if document.algorithm != ALGORITHM {
        return Err(Refused::SignatureAlgorithm);
    }
    let mut signer = Trust::default();
    signer.add("certificate_chain", &document.certificate_chain).map_err(|_| Refused::Chain)?;
    if !signer.verifies(document.payload.as_bytes(), &document.signature) {
        return Err(Refused::Signature);
    }
    let statement: Statement = serde_json::from_str(&document.payload).map_err(|_| Refused::Format)?;
    if statement.format != FORMAT {
        return Err(Refused::Format);
    }
    if statement.certificate_chain_sha256 != hex(&sha256(document.certificate_chain.as_bytes())) {
        return Err(Refused::OtherChain);
    }
    let fingerprint = signer.fingerprints().next().unwrap_or_default().to_owned();
    match trusted {
        Some(trusted) if !trusted.fingerprints().any(|one| one == fingerprint) => {
            return Err(Refused::Untrusted { fingerprint });
        }
        None if !names(&document.certificate_chain, &statement.processor_domain) => {
            return Err(Refused::Domain { domain: statement.processor_domain });
        }
        _ => {}
    }
    if !is_included(&statement.audit).unwrap_or(false) {
        return Err(Refused::NotIncluded);
    }
    if !is_told(&statement).unwrap_or(false) {
        return Err(Refused::OtherLine);
    }
    Ok(Verified { statement, fingerprint })
}

/// Whether the line leads to the digest by the proof and the rest of the entry; `None` where they are not what we write.
fn is_included(audit: &AuditPosition) -> Option<bool> {
    let inclusion = &audit.inclusion;
    let path: Vec<Digest> = inclusion.path.iter().map(|hash| read_digest(hash)).collect::<Option<_>>()?;
    let (index, length) = (usize::try_from(inclusion.index).ok()?, usize::try_from(inclusion.size).ok()?);
    let root = merkle::root_by_proof(&merkle::leaf(inclusion.line.as_bytes()), index, length, &path)?;
    let entry = Entry {
        entry_id: audit.entry.entry_id,
        controller_id: Some(audit.chain.clone()),
        request_key: None,
        event: audit.entry.event.clone(),
        details: audit.entry.details.clone(),
        requests: None,
        recorded_at: audit.entry.recorded_at,
    };
    let digest = entry.digest_by(Some(Set { length, root }), &read_digest(&audit.entry.previous)?, audit.position);
    Some(hex(&digest) == audit.digest)
}

/// Whether the line says what the certificate says.
fn is_told(statement: &Statement) -> Option<bool> {
    let audit = &statement.audit;
    let columns = Columns::read(&audit.entry.details)?;
    let line = CompletedLine::read(columns.fields(&audit.inclusion.line)?)?;
    Some(
        audit.chain == statement.controller_id
            && audit.entry.event == "requests.completed"
            && line.subject_request_id == statement.subject_request_id
            && line.asked() == statement.request
            && line.execution(statement.execution.scheduled_for) == statement.execution
            && line.stores() == statement.stores,
    )
}

/// Whether the signing certificate names `domain`, directly or by a wildcard for its first label.
fn names(chain: &str, domain: &str) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(chain.as_bytes()) else { return false };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else { return false };
    let wildcard = domain.split_once('.').map(|(_, parent)| format!("*.{parent}"));
    let is_it = |name: &str| {
        name.eq_ignore_ascii_case(domain) || wildcard.as_ref().is_some_and(|one| name.eq_ignore_ascii_case(one))
    };
    let common = certificate.subject().iter_common_name().any(|name| name.as_str().is_ok_and(is_it));
    let alternative = certificate.subject_alternative_name().ok().flatten().is_some_and(|extension| {
        extension.value.general_names.iter().any(|name| matches!(name, GeneralName::DNSName(name) if is_it(name)))
    });
    common || alternative
}
