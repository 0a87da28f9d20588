//! Requests as they are kept: sealed, and bound to controller and id.

use lethe_domain::crypto::{CryptoError, Keys};
use lethe_domain::opendsr::SubjectRequest;
use lethe_domain::request::{ControllerId, SubjectRequestId};

/// What sealed requests are bound to.
pub(super) fn sealing_context(controller_id: &ControllerId, id: SubjectRequestId) -> Vec<u8> {
    format!("{controller_id}/{id}").into_bytes()
}

/// Opens a sealed request.
///
/// # Errors
/// [`CryptoError::Unopenable`].
pub(crate) fn open_request(
    keys: &Keys,
    controller_id: &ControllerId,
    id: SubjectRequestId,
    sealed: &[u8],
) -> Result<SubjectRequest, CryptoError> {
    let content = keys.requests().open(&sealing_context(controller_id, id), sealed)?;
    serde_json::from_slice(&content).map_err(|_| CryptoError::Unopenable)
}
