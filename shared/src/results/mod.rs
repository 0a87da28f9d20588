//! Result files of access and portability requests (contract 7): encryption, keys of the days of expiry, the object
//! store, the file itself, and the link to it.

pub mod cipher;
pub mod day_keys;
pub mod file;
pub mod link;
pub mod store;
mod upload;
