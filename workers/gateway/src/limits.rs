//! How often one controller, and one address, may call.

use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use lethe_domain::request::ControllerId;
use tokio_util::sync::CancellationToken;

use crate::client_address::site_of;
use crate::options::Bounds;
use crate::refusal::Refusal;

/// How often entries that no longer limit anything are forgotten.
const TIDY_EVERY: Duration = Duration::from_mins(1);

/// A /48 may log in as often as this many of its 65,536 networks.
const NETWORKS_OF_A_SITE: NonZeroU32 = NonZeroU32::new(4).unwrap();

/// The limits. Each lets through a second's (logins: a minute's) worth at once, then at its rate.
pub(crate) struct Limits {
    addresses: Limit<IpAddr>,
    logins: Limit<IpAddr>,
    /// The same for the networks from which IPv6 addresses are assigned.
    sites: Limit<IpAddr>,
    controllers: Limit<ControllerId>,
}

struct Limit<K: Hash + Eq + Clone>(DefaultKeyedRateLimiter<K>);

impl<K: Hash + Eq + Clone> Limit<K> {
    fn new(quota: fn(NonZeroU32) -> Quota, rate: NonZeroU32) -> Self {
        Self(RateLimiter::keyed(quota(rate)))
    }

    fn check(&self, key: &K) -> Result<(), Refusal> {
        self.0.check_key(key).map_err(|denied| Refusal::too_many(denied.wait_time_from(DefaultClock::default().now())))
    }

    fn tidy(&self) {
        self.0.retain_recent();
        self.0.shrink_to_fit();
    }
}

impl Limits {
    pub(crate) fn new(bounds: &Bounds) -> Self {
        Self {
            addresses: Limit::new(Quota::per_second, bounds.rate_per_address),
            logins: Limit::new(Quota::per_minute, bounds.logins_per_address),
            sites: Limit::new(Quota::per_minute, bounds.logins_per_address.saturating_mul(NETWORKS_OF_A_SITE)),
            controllers: Limit::new(Quota::per_second, bounds.rate_per_controller),
        }
    }

    /// A call from this address.
    pub(crate) fn address(&self, address: IpAddr) -> Result<(), Refusal> {
        self.addresses.check(&address)
    }

    /// Credentials from this address that have to be verified.
    pub(crate) fn login(&self, address: IpAddr) -> Result<(), Refusal> {
        self.logins.check(&address)?;
        if address.is_ipv6() { self.sites.check(&site_of(address)) } else { Ok(()) }
    }

    /// A call of this controller.
    pub(crate) fn controller(&self, controller_id: &ControllerId) -> Result<(), Refusal> {
        self.controllers.check(controller_id)
    }

    /// Forgets whoever is below the limits, so that memory does not grow with every address that ever called.
    pub(crate) async fn tidy(&self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(TIDY_EVERY) => {}
                () = shutdown.cancelled() => return,
            }
            self.addresses.tidy();
            self.logins.tidy();
            self.sites.tidy();
            self.controllers.tidy();
        }
    }
}
