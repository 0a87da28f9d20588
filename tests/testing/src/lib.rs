//! The harness of the end-to-end tests: a [`World`] of its own for each test (database, virtual host, folders, keys),
//! the real binaries as [`Worker`]s, a [`Publisher`] that asks as controllers do, a [`Receiver`] of callbacks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "a harness fails the test that uses it, and every function of it may"
)]

pub mod callbacks;
pub mod cli;
pub mod details;
pub mod erasure;
pub mod gateway;
pub mod history;
pub mod odd;
pub mod plans;
pub mod proxy;
pub mod publisher;
pub mod python;
pub mod raw;
pub mod requests;
pub mod results;
pub mod s3;
pub mod servers;
pub mod signing;
pub mod wait;
pub mod worker;
pub mod world;

pub use callbacks::{Receiver, Reply};
pub use gateway::Gateway;
pub use odd::{Certified, Odd, OddReceiver};
pub use publisher::{Answer, Publisher};
pub use requests::Request;
pub use wait::{eventually, eventually_some};
pub use worker::{SECONDS, Worker, seconds_with};
pub use world::World;
