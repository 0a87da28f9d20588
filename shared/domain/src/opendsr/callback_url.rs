//! The address guard (contract 6): callbacks go to public https addresses only, unless configured otherwise.
//!
//! A URL is checked twice: at intake by syntax and literal address, without DNS; and by the courier's resolver, which
//! checks every address that a name resolves to and hands on exactly what it checked.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use url::{Host, Url};

/// Where callbacks may go beyond public https (`LETHE_CALLBACK_ALLOW`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressPolicy {
    networks: Vec<IpNet>,
    http: bool,
}

/// The text is not a valid list of CIDRs and `http`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{entry}` is neither a network such as 10.0.0.0/8 nor the word http")]
pub struct InvalidPolicy {
    entry: String,
}

impl FromStr for AddressPolicy {
    type Err = InvalidPolicy;
    fn from_str(text: &str) -> Result<Self, InvalidPolicy> {
        let mut policy = Self::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if entry == "http" {
                policy.http = true;
            } else {
                let network = entry.parse().map_err(|_| InvalidPolicy { entry: entry.to_owned() })?;
                policy.networks.push(network);
            }
        }
        Ok(policy)
    }
}

impl fmt::Display for AddressPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let networks = self.networks.iter().map(ToString::to_string);
        f.write_str(&networks.chain(self.http.then(|| "http".to_owned())).collect::<Vec<_>>().join(","))
    }
}

/// The part of a callback URL that identifies an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// `https`, or `http` where that is allowed.
    pub scheme: String,
    /// A name, lower-case, or a literal address.
    pub host: String,
    /// The default port of the scheme where the URL has none.
    pub port: u16,
}

/// Why a URL may not be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlRefusal {
    /// No absolute URL with a host.
    #[error("must be an absolute https URL")]
    NotAbsolute,
    /// Neither https nor an allowed http.
    #[error("must use https")]
    Scheme,
    /// `user:password@` in the URL.
    #[error("must not contain user information")]
    UserInformation,
    /// A literal address that is not public.
    #[error("must not name a private, local or otherwise reserved address")]
    Reserved,
    /// Longer than 2,048 characters.
    #[error("must not be longer than 2048 characters")]
    TooLong,
}

impl AddressPolicy {
    /// Checks syntax, scheme and literal address of a callback URL.
    ///
    /// # Errors
    /// [`UrlRefusal`], which says what is wrong without repeating the URL.
    pub fn check(&self, text: &str) -> Result<Origin, UrlRefusal> {
        if text.len() > 2_048 {
            return Err(UrlRefusal::TooLong);
        }
        let url = Url::parse(text).map_err(|_| UrlRefusal::NotAbsolute)?;
        match url.scheme() {
            "https" => {}
            "http" if self.http => {}
            _ => return Err(UrlRefusal::Scheme),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UrlRefusal::UserInformation);
        }
        let host = url.host().ok_or(UrlRefusal::NotAbsolute)?;
        let literal = match &host {
            Host::Ipv4(address) => Some(IpAddr::V4(*address)),
            Host::Ipv6(address) => Some(IpAddr::V6(*address)),
            // RFC 6761: these names are loopback wherever they are resolved.
            Host::Domain(name) if is_localhost(name) => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            Host::Domain(_) => None,
        };
        if literal.is_some_and(|address| !self.allows(address)) {
            return Err(UrlRefusal::Reserved);
        }
        let port = url.port_or_known_default().ok_or(UrlRefusal::NotAbsolute)?;
        Ok(Origin { scheme: url.scheme().to_owned(), host: host.to_string(), port })
    }

    /// Whether a connection to `address` may be made.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        // What a translator connects to is the address inside; that is what the rules are about.
        let address = translated(address).map_or(address, IpAddr::V4);
        is_public(address) || self.networks.iter().any(|network| network.contains(&address))
    }
}

fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

/// The IPv4 address inside one of the well-known NAT64 prefix, `64:ff9b::/96` (RFC 6052): what a resolver with DNS64 answers
/// for a host that has IPv4 only.
fn translated(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return None };
    let [0x64, 0xff9b, 0, 0, 0, 0, high, low] = address.segments() else { return None };
    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
    Some(Ipv4Addr::new(a, b, c, d))
}

