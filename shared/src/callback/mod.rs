//! Callbacks: where they may go, how they are signed, and how they are sent.

pub mod address;
pub mod client;
pub mod signature;
pub mod signing_keys;
