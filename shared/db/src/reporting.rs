//! What callbacks and status answers need of a request, sealed by itself: a few hundred bytes, while the request may
//! be a megabyte. So a claim of callbacks costs what it delivers.

use serde::{Deserialize, Serialize};

use super::sealed::{open_request, sealing_context};
use lethe_domain::crypto::{CryptoError, Keys};
use lethe_domain::opendsr::SubjectRequest;
use lethe_domain::request::{ControllerId, SubjectRequestId};

/// The callback URLs and the group of a request. Its version is in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reporting {
    /// In the order of the request.
    #[serde(default, rename = "urls", skip_serializing_if = "Vec::is_empty")]
    pub status_callback_urls: Vec<String>,
    /// As the controller sent it.
    #[serde(default, rename = "group", skip_serializing_if = "Option::is_none")]
    pub group_id: Option<String>,
}

impl Reporting {
    /// Sealed for `lethe.request_details.sealed_reporting`; empty where there is nothing to seal, so that it is told from NULL.
    ///
    /// # Errors
    /// [`CryptoError::Random`].
    pub fn seal(
        keys: &Keys,
        controller_id: &ControllerId,
        id: SubjectRequestId,
        request: &SubjectRequest,
    ) -> Result<Vec<u8>, CryptoError> {
        let reporting =
            Self { status_callback_urls: request.status_callback_urls.clone(), group_id: request.group_id.clone() };
        if reporting == Self::default() {
            return Ok(Vec::new());
        }
        let content = serde_json::to_vec(&reporting).map_err(|_| CryptoError::Unopenable)?;
        keys.requests().seal(&context(controller_id, id), &content)
    }

    /// Opens what [`Self::seal`] sealed. For a request that was received before there was such a column, `whole` is the
    /// sealed request. `None` after the purge.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`].
    pub fn open(
        keys: &Keys,
        controller_id: &ControllerId,
        id: SubjectRequestId,
        sealed: Option<&[u8]>,
        whole: Option<&[u8]>,
    ) -> Result<Option<Self>, CryptoError> {
        match (sealed, whole) {
            (Some([]), _) => Ok(Some(Self::default())),
            (Some(sealed), _) => {
                let content = keys.requests().open(&context(controller_id, id), sealed)?;
                serde_json::from_slice(&content).map(Some).map_err(|_| CryptoError::Unopenable)
            }
            (None, Some(whole)) => {
                let request = open_request(keys, controller_id, id, whole)?;
                Ok(Some(Self { status_callback_urls: request.status_callback_urls, group_id: request.group_id }))
            }
            (None, None) => Ok(None),
        }
    }
}

/// Another one than the request's, so that neither can be put in the place of the other.
fn context(controller_id: &ControllerId, id: SubjectRequestId) -> Vec<u8> {
    [&sealing_context(controller_id, id)[..], b"/reporting"].concat()
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use lethe_domain::opendsr::{DeniedValues, Parser};

    fn request(extra: &str) -> SubjectRequest {
        let parser =
            Parser { extension_domains: vec![], denied: DeniedValues::default(), addresses: "".parse().unwrap() };
        let body = format!(
            r#"{{"api_version":"3.0","regulation":"gdpr","subject_request_type":"erasure"{extra},
                "subject_request_id":"a7551968-d5d6-44b2-9831-815ac9017798","submitted_time":"2026-11-20T10:00:00Z",
                "subject_identities":{{"email":{{"value":"ada@example.com","encoding":"raw"}}}}}}"#
        );
        parser.request(body.as_bytes(), None).unwrap()
    }

    #[test]
    fn it_is_bound_to_its_request_and_small() {
        let keys = Keys::from_master_key(&STANDARD.encode([7; 32])).unwrap();
        let (acme, other): (ControllerId, ControllerId) = ("acme".parse().unwrap(), "other".parse().unwrap());
        let told = request(r#","group_id":"g","status_callback_urls":["https://example.com/x"]"#);
        let id = told.subject_request_id;
        let sealed = Reporting::seal(&keys, &acme, id, &told).unwrap();
        assert!(sealed.len() < 150, "{} bytes", sealed.len());
        let expected = Reporting {
            status_callback_urls: vec!["https://example.com/x".to_owned()],
            group_id: Some("g".to_owned()),
        };
        assert_eq!(Reporting::open(&keys, &acme, id, Some(&sealed), None), Ok(Some(expected.clone())));
        assert_eq!(Reporting::open(&keys, &other, id, Some(&sealed), None), Err(CryptoError::Unopenable));
        // A request of the release before.
        let whole = keys.requests().seal(&sealing_context(&acme, id), &serde_json::to_vec(&told).unwrap()).unwrap();
        assert_eq!(Reporting::open(&keys, &acme, id, None, Some(&whole)), Ok(Some(expected)));
        assert_eq!(Reporting::open(&keys, &acme, id, Some(&whole), None), Err(CryptoError::Unopenable));
        assert_eq!(Reporting::open(&keys, &acme, id, None, None), Ok(None), "purged");
    }

    #[test]
    fn nothing_to_tell_is_empty() {
        let keys = Keys::from_master_key(&STANDARD.encode([7; 32])).unwrap();
        let (acme, silent): (ControllerId, _) = ("acme".parse().unwrap(), request(""));
        let sealed = Reporting::seal(&keys, &acme, silent.subject_request_id, &silent).unwrap();
        assert!(sealed.is_empty());
        let opened = Reporting::open(&keys, &acme, silent.subject_request_id, Some(&sealed), None);
        assert_eq!(opened, Ok(Some(Reporting::default())));
    }
}
