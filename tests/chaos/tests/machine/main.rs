//! The state machine as a model, and races on it: the real functions of the database, driven without workers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod bench;
mod model;
mod races;
mod unanswered;
