//! Where result files and keys lie: `file://`, `s3://`, `gs://`, `az://` (contract 2).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use url::Url;

use lethe_process::settings::ConfigError;

/// An object store under a prefix.
pub type Store = Arc<dyn ObjectStore>;

/// Opens the store that `url` names. A folder is made if it is missing, and tried out, so that a wrong path or missing
/// rights show at the start. Credentials of cloud stores come from their usual environment variables.
///
/// # Errors
/// [`ConfigError`] for `setting`.
pub fn open(setting: &'static str, url: &Url) -> Result<Store, ConfigError> {
    if let Some(folder) = folder_at(setting, url)? {
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
    if let Some(folder) = folder_at(setting, url)? {
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
fn folder_at(setting: &'static str, url: &Url) -> Result<Option<PathBuf>, ConfigError> {
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

/// How long one call of an object store may take, tries included. A store may accept a connection and never answer.
pub const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Objects that are deleted at once.
const DELETED_AT_ONCE: usize = 16;

/// An object could not be deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The store said so.
    #[error(transparent)]
    Store(#[from] object_store::Error),
    /// The store said nothing.
    #[error("no answer within {limit:?}")]
    Silent {
        /// How long it was waited for.
        limit: Duration,
    },
    /// A file that was never finished stands in the way.
    #[error("a file that was never finished cannot be deleted: {0}")]
    Unfinished(#[from] std::io::Error),
}

/// Deletes objects, several at once, each within [`CALL_LIMIT`]; the outcome of each by its name. One that cannot be deleted
/// keeps no other.
pub(crate) async fn delete_all<N: Send>(
    store: &Store,
    objects: impl IntoIterator<Item = (N, String)> + Send,
) -> Vec<(N, Result<(), DeleteError>)> {
    let deletions = objects.into_iter().map(|(name, path)| async move {
        let outcome = match tokio::time::timeout(CALL_LIMIT, delete(store, &path)).await {
            Ok(outcome) => outcome.map_err(DeleteError::from),
            Err(_) => Err(DeleteError::Silent { limit: CALL_LIMIT }),
        };
        (name, outcome)
    });
    several_at_once(deletions).await
}

async fn several_at_once<T>(calls: impl Iterator<Item: Future<Output = T>>) -> Vec<T> {
    // Made before they are awaited: the iterator does not live across an await.
    let calls: Vec<_> = calls.collect();
    futures_util::stream::iter(calls).buffer_unordered(DELETED_AT_ONCE).collect().await
}

/// The folder of the object at a path. Each lies in one; otherwise it is one that is not there, so that nothing else goes.
#[must_use]
pub fn folder_of(path: &str) -> String {
    path.rsplit_once('/').map_or(path, |(folder, _)| folder).to_owned()
}

/// What lies in a folder at a moment, finished or not. What comes later is not deleted with it.
#[derive(Debug, Default)]
pub struct Content {
    objects: Vec<String>,
    unfinished: Vec<PathBuf>,
}

impl Content {
    /// Looks into a folder of the store at `url`.
    ///
    /// # Errors
    /// [`DeleteError`]: what the store says, or that it says nothing.
    pub async fn of(store: &Store, url: &Url, folder: &str) -> Result<Self, DeleteError> {
        Ok(Self { unfinished: unfinished(url, folder)?, objects: list(store, folder).await? })
    }

    /// Deletes it; each call within [`CALL_LIMIT`].
    ///
    /// # Errors
    /// [`DeleteError`] of the first object that could not be deleted; the others are.
    pub async fn delete(self, store: &Store) -> Result<(), DeleteError> {
        for file in self.unfinished {
            match std::fs::remove_file(file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        let objects = self.objects.into_iter().map(|path| ((), path));
        delete_all(store, objects).await.into_iter().try_for_each(|((), outcome)| outcome)
    }
}

/// Deletes all that lies in folders, several at once; the outcome of each by its name. One that cannot be deleted keeps no
/// other.
pub async fn empty_all<N: Send>(
    store: &Store,
    url: &Url,
    folders: impl IntoIterator<Item = (N, String)> + Send,
) -> Vec<(N, Result<(), DeleteError>)> {
    let emptied = folders.into_iter().map(|(name, folder)| async move {
        let outcome = match Content::of(store, url, &folder).await {
            Ok(content) => content.delete(store).await,
            Err(error) => Err(error),
        };
        (name, outcome)
    });
    several_at_once(emptied).await
}

/// The paths of the objects in a folder, within [`CALL_LIMIT`].
async fn list(store: &Store, folder: &str) -> Result<Vec<String>, DeleteError> {
    let folder = Path::from(folder);
    let listed = store.list(Some(&folder)).map_ok(|object| object.location.to_string()).try_collect();
    let listed = tokio::time::timeout(CALL_LIMIT, listed).await;
    listed.map_err(|_| DeleteError::Silent { limit: CALL_LIMIT })?.map_err(DeleteError::from)
}

/// Whether a store can keep keys that are destroyed one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// It refuses to write a key twice, and keeps no versions.
    Fit,
    /// It refuses to write a key twice; whether it keeps versions cannot be seen from here.
    Unknown,
    /// It writes over a key that is there, or knows no conditional writes: of two processes that make the key of a day, one
    /// would lose what it has encrypted.
    NoConditionalWrites,
    /// It keeps what is deleted as an older version: a destroyed key would still be there.
    Versioned,
}

impl Fitness {
    /// Keys may be kept there.
    #[must_use]
    pub const fn is_fit(self) -> bool {
        matches!(self, Self::Fit | Self::Unknown)
    }

    /// What was found, for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fit => "refuses to write a key twice, and keeps no versions",
            Self::Unknown => "refuses to write a key twice; whether it keeps versions cannot be determined",
            Self::NoConditionalWrites => "does not refuse to write a key that already exists",
            Self::Versioned => "keeps versions of what is deleted",
        }
    }
}

/// Tries out whether the store at `url` can keep keys: writes an object twice, and removes it.
///
/// # Errors
/// Where the store cannot be asked.
pub async fn probe(store: &Store, url: &Url) -> Result<Fitness, DeleteError> {
    let limit = CALL_LIMIT;
    let asked = tokio::time::timeout(limit, probe_unbounded(store, url)).await;
    Ok(asked.map_err(|_| DeleteError::Silent { limit })??)
}

async fn probe_unbounded(store: &Store, url: &Url) -> Result<Fitness, object_store::Error> {
    let path = Path::from(format!("probe-{}", uuid::Uuid::new_v4()));
    let create = || store.put_opts(&path, PutPayload::from_static(b"probe"), object_store::PutMode::Create.into());
    let fitness = match create().await {
        Ok(written) => match create().await {
            Err(object_store::Error::AlreadyExists { .. }) => versions(url, written.version.as_deref()),
            _ => Fitness::NoConditionalWrites,
        },
        // It may be away, or know no conditional writes at all: then it takes the others.
        Err(error) => match store.put(&path, PutPayload::from_static(b"probe")).await {
            Ok(_) => Fitness::NoConditionalWrites,
            Err(_) => return Err(error),
        },
    };
    let _ = store.delete(&path).await;
    Ok(fitness)
}

/// S3 and Azure name a version where versions are kept. Google Cloud Storage numbers every object.
fn versions(url: &Url, version: Option<&str>) -> Fitness {
    match (url.scheme(), version) {
        ("gs", _) => Fitness::Unknown,
        (_, None | Some("null" | "")) => Fitness::Fit,
        (_, Some(_)) => Fitness::Versioned,
    }
}

/// What processes left that died while they wrote objects into a folder of the store at `url`: files beside them, under names
/// that no object can have. Cloud stores need a rule of their own for uploads that were never completed.
fn unfinished(url: &Url, folder: &str) -> std::io::Result<Vec<PathBuf>> {
    let Some(store) = (url.scheme() == "file").then(|| url.to_file_path().ok()).flatten() else {
        return Ok(Vec::new());
    };
    let entries = match std::fs::read_dir(store.join(folder)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains('#') {
            files.push(entry.path());
        }
    }
    Ok(files)
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
    fn a_version_tells_that_versions_are_kept_but_for_google() {
        let at = |url: &str, version| versions(&url.parse().unwrap(), version);
        assert_eq!(at("s3://keys", None), Fitness::Fit);
        assert_eq!(at("s3://keys", Some("null")), Fitness::Fit);
        assert_eq!(at("s3://keys", Some("3/L4kqtJl")), Fitness::Versioned);
        assert_eq!(at("az://keys", Some("2026-11-26T02:00:00Z")), Fitness::Versioned);
        assert_eq!(at("gs://keys", Some("1732586400")), Fitness::Unknown);
    }

    #[tokio::test]
    async fn a_folder_and_memory_are_fit() {
        let memory: Store = Arc::new(object_store::memory::InMemory::new());
        assert_eq!(probe(&memory, &"memory:///".parse().unwrap()).await.unwrap(), Fitness::Fit);
        let folder = std::env::temp_dir().join(format!("lethe-fit-{}", std::process::id()));
        let url = Url::from_directory_path(&folder).unwrap();
        let store = open("LETHE_KEY_STORE", &url).unwrap();
        assert_eq!(probe(&store, &url).await.unwrap(), Fitness::Fit);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "nothing is left");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn what_lies_in_a_folder_goes_finished_or_not_and_what_comes_later_and_its_neighbours_stay() {
        let folder = std::env::temp_dir().join(format!("lethe-store-{}", std::process::id()));
        for (place, names) in [("7", &["1-a", "1-a#1", "1-a#2"][..]), ("70", &["1-b"])] {
            std::fs::create_dir_all(folder.join(place)).unwrap();
            for name in names {
                std::fs::write(folder.join(place).join(name), b"x").unwrap();
            }
        }
        let url = Url::from_directory_path(&folder).unwrap();
        let store = open("LETHE_RESULT_STORE", &url).unwrap();
        let content = Content::of(&store, &url, "7").await.unwrap();
        for name in ["2-b", "2-b#1"] {
            std::fs::write(folder.join("7").join(name), b"x").unwrap();
        }
        content.delete(&store).await.unwrap();
        Content::of(&store, &url, "8").await.unwrap().delete(&store).await.unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(folder.join("7")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["2-b", "2-b#1"]);
        assert!(folder.join("70/1-b").exists());
        let all = empty_all(&store, &url, [(7, folder_of("7/2-b")), (70, folder_of("70/1-b"))]).await;
        assert!(all.iter().all(|(_, outcome)| outcome.is_ok()), "{all:?}");
        assert!(!folder.join("7/2-b").exists() && !folder.join("70/1-b").exists());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
