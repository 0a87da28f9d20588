//! The result file: from a stream of lines to an encrypted object, in bounded memory.
//!
//! Three parts work at once: the stores are read by the async runtime, lines are packed (deflated) and encrypted by a
//! dedicated thread, and the bytes are uploaded by the async runtime again. Short channels between them make the
//! fastest wait for the slowest.

use std::io::{self, Write};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use tokio::sync::mpsc;
use zip::write::{SimpleFileOptions, StreamWriter};
use zip::{CompressionMethod, ZipWriter};

use crate::upload::{PartSizes, Upload};
use lethe_domain::crypto::KEY_LEN;
use lethe_results::cipher::Encryptor;
use lethe_results::store::Store;
use lethe_stores::{ExportLine, StoreError};

/// What kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Access: one UTF-8 text file, JSON Lines.
    Text,
    /// Portability: a zip with `profile.jsonl` and `events-00001.jsonl`, `events-00002.jsonl`, …
    Zip {
        /// Whether `profile.jsonl` is part of it.
        include_profile: bool,
    },
}

impl Format {
    /// The media type of the download.
    #[must_use]
    pub(crate) const fn media_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; charset=utf-8",
            Self::Zip { .. } => "application/zip",
        }
    }
}

/// Unpacked bytes of one file in a zip at most.
pub(crate) const MAX_PART: u64 = 64 * 1024 * 1024;
/// Lines are handed over in bundles of about so many bytes.
const BUNDLE: usize = 128 * 1024;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    /// Bytes of the file as it is downloaded; 0 where nothing matched, and then there is no object.
    pub size: u64,
    /// Lines in it.
    pub lines: u64,
}

/// A result file could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// A data store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object store failed: full, away, or forbidden.
    #[error("the result store failed: {source}")]
    ResultStore {
        /// What it said.
        #[from]
        source: object_store::Error,
    },
    /// Packing failed.
    #[error("packing failed: {source}")]
    Pack {
        /// What the packer said.
        #[from]
        source: io::Error,
    },
}

impl FileError {
    /// A short class for slices and metrics.
    #[must_use]
    pub(crate) fn class(&self) -> String {
        match self {
            Self::Store(error) => error.class(),
            Self::ResultStore { .. } => "result_store".to_owned(),
            Self::Pack { .. } => "packing".to_owned(),
        }
    }
}

/// Writes `lines` to `path`, encrypted under `key`. On an error, and where there is no line at all, no object is left:
/// an upload becomes visible as a whole or not at all.
///
/// # Errors
/// [`FileError`].
pub(crate) async fn write(
    store: &Store,
    path: &str,
    key: &[u8; KEY_LEN],
    format: Format,
    lines: impl Stream<Item = Result<ExportLine, StoreError>>,
) -> Result<Written, FileError> {
    let upload = store.put_multipart(&Path::from(path)).await?;
    let mut upload = Upload::new(upload, PartSizes::CLOUD);
    let (bundles, packer_input) = mpsc::channel::<Vec<ExportLine>>(2);
    let (packer_output, mut encrypted) = mpsc::channel::<Bytes>(16);
    let key = *key;
    let packer = tokio::task::spawn_blocking(move || pack(&key, format, packer_input, &packer_output));

    let upload_and_close = async {
        let sent = upload_all(&mut upload, &mut encrypted).await;
        encrypted.close();
        sent
    };
    // Whichever fails first ends the others: the channels close.
    let (exported, sent) = futures_util::join!(feed(lines, bundles), upload_and_close);
    let written = packer.await.map_err(io::Error::other).flatten();
    // In this order the first cause is named: a failed upload breaks the packer, a failed export as well.
    match sent.and(exported).and_then(|()| Ok(written?)) {
        Ok(written) if written.lines > 0 => {
            upload.finish().await?;
            Ok(written)
        }
        Ok(_) => {
            upload.abort().await?;
            Ok(Written { size: 0, lines: 0 })
        }
        Err(error) => {
            // The first error is the one that tells; a failed abort leaves a staged file, which is not an object.
            let _ = upload.abort().await;
            Err(error)
        }
    }
}