/// Whether an address is public unicast. One of the well-known NAT64 prefix is what the address inside is. The other forms
/// that carry an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64 of a network's own prefix) are never public: they
/// lead wherever that leads.
#[must_use]
pub(crate) fn is_public(address: IpAddr) -> bool {
    match translated(address).map_or(address, IpAddr::V4) {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local() // 169.254.169.254, the metadata service, among them
        || address.is_documentation()
        || a == 0
        || (a == 100 && (64..128).contains(&b)) // shared address space, RFC 6598
        || (a == 192 && b == 0 && c == 0) // protocol assignments
        || (a == 192 && b == 88 && c == 99) // 6to4 relays
        || (a == 198 && (b == 18 || b == 19)) // benchmarking
        || a >= 224) // multicast, reserved, broadcast
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    // Global unicast is 2000::/3; everything outside it is reserved, local, mapped or multicast.
    (0x2000..0x4000).contains(&a)
        && !(a == 0x2001 && b < 0x0200) // protocol assignments: Teredo, ORCHID, benchmarking
        && !(a == 0x2001 && b == 0x0db8) // documentation
        && a != 0x2002 // 6to4
        && !(a == 0x3fff && b < 0x1000) // documentation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for public in [
            "93.184.216.34",
            "8.8.8.8",
            "100.63.255.255",
            "172.32.0.1",
            "2606:4700::1111",
            "2a00:1450::1",
            "64:ff9b::8.8.8.8",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for reserved in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.0.0.1",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:8.8.8.8",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b::6440:1",
            "64:ff9b:1::1",
            "64:ff9b:1::5db8:d822",
            "64:ff9b:0:0:0:1:808:808",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
            "3fff::1",
        ] {
            assert!(!is_public(reserved.parse().unwrap()), "{reserved}");
        }
    }

    #[test]
    fn urls_are_checked_by_syntax_and_literal_address() {
        let strict = AddressPolicy::default();
        let origin = strict.check("https://Example.COM/path?x=1").unwrap();
        assert_eq!(origin, Origin { scheme: "https".into(), host: "example.com".into(), port: 443 });
        for (refused, why) in [
            ("example.com/x", UrlRefusal::NotAbsolute),
            ("/x", UrlRefusal::NotAbsolute),
            ("ftp://example.com/", UrlRefusal::Scheme),
            ("http://example.com/", UrlRefusal::Scheme),
            ("https://ada:secret@example.com/", UrlRefusal::UserInformation),
            ("https://ada@example.com/", UrlRefusal::UserInformation),
            ("https://localhost/", UrlRefusal::Reserved),
            ("https://a.localhost./", UrlRefusal::Reserved),
            ("https://2130706433/", UrlRefusal::Reserved),
            ("https://0x7f.1/", UrlRefusal::Reserved),
            ("https://[::ffff:10.0.0.1]/", UrlRefusal::Reserved),
            ("https://[64:ff9b::a00:1]/", UrlRefusal::Reserved),
            ("https://[64:ff9b:1::a00:1]/", UrlRefusal::Reserved),
        ] {
            assert_eq!(strict.check(refused), Err(why), "{refused}");
        }
        assert_eq!(strict.check(&format!("https://example.com/{}", "x".repeat(2_048))), Err(UrlRefusal::TooLong));
    }

    #[test]
    fn exceptions_are_exact() {
        let policy: AddressPolicy = "127.0.0.0/8, ::1/128,http".parse().unwrap();
        assert!(policy.check("http://127.0.0.1:9000/x").is_ok());
        assert!(policy.check("http://localhost:9000/x").is_ok());
        assert_eq!(policy.check("https://10.0.0.1/"), Err(UrlRefusal::Reserved));
        assert_eq!(policy.check("https://[::ffff:127.0.0.1]/"), Err(UrlRefusal::Reserved), "mapped is another form");
        assert!(policy.check("https://[64:ff9b::7f00:1]/").is_ok(), "translated is not");
        let translators: AddressPolicy = "64:ff9b::/96".parse().unwrap();
        assert_eq!(
            translators.check("https://[64:ff9b::a00:1]/"),
            Err(UrlRefusal::Reserved),
            "the address inside counts"
        );
        assert_eq!(policy.to_string().parse(), Ok(policy));
        assert!("10.0.0.0/33".parse::<AddressPolicy>().is_err());
        assert!("anything".parse::<AddressPolicy>().is_err());
    }
}
