//! The audit trail: entries chained by their digests for each controller, and signed (docs/adr/0011-the-audit-trail.md).

pub mod certificate;
pub mod export;
mod seal;
mod signatory;
pub mod trail;
mod verify;

pub use seal::{SealError, Sealer};
pub use signatory::{Signatory, Trust, TrustError};
pub use verify::{Finding, Problem, Verifier};