async fn upload_all(upload: &mut Upload, encrypted: &mut mpsc::Receiver<Bytes>) -> Result<(), FileError> {
    while let Some(bytes) = encrypted.recv().await {
        upload.put(bytes).await?;
    }
    Ok(())
}

async fn feed(
    lines: impl Stream<Item = Result<ExportLine, StoreError>>,
    bundles: mpsc::Sender<Vec<ExportLine>>,
) -> Result<(), FileError> {
    futures_util::pin_mut!(lines);
    let (mut bundle, mut size) = (Vec::new(), 0);
    while let Some(line) = lines.next().await {
        lethe_process::fault::point("compile.mid_file");
        let line = line?;
        size += match &line {
            ExportLine::Profile(text) | ExportLine::EventBatch(text) => text.len() + 1,
        };
        bundle.push(line);
        if size >= BUNDLE {
            size = 0;
            if bundles.send(std::mem::take(&mut bundle)).await.is_err() {
                return Ok(()); // the packer has failed and says why
            }
        }
    }
    let _ = bundles.send(bundle).await;
    // An empty bundle is the end; a channel that closes without it is an export that broke off.
    let _ = bundles.send(Vec::new()).await;
    Ok(())
}

fn pack(
    key: &[u8; KEY_LEN],
    format: Format,
    mut input: mpsc::Receiver<Vec<ExportLine>>,
    output: &mpsc::Sender<Bytes>,
) -> io::Result<Written> {
    let closed = || io::Error::new(io::ErrorKind::BrokenPipe, "the upload has ended");
    let encryptor = Encryptor::new(key, |bytes| output.blocking_send(bytes).map_err(|_| closed()))?;
    let mut next = || match input.blocking_recv() {
        Some(bundle) if bundle.is_empty() => Ok(None),
        Some(bundle) => Ok(Some(bundle)),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the export ended early")),
    };
    match format {
        Format::Text => pack_text(encryptor, &mut next),
        Format::Zip { include_profile } => pack_zip(encryptor, include_profile, &mut next),
    }
}

type Next<'a> = &'a mut dyn FnMut() -> io::Result<Option<Vec<ExportLine>>>;

fn pack_text<S: FnMut(Bytes) -> io::Result<()>>(mut encryptor: Encryptor<S>, next: Next<'_>) -> io::Result<Written> {
    let mut lines = 0;
    while let Some(bundle) = next()? {
        for line in bundle {
            let (ExportLine::Profile(text) | ExportLine::EventBatch(text)) = line;
            encryptor.write_all(&text)?;
            encryptor.write_all(b"\n")?;
            lines += 1;
        }
    }
    Ok(Written { size: encryptor.finish()?, lines })
}

fn pack_zip<S: FnMut(Bytes) -> io::Result<()>>(
    encryptor: Encryptor<S>,
    include_profile: bool,
    next: Next<'_>,
) -> io::Result<Written> {
    // On event batches, level 2 packs half as small again as level 1 at three quarters of its speed; higher levels cost
    // much more than they gain.
    let options =
        SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).compression_level(Some(2));
    let mut parts = Parts { zip: ZipWriter::new_stream(encryptor), options, part: None, size: 0, number: 1 };
    let mut lines = 0;
    while let Some(bundle) = next()? {
        for line in bundle {
            match line {
                ExportLine::Profile(_) if !include_profile => continue,
                ExportLine::Profile(text) => parts.write(Part::Profile, &text)?,
                ExportLine::EventBatch(text) => parts.write(Part::Events, &text)?,
            }
            lines += 1;
        }
    }
    let stream = parts.zip.finish()?;
    Ok(Written { size: stream.into_inner().finish()?, lines })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Profile,
    Events,
}

