//! What workers are made of: booting a process, its options, logs and metrics; leases and the work under them; wake-ups;
//! messages that fail again and again.

pub mod fleet;
pub mod options;
pub mod poison;
pub mod service;
pub mod telemetry;
pub mod wake;
pub mod work;
