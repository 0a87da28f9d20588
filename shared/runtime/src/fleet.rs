//! The workers: one table, read by their `main`s and by whatever starts, counts or kills them all.

/// What a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    /// The name of the binary, and of its folder under `workers/`.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The database role that it works under; `None` for that of its user.
    pub role: Option<&'static str>,
}

/// `workers/scheduler/`
pub const SCHEDULER: WorkerSpec = WorkerSpec {
    name: "scheduler",
    about: "Closes batches, releases them as batch triggers, wakes late work, expires results and seals the audit trail",
    role: None,
};
/// `workers/identity-matcher/`
pub const IDENTITY_MATCHER: WorkerSpec = WorkerSpec {
    name: "identity-matcher",
    about: "Takes requests in, validates and records them, and resolves identities to profiles",
    role: None,
};
/// `workers/erasure-executor/`
pub const ERASURE_EXECUTOR: WorkerSpec =
    WorkerSpec { name: "erasure-executor", about: "Erases one slice of a batch from every data store", role: None };
/// `workers/access-compiler/`
pub const ACCESS_COMPILER: WorkerSpec = WorkerSpec {
    name: "access-compiler",
    about: "Compiles one access or portability request into a result file",
    role: None,
};
/// `workers/callback-courier/`
pub const CALLBACK_COURIER: WorkerSpec =
    WorkerSpec { name: "callback-courier", about: "Delivers signed status callbacks, with backoff", role: None };
/// `workers/gateway/`
pub const GATEWAY: WorkerSpec = WorkerSpec {
    name: "gateway",
    about: "Serves OpenDSR v1, v2 and v3, and downloads, over HTTP",
    role: Some("lethe_gateway"),
};

/// Every worker.
pub const FLEET: [WorkerSpec; 6] =
    [SCHEDULER, IDENTITY_MATCHER, ERASURE_EXECUTOR, ACCESS_COMPILER, CALLBACK_COURIER, GATEWAY];
