//! The domain: requests, their status and calendar, the wire format, identities, callback URLs, digests and sealing. Pure:
//! nothing here does I/O, waits, or speaks SQL.

pub mod audit_chain;
pub mod backoff;
pub mod crypto;
pub mod delivery_attempt;
pub mod disposition;
pub mod group;
pub mod merkle;
pub mod names;
pub mod opendsr;
pub mod request;
pub mod result_link;
pub mod signature_algorithm;
