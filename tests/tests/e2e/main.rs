//! End-to-end tests: real servers, real binaries. One binary for all, since each would link everything once more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests; their helpers fail them")]

mod access;
mod audit;
mod calendar;
mod callbacks;
mod cancellation;
mod certificate;
mod claims;
mod command_line;
mod dead_letter;
mod erasure;
mod fuzz;
mod gateway;
mod gateway_connections;
mod gateway_doors;
mod gateway_downloads;
mod gateway_errors;
mod gateway_isolation;
mod gateway_shredding;
mod gateway_signing;
mod hostile;
mod intake;
mod large_subjects;
mod matching;
mod privacy;
mod publication;
mod purge;
mod redrive;
mod servers;
mod service;
mod shares;
mod sql;
mod trouble;
mod writers;
