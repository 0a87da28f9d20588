//! Lethe: the fulfilment back end of a data processor for data subject requests. What every worker stands on.
//!
//! `docs/ARCHITECTURE.md` is the map.

pub mod audit;
pub mod backoff;
pub mod broker;
pub mod callback;
pub mod certificate;
pub mod config;
pub mod crypto;
pub mod db;
pub mod disposition;
pub mod fault;
pub mod health;
pub mod intake;
pub mod opendsr;
pub mod poison;
pub mod request;
pub mod results;
pub mod service;
pub mod stores;
pub mod telemetry;
pub mod work;
