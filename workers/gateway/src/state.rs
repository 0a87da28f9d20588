//! What calls work with, and who calls.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use ipnet::IpNet;
use lethe_audit::Signatory;
use lethe_db::Db;
use lethe_intake::Intake;
use lethe_results::day_keys::DayKeys;
use lethe_results::store::Store;
use lethe_signing::Processor;
use tokio::sync::Semaphore;

use crate::authentication::{Caller, Callers, Credentials};
use crate::groups::{AskStatus, Groups, Submit};
use crate::limits::Limits;
use crate::refusal::Refusal;
use crate::signatures::Signatures;

/// Everything that calls work with.
pub(crate) struct Gateway {
    pub(crate) db: Db,
    pub(crate) processor: Processor,
    /// Signs certificates.
    pub(crate) signatory: Arc<Signatory>,
    pub(crate) intake: Intake,
    pub(crate) submits: Groups<Submit>,
    pub(crate) statuses: Groups<AskStatus>,
    pub(crate) signatures: Signatures,
    pub(crate) callers: Callers,
    pub(crate) limits: Limits,
    pub(crate) files: Files,
    /// Calls that are worked on.
    pub(crate) places: Semaphore,
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// How long a client may take for its body.
    pub(crate) body_timeout: Duration,
}

/// What limits count a client by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientAddress(pub(crate) IpAddr);

/// Where results lie.
pub(crate) struct Files {
    pub(crate) store: Store,
    pub(crate) day_keys: DayKeys,
    pub(crate) places: Arc<Semaphore>,
}

impl FromRequestParts<Arc<Gateway>> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Refusal> {
        let domain = &gateway.processor.domain;
        let credentials = Credentials::of(parts).ok_or_else(|| Refusal::unauthorized(domain))?;
        let address = parts.extensions.get::<ClientAddress>().copied();
        let may_log_in = || address.map_or(Ok(()), |ClientAddress(address)| gateway.limits.login(address));
        let caller = gateway.callers.find(&credentials, domain, may_log_in).await?;
        gateway.limits.controller(&caller.controller_id)?;
        Ok(caller)
    }
}
