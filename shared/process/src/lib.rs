//! What every part of a process may need, whatever it does: settings, health, fault points, waiting for servers.

pub mod fault;
pub mod health;
pub mod reconnect;
pub mod settings;
