//! The wire format: OpenDSR 1.0 (OpenGDPR), 2.0 and the 3.0 form of it that clients use today. Pure: no I/O.

pub mod answer;
pub mod callback_url;
pub mod error;
pub mod identity;
mod identity_type;
pub mod json;
mod named;
pub mod nobody;
mod parse;
pub(crate) mod read;
pub mod request;
mod wire;

pub use error::{ApiError, FieldError};
pub use identity::{Identity, InvalidIdentity};
pub use identity_type::{IdentityFormat, IdentityType};
pub use nobody::DeniedValues;
pub use parse::{MAX_BODY, Parser};
pub use read::read_mpid;
pub use request::{ApiVersion, Regulation, SubjectRequest};
