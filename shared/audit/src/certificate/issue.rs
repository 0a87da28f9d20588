//! Issuing a certificate. The same request gives the same bytes as long as the keys are the same.

use std::sync::Arc;

use super::line::CompletedLine;
use super::{ALGORITHM, Asked, AuditPosition, Document, Execution, FORMAT, Inclusion, SetEntry, Statement};
use crate::Signatory;
use lethe_db::audit::{self, Place};
use lethe_db::certificates::{self, Facts};
use lethe_db::requests::Target;
use lethe_db::{Db, DbError};
use lethe_domain::audit_chain::{Entry, fields, leaves, lines_of};
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
    let completions = audit::completions(&tx, facts.request_key).await?;
    tx.commit().await?;
    let signer = &signatory.processor.signer;
    loop {
        let certificate = signer.certificate(SignatureAlgorithm::RsaPkcs1v15).ok_or(SigningError::Failed)?;
        let statement = match statement(signatory, &certificate.chain, target, &facts, &completions) {
            Ok(statement) => statement,
            Err(reason) => return Ok(Err(reason)),
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

fn statement(
    signatory: &Signatory,
    chain: &str,
    (controller_id, subject_request_id): &Target,
    facts: &Facts,
    completions: &[(Entry, Option<Place>)],
) -> Result<Statement, NoCertificate> {
    if facts.request_type != RequestType::Erasure {
        return Err(NoCertificate::NoErasure);
    }
    let completed_at = facts.completed_at.filter(|_| facts.status == RequestStatus::Completed);
    let completed_at = completed_at.ok_or(NoCertificate::NotCompleted(facts.status))?;
    let found =
        completions.iter().find_map(|(entry, place)| told(entry, place.as_ref()?, &subject_request_id.to_string()));
    let (line, audit) = found.ok_or(NoCertificate::NotSealed)?;
    Ok(Statement {
        format: FORMAT.to_owned(),
        processor_domain: signatory.processor.domain.clone(),
        controller_id: controller_id.to_string(),
        subject_request_id: subject_request_id.to_string(),
        request: Asked {
            subject_request_type: facts.request_type.to_string(),
            regulation: facts.regulation.map(|law| law.to_string()),
            api_version: facts.api_version.to_string(),
            content_digest: hex(&facts.content_digest),
            submitted_time: facts.submitted_time,
            received_time: facts.received_at,
        },
        execution: Execution {
            lane: facts.lane.to_string(),
            batch_id: facts.batch_id.map(|batch| batch.0),
            scheduled_for: facts.runs_at,
            began_at: facts.in_progress_at,
            completed_at,
            profiles: line.profiles,
        },
        stores: line.stores(),
        audit,
        certificate_chain_sha256: hex(&sha256(chain.as_bytes())),
    })
}

/// What a sealed set tells of a request, and the proof that it does; `None` where it tells nothing of it.
fn told(entry: &Entry, place: &Place, subject_request_id: &str) -> Option<(CompletedLine, AuditPosition)> {
    let lines = lines_of(entry.requests.as_deref()?)?;
    let of_line = |line: &str| CompletedLine::read(fields(&entry.details, line)?);
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
