//! An answer before it is signed and sent.

use serde::Serialize;

use lethe_domain::opendsr::{ApiError, ApiVersion};

/// An answer: the same over AMQP and HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status; the header `status` over AMQP.
    pub status: u16,
    /// JSON.
    pub body: Vec<u8>,
    /// Decides on the names of the headers.
    pub version: ApiVersion,
    /// The short cause of an error.
    pub error: Option<&'static str>,
    /// The sentence of an error; never contains a value.
    pub message: Option<String>,
    /// What to ask with for the rest of a list.
    pub cursor: Option<String>,
}

impl Answer {
    /// A success with a body.
    pub fn json(status: u16, version: ApiVersion, body: &impl Serialize) -> Self {
        // The answer types have no maps with odd keys, the only thing that cannot be written.
        Self::written(status, version, serde_json::to_vec(body).unwrap_or_default())
    }

    /// A success with a body that is JSON already.
    #[must_use]
    pub const fn written(status: u16, version: ApiVersion, body: Vec<u8>) -> Self {
        Self { status, body, version, error: None, message: None, cursor: None }
    }

    /// An error.
    #[must_use]
    pub fn error(error: &ApiError, version: ApiVersion) -> Self {
        Self {
            status: error.code,
            body: error.to_json().to_string().into_bytes(),
            version,
            error: Some(error.reason()),
            message: Some(error.message.clone()),
            cursor: None,
        }
    }
}