/// The files of a zip, begun as they are needed.
struct Parts<W: Write> {
    zip: ZipWriter<StreamWriter<W>>,
    options: SimpleFileOptions,
    part: Option<Part>,
    size: u64,
    number: u32,
}

impl<W: Write> Parts<W> {
    fn write(&mut self, part: Part, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64 + 1;
        if self.part != Some(part) || self.size + length > MAX_PART {
            self.number = if self.part == Some(part) { self.number + 1 } else { 1 };
            let name = match part {
                Part::Profile if self.number == 1 => "profile.jsonl".to_owned(),
                Part::Profile => format!("profile-{:05}.jsonl", self.number),
                Part::Events => format!("events-{:05}.jsonl", self.number),
            };
            self.zip.start_file(name, self.options)?;
            (self.part, self.size) = (Some(part), 0);
        }
        self.size += length;
        self.zip.write_all(line)?;
        self.zip.write_all(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use object_store::ObjectStore;
    use object_store::memory::InMemory;

    use super::*;
    use lethe_results::cipher::Decryptor;

    const KEY: [u8; KEY_LEN] = [3; KEY_LEN];
    const ZIP: Format = Format::Zip { include_profile: true };

    fn event(number: usize, size: usize) -> ExportLine {
        ExportLine::EventBatch(format!("{number:08}{}", "x".repeat(size - 8)).into())
    }

    async fn plain(store: &Store, written: Written) -> Vec<u8> {
        let file = store.get(&Path::from("f")).await.unwrap().bytes().await.unwrap();
        Decryptor::new(&KEY, written.size).unwrap().open_all(&file).unwrap()
    }

    #[tokio::test]
    async fn a_zip_is_split_so_that_no_file_passes_64_mib() {
        let store: Store = Arc::new(InMemory::new());
        // 140 lines of 1 MiB with their line breaks: 64 fit into a file, exactly.
        let size = (1 << 20) - 1;
        let lines = (0..140).map(|number| Ok(event(number, size)));
        let profile = [Ok(ExportLine::Profile("{\"mpid\":1}".into()))];
        let lines = futures_util::stream::iter(profile.into_iter().chain(lines));
        let written = write(&store, "f", &KEY, ZIP, lines).await.unwrap();
        assert_eq!(written.lines, 141);
        let mut archive = zip::ZipArchive::new(std::io::Cursor::new(plain(&store, written).await)).unwrap();
        let mut number = 0;
        let mut files = Vec::new();
        for index in 0..archive.len() {
            let mut file = archive.by_index(index).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            files.push((file.name().unwrap().into_owned(), text.len() as u64));
            for line in text.lines().filter(|line| !line.starts_with('{')) {
                assert!(line.starts_with(&format!("{number:08}")), "in order, none missing");
                number += 1;
            }
        }
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["profile.jsonl", "events-00001.jsonl", "events-00002.jsonl", "events-00003.jsonl"]);
        assert!(files.iter().all(|(_, size)| *size <= MAX_PART), "{files:?}");
        assert_eq!(files[1].1, MAX_PART);
    }

    #[tokio::test]
    async fn an_export_that_breaks_off_leaves_no_object() {
        let store: Store = Arc::new(InMemory::new());
        for format in [Format::Text, ZIP] {
            let lines = (0..20).map(|number| Ok(event(number, 1 << 20)));
            let lines = futures_util::stream::iter(lines.chain([Err(StoreError::WritersUnderWay)]));
            let outcome = write(&store, "f", &KEY, format, lines).await;
            assert!(matches!(outcome, Err(FileError::Store(StoreError::WritersUnderWay))), "{outcome:?}");
            assert!(store.list(None).next().await.is_none(), "nothing half-written is there");
        }
    }

    #[tokio::test]
    async fn nothing_found_is_no_object() {
        let store: Store = Arc::new(InMemory::new());
        let written = write(&store, "f", &KEY, ZIP, futures_util::stream::empty()).await.unwrap();
        assert_eq!(written, Written { size: 0, lines: 0 });
        assert!(store.list(None).next().await.is_none());
    }
}
