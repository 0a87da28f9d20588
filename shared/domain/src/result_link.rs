//! Links to results (contract 7). The token can be built again by whoever has the master key; the database holds only
//! its SHA-256, so that neither a dump nor a log of statements opens a download.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use url::Url;
use uuid::Uuid;

use crate::crypto::{Keys, sha256};
use crate::opendsr::ApiVersion;

/// What a link to a result is made of, and how much there is behind it.
#[derive(Clone, Debug)]
pub struct StoredResult {
    /// The result.
    pub result_id: Uuid,
    /// The salt of its token.
    pub token_salt: Vec<u8>,
    /// Its lines.
    pub lines: i64,
}

/// Builds links.
#[derive(Clone, Debug)]
pub struct Links {
    keys: std::sync::Arc<Keys>,
    public_url: Url,
}

impl Links {
    /// Links below `public_url`.
    #[must_use]
    pub const fn new(keys: std::sync::Arc<Keys>, public_url: Url) -> Self {
        Self { keys, public_url }
    }

    /// `results_url` of a result, under the path of the request's version.
    #[must_use]
    pub fn url(&self, version: ApiVersion, result: &StoredResult) -> String {
        let base = self.public_url.as_str().trim_end_matches('/');
        format!("{base}/{}/results/{}", version.path(), token(&self.keys, result.result_id, &result.token_salt))
    }
}

/// The token of a result: 43 characters of base64url.
#[must_use]
pub fn token(keys: &Keys, result_id: Uuid, salt: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(keys.result_token(result_id.as_bytes(), salt))
}

/// What the database holds of a token.
#[must_use]
pub fn token_digest(token: &str) -> Vec<u8> {
    sha256(token.as_bytes()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_can_be_built_again_and_differs_by_salt() {
        let keys = std::sync::Arc::new(Keys::from_master_key("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap());
        let links = Links::new(keys, "https://privacy.example.com/dsr/".parse().unwrap());
        let result = |salt: u8| StoredResult { result_id: Uuid::nil(), token_salt: vec![salt; 16], lines: 1 };
        let url = links.url(ApiVersion::V3, &result(1));
        assert!(url.starts_with("https://privacy.example.com/dsr/v3/results/"), "{url}");
        assert_eq!(url, links.url(ApiVersion::V3, &result(1)));
        assert_ne!(url, links.url(ApiVersion::V3, &result(2)));
        assert!(links.url(ApiVersion::V1, &result(1)).contains("/v1/results/"));
    }
}
