//! Where result files and keys lie: `file://`, `s3://`, `gs://`, `az://` (contract 2).

use std::path::PathBuf;
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
    if let Some(folder) = folder_of(setting, url)? {
        let probe = folder.join(format!(".probe-{}", std::process::id()));
        let tried = std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&probe, b""))
            .and_then(|()| std::fs::remove_file(&probe));
        tried.map_err(|error| unusable(setting, &folder, &error))?;
    }
    open_to_read(setting, url)
}

/// The same for whoever only reads: a folder that is there needs no rights to write.
///
/// # Errors
/// [`ConfigError`] for `setting`.
pub fn open_to_read(setting: &'static str, url: &Url) -> Result<Store, ConfigError> {
    let invalid = |problem: String| ConfigError::new(setting, problem);
    if let Some(folder) = folder_of(setting, url)? {
        let readable = std::fs::read_dir(&folder).map(drop).or_else(|_| std::fs::create_dir_all(&folder));
        readable.map_err(|error| unusable(setting, &folder, &error))?;
        let store = LocalFileSystem::new_with_prefix(&folder).map_err(|error| invalid(error.to_string()))?;
        // A result is recorded as complete right after it was written: it must survive the power cut in between.
        return Ok(Arc::new(store.with_fsync(true)));
    }
    let environment = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
    let (store, prefix) =
        object_store::parse_url_opts(url, environment).map_err(|error| invalid(format!("cannot be used: {error}")))?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

/// The folder, where the store is one.
fn folder_of(setting: &'static str, url: &Url) -> Result<Option<PathBuf>, ConfigError> {
    if url.scheme() != "file" {
        return Ok(None);
    }
    let folder = url.to_file_path();
    folder.map(Some).map_err(|()| ConfigError::new(setting, "must be an absolute file:///… URL"))
}

fn unusable(setting: &'static str, folder: &std::path::Path, error: &std::io::Error) -> ConfigError {
    ConfigError::new(setting, format!("the folder {} cannot be used: {error}", folder.display()))
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

/// Deletes what a process left that died while it wrote the object at `path` into the folder of `url`: a file beside it,
/// under a name that no object can have. Cloud stores need a rule of their own for uploads that were never completed.
///
/// # Errors
/// What the file system says.
pub fn delete_unfinished(url: &Url, path: &str) -> std::io::Result<()> {
    let Some(object) = (url.scheme() == "file").then(|| url.to_file_path().ok()).flatten().map(|one| one.join(path))
    else {
        return Ok(());
    };
    let (Some(folder), Some(name)) = (object.parent(), object.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().and_then(|one| one.strip_prefix(name)?.strip_prefix('#')).is_some() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_finished_goes_and_its_neighbours_stay() {
        let folder = std::env::temp_dir().join(format!("lethe-store-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("7")).unwrap();
        for name in ["1", "1#1", "1#2", "11#1", "2"] {
            std::fs::write(folder.join("7").join(name), b"x").unwrap();
        }
        let url = Url::from_directory_path(&folder).unwrap();
        delete_unfinished(&url, "7/1").unwrap();
        delete_unfinished(&url, "8/1").unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(folder.join("7")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["1", "11#1", "2"]);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
