//! Result files of access and portability requests (contract 7): encryption, keys of the days of expiry, the object store.

pub mod cipher;
pub mod day_keys;
mod options;
pub mod store;

pub use options::ResultOptions;
