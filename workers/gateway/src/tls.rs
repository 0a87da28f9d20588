//! TLS by rustls; the files are read again when they change.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum_server::tls_rustls::RustlsConfig;
use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;

/// How often the files are checked for changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file cannot be read, or is not PEM of its kind.
    #[error("{path} cannot be read as PEM: {source}")]
    Unreadable {
        /// Which one.
        path: String,
        /// What the parser said.
        source: pem::Error,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("certificate and key cannot be used together: {0}")]
    Unusable(#[from] rustls::Error),
}

/// Where certificate and key lie.
#[derive(Clone, Debug)]
pub(crate) struct TlsFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl TlsFiles {
    /// Reads and checks both files.
    pub(crate) fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let unreadable = |path: &PathBuf| {
            let path = path.display().to_string();
            move |source| TlsError::Unreadable { path, source }
        };
        let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&self.certificate).and_then(Iterator::collect);
        let chain = chain.map_err(unreadable(&self.certificate))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(unreadable(&self.key))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// What changes when a file is written or replaced.
    fn changed_at(&self) -> io::Result<[(u64, i64, i64); 2]> {
        let state = |path: &Path| {
            let metadata = std::fs::metadata(path)?;
            Ok::<_, io::Error>((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
        };
        Ok([state(&self.certificate)?, state(&self.key)?])
    }

    /// Keeps `config` in step with the files. While they cannot be used, what was read before stays in force.
    pub(crate) async fn watch(self, config: RustlsConfig, shutdown: CancellationToken) {
        let mut known = self.changed_at().ok();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.cancelled() => return,
            }
            let changed = self.changed_at().ok();
            if changed.is_none() || changed == known {
                continue;
            }
            known = changed;
            match self.load() {
                Ok(loaded) => {
                    config.reload_from_config(loaded);
                    tracing::info!("the TLS certificate was read again");
                }
                Err(error) => tracing::error!(%error, "the new TLS certificate cannot be used; the old one stays"),
            }
        }
    }
}
