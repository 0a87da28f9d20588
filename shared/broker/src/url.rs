//! Reading `AMQP_URL`. The library fills in what it does not understand (`localhost` for an IPv6 address, the user
//! `guest` for a password with a slash); here such a URL is refused instead (contract 2).

use lapin::uri::AMQPUri;
use url::{Host, Url};

use lethe_process::settings::ConfigError;

/// Seconds between two heartbeats: without them a connection that was cut silently looks alive for hours.
const HEARTBEAT: u16 = 20;
/// Bytes that every peer must take (AMQP 0-9-1, 1.4.2.6).
const FRAME_MIN: u32 = 4096;
const PARAMETERS: [&str; 5] = ["frame_max", "channel_max", "heartbeat", "connection_timeout", "auth_mechanism"];

/// The brokers that a URL names, in its order; all but host and port are the same for all of them.
pub(super) fn parse(text: &str) -> Result<Vec<AMQPUri>, ConfigError> {
    let invalid = |what: &str| ConfigError::new("AMQP_URL", what);
    let shape = || invalid("must be a URL such as amqp://user:password@host:5672/%2f");
    let (scheme, rest) = text.split_once("://").ok_or_else(shape)?;
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if tail.contains(['@', '#']) {
        return Err(invalid("must not have /, ?, # or @ in user or password; write them as %2f, %3f, %23 and %40"));
    }
    let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(user, hosts)| (user, hosts));
    let user = if user.is_empty() { String::new() } else { format!("{user}@") };
    let mut uris = Vec::new();
    for host in hosts.split(',') {
        let url = Url::parse(&format!("{scheme}://{user}{host}{tail}")).map_err(|_| shape())?;
        let mut uri: AMQPUri = url.as_str().parse().map_err(|_| shape())?;
        uri.authority.host = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => name.to_owned(),
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
            _ => return Err(invalid("names no host")),
        };
        if uri.vhost.is_empty() {
            return Err(invalid("names an empty virtual host; the default one is written /%2f"));
        }
        if let Some((name, _)) = url.query_pairs().find(|(name, _)| !PARAMETERS.contains(&&**name)) {
            let known = PARAMETERS.join(", ");
            return Err(invalid(&format!(
                "has the parameter {name:?}, which is not supported; supported are: {known}"
            )));
        }
        if uri.query.frame_max.is_some_and(|bytes| bytes < FRAME_MIN) {
            return Err(invalid("has a frame_max below 4096, the smallest that AMQP 0-9-1 allows"));
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        uris.push(uri);
    }
    Ok(uris)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str) -> Vec<(String, u16)> {
        parse(text).unwrap().into_iter().map(|uri| (uri.authority.host, uri.authority.port)).collect()
    }

    #[test]
    fn a_host_is_the_one_that_is_written() {
        assert_eq!(hosts("amqp://u:p@mq/%2f"), [("mq".to_owned(), 5672)]);
        assert_eq!(hosts("amqp://u:p@[fd00::5]:5673/%2f"), [("fd00::5".to_owned(), 5673)]);
        assert_eq!(hosts("amqps://u:p@10.0.0.7"), [("10.0.0.7".to_owned(), 5671)]);
        let three = hosts("amqp://u:p@a,[::1]:7,c:8/x");
        assert_eq!(three, [("a".to_owned(), 5672), ("::1".to_owned(), 7), ("c".to_owned(), 8)]);
        let uri = parse("amqp://u%2f1:p%40@mq/a%2fb?heartbeat=5").unwrap().remove(0);
        assert_eq!((uri.authority.userinfo.username.as_str(), uri.authority.userinfo.password.as_str()), ("u/1", "p@"));
        assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("a/b", Some(5)));
    }

    #[test]
    fn what_would_be_read_otherwise_is_refused_without_its_password() {
        for text in [
            "nonsense",
            "http://u:secret@mq/",
            "amqp:///x",
            "amqp://u:secret@/x",
            "amqp://u:secret@a,,b/x",
            "amqp://u:secret@mq/",
            "amqp://u:12/secret@mq/x",
            "amqp://u:12?secret@mq/x",
            "amqp://u:12#secret@mq/x",
            "amqp://u:secret@mq/x?cacertfile=/etc/ca.pem",
            "amqp://u:secret@mq/x#y",
            "amqp://u:secret@mq/x?frame_max=0",
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("AMQP_URL") && !message.contains("secret"), "{text}: {message}");
        }
    }
}
