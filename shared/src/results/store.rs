//! Where result files and keys lie: `file://`, `s3://`, `gs://`, `az://` (contract 2).

use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use url::Url;

use crate::config::ConfigError;

/// An object store under a prefix.
pub type Store = Arc<dyn ObjectStore>;

/// Opens the store that `url` names. A folder is made if it is missing, and tried out, so that a wrong path or missing
/// rights show at the start. Credentials of cloud stores come from their usual environment variables.
///
/// # Errors
/// [`ConfigError`] for `setting`.
pub fn open(setting: &'static str, url: &Url) -> Result<Store, ConfigError> {
    let invalid = |problem: String| ConfigError::new(setting, problem);
    if url.scheme() == "file" {
        let folder = url.to_file_path().map_err(|()| invalid("must be an absolute file:///… URL".to_owned()))?;
        let unusable =
            |error: std::io::Error| invalid(format!("the folder {} cannot be used: {error}", folder.display()));
        std::fs::create_dir_all(&folder).map_err(unusable)?;
        let probe = folder.join(format!(".probe-{}", std::process::id()));
        std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe)).map_err(unusable)?;
        let store = LocalFileSystem::new_with_prefix(&folder).map_err(|error| invalid(error.to_string()))?;
        // A result is recorded as complete right after it was written: it must survive the power cut in between.
        return Ok(Arc::new(store.with_fsync(true)));
    }
    let environment = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
    let (store, prefix) =
        object_store::parse_url_opts(url, environment).map_err(|error| invalid(format!("cannot be used: {error}")))?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

/// Deletes an object; one that is not there counts as deleted.
///
/// # Errors
/// What the store says.
pub async fn delete(store: &Store, path: &str) -> Result<(), object_store::Error> {
    match store.delete(&Path::from(path)).await {
        Err(object_store::Error::NotFound { .. }) => Ok(()),
        outcome => outcome,
    }
}

/// Reads a small object; `None` where it is not there.
///
/// # Errors
/// What the store says.
pub async fn read(store: &Store, path: &str) -> Result<Option<Vec<u8>>, object_store::Error> {
    match store.get(&Path::from(path)).await {
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
        Ok(object) => Ok(Some(object.bytes().await?.to_vec())),
    }
}

/// Writes a small object unless it is there; `false` where it is.
///
/// # Errors
/// What the store says.
pub async fn create(store: &Store, path: &str, content: Vec<u8>) -> Result<bool, object_store::Error> {
    let options = object_store::PutMode::Create.into();
    match store.put_opts(&Path::from(path), PutPayload::from(content), options).await {
        Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
        outcome => outcome.map(|_| true),
    }
}
