//! The fault suite: requests with a known outcome go through the real binaries while a seeded driver does harm; then an
//! independent checker reads the end state from outside and lists every violation of the guarantees.
//! `docs/develop/chaos.md` tells how to run it, repeat it and read it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "a harness fails the run that uses it, and every function of it may"
)]

pub mod checker;
pub mod defects;
pub mod driver;
pub mod fleet;
pub mod latecomers;
pub mod people;
pub mod plan;
pub mod post;
pub mod receiver;
pub mod report;
pub mod run;
pub mod world;
