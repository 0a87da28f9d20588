//! The workers, by name: whatever starts or counts them all takes them from here.

/// Every worker, by the name of its binary and of its folder under `workers/`.
pub const WORKERS: [&str; 6] =
    ["scheduler", "identity-matcher", "erasure-executor", "access-compiler", "callback-courier", "gateway"];
