//! Issuing a certificate. The same request gives the same bytes as long as the keys are the same.

use std::sync::Arc;

use super::line::CompletedLine;
use super::{ALGORITHM, AuditPosition, Document, FORMAT, Inclusion, SetEntry, Statement};
use crate::Signatory;
use lethe_db::audit::{self, Place};
use lethe_db::certificates::{self, Facts};
use lethe_db::requests::Target;
use lethe_db::{Db, DbError};
use lethe_domain::audit_chain::{Columns, Entry, leaves, lines_of};
use lethe_domain::crypto::{hex, sha256};
use lethe_domain::merkle;
use lethe_domain::request::{RequestStatus, RequestType};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature;
use lethe_signing::signing_keys::SigningError;

/// Why there is no certificate. The texts are for whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoCertificate {
    /// The controller has no such request.
    #[error("there is no such request")]
    Unknown,
    /// Only erasures are certified.
    #[error("the request is not an erasure")]
    NoErasure,
    /// It is not complete.
    #[error("the request is {0}; the certificate is available once it is completed")]
    NotCompleted(RequestStatus),
    /// The trail is sealed within seconds.
    #[error("the completion is not sealed in the audit trail yet; try again in a few seconds")]
    NotSealed,
}

/// A certificate could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The library refused to sign.
    #[error(transparent)]
    Signing(#[from] SigningError),
}

/// The signed certificate of an erasure, as the bytes of its file, or why there is none.
///
/// # Errors
/// [`IssueError`].
pub async fn issue(
    db: &Db,
    signatory: &Arc<Signatory>,
    target: &Target,
) -> Result<Result<String, NoCertificate>, IssueError> {
    let tx = db.begin_snapshot("issue_certificate").await?;
    let Some(facts) = certificates::facts(&tx, target).await? else { return Ok(Err(NoCertificate::Unknown)) };
    if let Err(reason) = is_certified(&facts) {
        return Ok(Err(reason));
    }
    let completions = audit::completions(&tx, facts.request_key).await?;
    tx.commit().await?;
    let id = target.1.to_string();
    let found = completions.iter().find_map(|(entry, place)| told(entry, place.as_ref()?, &id));
    let Some((line, audit)) = found else { return Ok(Err(NoCertificate::NotSealed)) };
    let signer = &signatory.processor.signer;
    loop {
        let certificate = signer.certificate(SignatureAlgorithm::RsaPkcs1v15).ok_or(SigningError::Failed)?;
        let statement = Statement {
            format: FORMAT.to_owned(),
            processor_domain: signatory.processor.domain.clone(),
            controller_id: target.0.to_string(),
            subject_request_id: id.clone(),
            request: line.asked(),
            execution: line.execution(facts.runs_at),
            stores: line.stores(),
            audit: audit.clone(),
            certificate_chain_sha256: hex(&sha256(certificate.chain.as_bytes())),
        };
        let payload = serde_json::to_string(&statement).map_err(|_| SigningError::Failed)?;
        let (signing, bytes) = (signer.clone(), payload.clone());
        let signature =
            signature::off_thread(move || signing.sign(SignatureAlgorithm::RsaPkcs1v15, bytes.as_bytes())).await?;
        // The keys may have changed in between; then the statement names the wrong ones.
        if signer.certificate(SignatureAlgorithm::RsaPkcs1v15).is_some_and(|now| now.chain == certificate.chain) {
            let certificate_chain = certificate.chain.clone();
            return Ok(Ok(Document { payload, algorithm: ALGORITHM.to_owned(), signature, certificate_chain }.write()));
        }
    }
}

/// Only completed erasures are certified.
fn is_certified(facts: &Facts) -> Result<(), NoCertificate> {
    match (facts.request_type, facts.status) {
        (RequestType::Erasure, RequestStatus::Completed) => Ok(()),
        (RequestType::Erasure, status) => Err(NoCertificate::NotCompleted(status)),
        _ => Err(NoCertificate::NoErasure),
    }
}

/// What a sealed set tells of a request, and the proof that it does; `None` where it tells nothing of it.
fn told(entry: &Entry, place: &Place, subject_request_id: &str) -> Option<(CompletedLine, AuditPosition)> {
    let lines = lines_of(entry.requests.as_deref()?)?;
    let columns = Columns::read(&entry.details)?;
    let of_line = |line: &str| CompletedLine::read(columns.fields(line)?);
    let (index, line) = lines
        .iter()
        .enumerate()
        // Only those that may be it are read.
        .filter(|(_, line)| line.get().contains(subject_request_id))
        .filter_map(|(index, line)| Some((index, of_line(line.get())?)))
        .find(|(_, line)| line.subject_request_id == subject_request_id)?;
    let inclusion = Inclusion {
        line: lines[index].get().to_owned(),
        index: index as u64,
        size: lines.len() as u64,
        path: merkle::proof(&leaves(&lines), index)?.iter().map(|hash| hex(hash)).collect(),
    };
    let set = SetEntry {
        previous: hex(&place.previous?),
        entry_id: entry.entry_id,
        event: entry.event.clone(),
        recorded_at: entry.recorded_at,
        details: entry.details.clone(),
    };
    let (chain, digest) = (entry.chain().to_owned(), hex(&place.digest));
    Some((line, AuditPosition { chain, position: place.position, digest, entry: set, inclusion }))
}
