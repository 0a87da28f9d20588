//! TLS to PostgreSQL with the `sslmode` of libpq. tokio-postgres itself knows disable, prefer and require only, so the
//! URL is taken apart here: `verify-ca` and `verify-full` check the certificate, `sslrootcert` names whom to trust.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;
use url::form_urlencoded;

use super::DbError;

/// How much of the server's certificate is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verification {
    /// `disable`, `prefer`, `require`: encryption at most, as libpq does it.
    None,
    /// `verify-ca`: the chain, but not the name.
    Chain,
    /// `verify-full`: chain and name.
    Full,
}

/// The connection's settings without what only we understand, and the connector that does what was asked.
pub(super) fn parse(text: &str) -> Result<(tokio_postgres::Config, MakeRustlsConnect), DbError> {
    let invalid = |what: &str| DbError::Url(format!("DATABASE_URL {what}"));
    let shape = || invalid("must be a URL: postgres://user:password@host:5432/database");
    let (scheme, rest) = text.split_once("://").ok_or_else(shape)?;
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err(invalid("must begin with postgres://"));
    }
    let (place, query) = rest.split_once('?').map_or((rest, ""), |(place, query)| (place, query));
    let (authority, database) = place.split_once('/').unwrap_or((place, ""));
    if database.contains('@') || query.contains('@') || text.contains('#') {
        return Err(invalid("must not have /, ?, # or @ in user or password; write them as %2f, %3f, %23 and %40"));
    }
    let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
    let elsewhere =
        hosts.is_empty() && form_urlencoded::parse(query.as_bytes()).any(|(name, _)| name.starts_with("host"));
    if hosts.split(',').any(str::is_empty) && !elsewhere {
        return Err(invalid("names no host"));
    }
    let (mut mode, mut root) = (None, None);
    let mut kept = form_urlencoded::Serializer::new(String::new());
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "sslmode" => mode = Some(value.into_owned()),
            "sslrootcert" => root = Some(value.into_owned()),
            _ => drop(kept.append_pair(&name, &value)),
        }
    }
    // A blank is written as in forms; the driver reads it as in paths. A plus itself is %2B here.
    let kept = kept.finish().replace('+', "%20");
    let (ssl_mode, verification) = match mode.as_deref() {
        Some("disable") => (SslMode::Disable, Verification::None),
        None | Some("prefer" | "allow") => (SslMode::Prefer, Verification::None),
        // As libpq: with a root certificate at hand, `require` checks the chain.
        Some("require") if root.is_some() => (SslMode::Require, Verification::Chain),
        Some("require") => (SslMode::Require, Verification::None),
        Some("verify-ca") => (SslMode::Require, Verification::Chain),
        Some("verify-full") => (SslMode::Require, Verification::Full),
        Some(_) => {
            return Err(invalid("has an unknown sslmode; use disable, prefer, require, verify-ca or verify-full"));
        }
    };
    let mut config: tokio_postgres::Config =
        format!("{scheme}://{place}?{kept}").parse().map_err(|error| invalid(&format!("cannot be used: {error}")))?;
    config.ssl_mode(ssl_mode);
    Ok((config, connector(verification, root.as_deref())?))
}

fn connector(verification: Verification, root: Option<&str>) -> Result<MakeRustlsConnect, DbError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let failed = |error: rustls::Error| DbError::Url(format!("TLS cannot be set up: {error}"));
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(failed)?;
    let config = if verification == Verification::None {
        let verifier = Arc::new(Lenient { chain: None, provider });
        builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
    } else {
        let roots = Arc::new(trusted(root)?);
        if verification == Verification::Full {
            builder.with_root_certificates(roots).with_no_client_auth()
        } else {
            let chain = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|error| DbError::Url(format!("sslrootcert cannot be used: {error}")))?;
            let verifier = Arc::new(Lenient { chain: Some(chain), provider });
            builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        }
    };
    Ok(MakeRustlsConnect::new(config))
}

fn trusted(root: Option<&str>) -> Result<RootCertStore, DbError> {
    let mut roots = RootCertStore::empty();
    match root {
        None | Some("system") => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Some(path) => {
            let unreadable = |error| DbError::Url(format!("sslrootcert {path} cannot be read: {error}"));
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                let added = roots.add(certificate.map_err(unreadable)?);
                added.map_err(|error| DbError::Url(format!("sslrootcert {path} is not a CA certificate: {error}")))?;
            }
        }
    }
    if roots.is_empty() {
        return Err(DbError::Url("no trusted certificate was found; name one with sslrootcert".to_owned()));
    }
    Ok(roots)
}

/// Checks the chain without the name (`verify-ca`), or nothing (`require`), exactly as libpq defines these modes.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_those_of_libpq() {
        for (mode, expected) in [
            ("", SslMode::Prefer),
            ("?sslmode=disable", SslMode::Disable),
            ("?sslmode=require&application_name=x", SslMode::Require),
            ("?sslmode=verify-full", SslMode::Require),
        ] {
            let (config, _) = parse(&format!("postgres://u:p@h/d{mode}")).unwrap();
            assert_eq!(config.get_ssl_mode(), expected, "{mode}");
        }
    }

    #[test]
    fn other_settings_come_through_as_they_are() {
        let (config, _) = parse("postgres://u:p@h/d?options=-c%20work_mem%3D8MB&sslmode=disable").unwrap();
        assert_eq!(config.get_options(), Some("-c work_mem=8MB"));
    }

    #[test]
    fn several_hosts_and_literals_are_those_that_are_written() {
        let text = "postgres://u:p%2f%40@a:1,[fd00::5]:2,c/d?sslmode=disable&target_session_attrs=read-write";
        let (config, _) = parse(text).unwrap();
        let hosts = ["a", "fd00::5", "c"].map(|name| tokio_postgres::config::Host::Tcp(name.to_owned()));
        assert_eq!((config.get_hosts(), config.get_ports()), (&hosts[..], &[1, 2, 5432][..]));
        assert_eq!((config.get_password(), config.get_dbname()), (Some(&b"p/@"[..]), Some("d")));
    }

    #[test]
    fn a_host_may_stand_among_the_parameters() {
        let (config, _) = parse("postgres:///d?host=/run/postgresql&sslmode=disable").unwrap();
        assert_eq!(config.get_hosts(), [tokio_postgres::config::Host::Unix("/run/postgresql".into())]);
    }

    #[test]
    fn what_cannot_be_used_is_said_without_the_password() {
        for url in [
            "mysql://u:secret@h/d",
            "nonsense",
            "postgres://u:secret@h/d?sslmode=maybe",
            "postgres://u:secret@h/d?sslmode=verify-ca&sslrootcert=/nowhere.pem",
            "postgres://u:secret@/d",
            "postgres://u:secret@a,,b/d",
            "postgres://u:12/secret@h/d",
            "postgres://u:12?secret@h/d",
            "postgres://u:12#secret@h/d",
            "postgres://u:secret@h/d?host_name=x",
        ] {
            let message = parse(url).err().unwrap().to_string();
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
