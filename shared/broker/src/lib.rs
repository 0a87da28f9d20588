//! RabbitMQ: the topology, supervised connections, consuming in groups, publishing with confirms.

pub mod connection;
pub mod consumer;
pub mod dead_letters;
pub mod headers;
pub mod publisher;
mod screen;
pub mod topology;
mod transport;
mod url;

pub use connection::{Broker, BrokerError, Link};
pub use consumer::{Consumer, Gather, GroupHandler, Message, Outcome};
pub use publisher::{Outgoing, Publisher};
