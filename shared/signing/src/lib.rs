//! Signatures over bodies (contract 6): the keys of the processor, and who it is.

mod options;
pub mod signature;
pub mod signing_keys;

pub use options::{Processor, SigningOptions};
