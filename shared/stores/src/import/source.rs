//! The file of an import: packed or not, line by line, in bounded memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::digest::{self, Context};
use flate2::bufread::MultiGzDecoder;

use super::rule::{InvalidLine, Rule};
use lethe_domain::opendsr::json::{BYTE_ORDER_MARK, is_utf16};

/// The longest line, in bytes: one line must fit into one file of a portability result.
pub const MAX_LINE: u64 = 64 * 1024 * 1024 - 1;
/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;
/// Bytes by which a file shows what it is.
const HEAD: u64 = 4;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no such file, or it is not to be read.
    #[error("it cannot be opened: {source}")]
    Open {
        /// What the system said.
        source: io::Error,
    },
    /// The system failed, or a packed file is damaged or cut off.
    #[error("line {line} cannot be read: {source}")]
    Read {
        /// The number of the line.
        line: u64,
        /// What went wrong.
        source: io::Error,
    },
    /// The file is UTF-16.
    #[error("the file is UTF-16; turn it into UTF-8 (`iconv -f UTF-16 -t UTF-8`)")]
    Utf16,
}

/// What a file holds, unpacked.
pub struct Source {
    reader: Box<dyn BufRead + Send>,
    size: u64,
    taken: Arc<AtomicU64>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Counts what is read of a file as it lies on the disk.
struct Counting {
    file: File,
    taken: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.taken.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl Source {
    /// Opens a file of JSON Lines, which may be packed with gzip.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let unreadable = |source| SourceError::Read { line: 1, source };
        let file = File::open(path).map_err(|source| SourceError::Open { source })?;
        let size = file.metadata().map_err(unreadable)?.len();
        let taken = Arc::new(AtomicU64::new(0));
        let counting = Counting { file, taken: Arc::clone(&taken) };
        let reader = Self::unpacked(BufReader::with_capacity(BUFFER, counting)).map_err(unreadable)?;
        Ok(Self { reader: reader.ok_or(SourceError::Utf16)?, size, taken })
    }

    /// `None` for UTF-16.
    fn unpacked(mut reader: impl BufRead + Send + 'static) -> io::Result<Option<Box<dyn BufRead + Send>>> {
        let head = head_of(&mut reader)?;
        let whole = Cursor::new(head.clone()).chain(reader);
        if head.starts_with(&[0x1f, 0x8b]) {
            let mut reader = BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole));
            let head = head_of(&mut reader)?;
            return Ok((!is_utf16(&head)).then(|| Box::new(Cursor::new(head).chain(reader)) as _));
        }
        Ok((!is_utf16(&head)).then(|| Box::new(whole) as _))
    }

    /// The size of the file, packed as it is.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// How much of it is read, to be looked at from elsewhere.
    #[must_use]
    pub fn taken(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.taken)
    }

    /// What it holds.
    #[must_use]
    pub fn into_reader(self) -> Box<dyn BufRead + Send> {
        self.reader
    }
}

fn head_of(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    reader.take(HEAD).read_to_end(&mut head)?;
    Ok(head)
}

/// The end of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineEnd {
    /// The line's number, from 1.
    pub number: u64,
    /// Bytes up to here, unpacked.
    pub bytes: u64,
    /// SHA-256 of these bytes.
    pub sha256: Vec<u8>,
}

/// A digest of what was read, which goes on.
#[derive(Clone)]
pub struct Reading {
    /// Lines, the last one included.
    pub(super) number: u64,
    pub(super) bytes: u64,
    pub(super) digest: Context,
    /// Nothing was read, or a line break last: what comes next is a new line.
    is_at_line: bool,
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("number", &self.number).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Default for Reading {
    fn default() -> Self {
        Self { number: 0, bytes: 0, digest: Context::new(&digest::SHA256), is_at_line: true }
    }
}

impl Reading {
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.digest.update(bytes);
        self.is_at_line = bytes.last().map_or(self.is_at_line, |last| *last == b'\n');
    }

    pub(super) fn end(&self) -> LineEnd {
        let sha256 = self.digest.clone().finish().as_ref().to_vec();
        LineEnd { number: self.number, bytes: self.bytes, sha256 }
    }
}

/// What comes next of a source.
enum Next {
    Line,
    GivenUp(Rule),
    End,
}

/// The lines of a source, one at a time.
pub struct Lines<R> {
    reader: R,
    limit: u64,
    reading: Reading,
    buffer: Vec<u8>,
    /// The line before is given up, and its rest is still to be passed over.
    is_inside: bool,
}

impl<R> std::fmt::Debug for Lines<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").field("reading", &self.reading).finish_non_exhaustive()
    }
}

impl<R: BufRead> Lines<R> {
    /// Goes on in `reader` behind what was read of it. A line of more than `limit` bytes is never held as a whole.
    pub const fn new(reader: R, limit: u64, reading: Reading) -> Self {
        Self { reader, limit, reading, buffer: Vec::new(), is_inside: false }
    }

    /// The next line that is not blank: its text, without the line end, or why it cannot be taken. `None` at the end.
    ///
    /// # Errors
    /// [`SourceError::Read`].
    pub fn next_line(&mut self) -> Result<Option<Result<&str, InvalidLine>>, SourceError> {
        loop {
            let line = self.reading.number + 1;
            match self.read().map_err(|source| SourceError::Read { line, source })? {
                Next::End => return Ok(None),
                Next::GivenUp(rule) => return Ok(Some(Err(InvalidLine::line(rule)))),
                Next::Line if text_of(&self.buffer).trim_ascii().is_empty() => {}
                Next::Line => break,
            }
        }
        let text = std::str::from_utf8(text_of(&self.buffer));
        Ok(Some(text.map_err(|error| InvalidLine::at(Rule::NotUtf8, error.valid_up_to()))))
    }

    /// The end of the line that was read last.
    pub fn end(&self) -> LineEnd {
        self.reading.end()
    }

    /// The number of the line that was read last.
    pub const fn number(&self) -> u64 {
        self.reading.number
    }

    /// Reads a line, or as much of it as shows that it cannot be taken.
    fn read(&mut self) -> io::Result<Next> {
        if std::mem::take(&mut self.is_inside) {
            self.pass_over()?;
        }
        let piece = self.reader.fill_buf()?;
        if piece.is_empty() {
            return Ok(Next::End);
        }
        // A file whose last line had no end when it was read has grown: what comes first is the rest of that line.
        self.reading.number += u64::from(self.reading.is_at_line);
        // All of a file may be one array on one line: its beginning tells, and the rest is never held.
        if piece.split(|byte| *byte == b'\n').next().is_some_and(is_array) {
            self.is_inside = true;
            return Ok(Next::GivenUp(Rule::Array));
        }
        self.buffer.clear();
        self.reader.by_ref().take(self.limit + 2).read_until(b'\n', &mut self.buffer)?;
        self.reading.take(&self.buffer);
        self.is_inside = !self.buffer.ends_with(b"\n") && !self.reader.fill_buf()?.is_empty();
        let is_too_long = self.is_inside || text_of(&self.buffer).len() as u64 > self.limit;
        Ok(if is_too_long { Next::GivenUp(Rule::TooLong) } else { Next::Line })
    }

    fn pass_over(&mut self) -> io::Result<()> {
        loop {
            let piece = self.reader.fill_buf()?;
            let end = piece.iter().position(|byte| *byte == b'\n').map(|index| index + 1);
            let length = end.unwrap_or(piece.len());
            self.reading.take(&piece[..length]);
            self.reader.consume(length);
            if end.is_some() || length == 0 {
                return Ok(());
            }
        }
    }
}

/// A line without its end, and without a byte order mark: files that were put together have one in the middle.
fn text_of(line: &[u8]) -> &[u8] {
    let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
    let end = line.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n')).map_or(0, |index| index + 1);
    &line[..end]
}

fn is_array(line: &[u8]) -> bool {
    text_of(line).trim_ascii_start().starts_with(b"[")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    /// Number and text, or rule, of each line.
    fn lines(content: impl Read, limit: u64) -> Vec<(u64, Result<String, Rule>)> {
        let mut lines = Lines::new(BufReader::with_capacity(16, content), limit, Reading::default());
        let mut all = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            let line = line.map(str::to_owned).map_err(|invalid| invalid.rule);
            all.push((lines.number(), line));
        }
        all
    }

    fn text(number: u64, text: &str) -> (u64, Result<String, Rule>) {
        (number, Ok(text.to_owned()))
    }

    #[test]
    fn line_ends_blank_lines_and_marks_are_left_out() {
        let content = b"\xef\xbb\xbf{1}\r\n\r\n   \r\n\xef\xbb\xbf{2}\n\n{3}";
        assert_eq!(lines(&content[..], 100), [text(1, "{1}"), text(4, "{2}"), text(6, "{3}")]);
        assert_eq!(lines(&b""[..], 100), []);
    }

    #[test]
    fn a_line_has_a_limit_and_what_follows_is_read() {
        let content = b"{234567890}\n{2345678901}\r\n{23456789012345678901234567890}\n{}\n";
        let expected = [text(1, "{234567890}"), (2, Err(Rule::TooLong)), (3, Err(Rule::TooLong)), text(4, "{}")];
        assert_eq!(lines(&content[..], 11), expected);
        assert_eq!(lines(&b"x\xff\n{}"[..], 11), [(1, Err(Rule::NotUtf8)), text(2, "{}")]);
        assert_eq!(lines(&b"\n [1,\n2]\n{}"[..], 11), [(2, Err(Rule::Array)), text(3, "2]"), text(4, "{}")]);
    }

    /// Gives the same piece for ever; its reader ends, or the test never does.
    fn endless(piece: &'static [u8]) -> Lines<impl BufRead> {
        struct Endless(&'static [u8]);
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let length = buffer.len().min(self.0.len());
                buffer[..length].copy_from_slice(&self.0[..length]);
                Ok(length)
            }
        }
        Lines::new(BufReader::new(Endless(piece)), 1 << 20, Reading::default())
    }

    #[test]
    fn a_line_that_does_not_end_is_given_up_in_bounded_memory() {
        for (piece, rule) in [(&b"{\"mpid\":1,"[..], Rule::TooLong), (b"[{\"mpid\":1},", Rule::Array)] {
            let mut lines = endless(piece);
            assert_eq!(lines.next_line().unwrap().unwrap().unwrap_err().rule, rule);
            assert!(lines.buffer.capacity() <= 4 << 20);
        }
    }

    fn unpacked(content: Vec<u8>) -> Option<Vec<u8>> {
        let mut reader = Source::unpacked(Cursor::new(content)).unwrap()?;
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        Some(all)
    }

    fn packed(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn gzip_is_unpacked_and_utf16_is_told() {
        assert_eq!(unpacked(b"{}\n".to_vec()).unwrap(), b"{}\n");
        assert_eq!(unpacked(Vec::new()).unwrap(), b"");
        let twice = [packed(b"{\"a\":1}\n"), packed(b"{}\n")].concat();
        assert_eq!(unpacked(twice).unwrap(), b"{\"a\":1}\n{}\n", "files that were put together");
        let utf16: Vec<u8> = "\u{feff}{}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(unpacked(utf16.clone()).is_none() && unpacked(packed(&utf16)).is_none());
        assert!(unpacked(b"{\0}\0".to_vec()).is_none(), "without a mark");
        let mut cut = packed(&b"{\"mpid\":1}\n".repeat(10_000));
        cut.truncate(cut.len() - 20);
        let mut reader = Source::unpacked(Cursor::new(cut)).unwrap().unwrap();
        assert!(reader.read_to_end(&mut Vec::new()).is_err(), "a file that was cut off is not taken for whole");
    }

    #[test]
    fn the_end_of_a_line_that_had_none_is_not_a_line() {
        for (before, grown) in [("{1}\n{2}", "\n{3}\n"), ("{1}\n{2}", "\r\n{3}\n"), ("{1}\n{2}\n", "{3}\n")] {
            let mut reading = Reading::default();
            reading.take(before.as_bytes());
            reading.number = 2;
            let mut rest = Lines::new(grown.as_bytes(), 100, reading);
            assert_eq!(rest.next_line().unwrap(), Some(Ok("{3}")));
            let whole = [before, grown].concat();
            let sha256 = lethe_domain::crypto::sha256(whole.as_bytes()).to_vec();
            assert_eq!(rest.end(), LineEnd { number: 3, bytes: whole.len() as u64, sha256 }, "{grown:?}");
        }
    }

    #[test]
    fn a_digest_goes_on_where_it_was() {
        let content = b"{1}\n{2}\n\n{3}";
        let mut whole = Lines::new(&content[..], 100, Reading::default());
        let mut ends = Vec::new();
        while whole.next_line().unwrap().is_some() {
            ends.push(whole.end());
        }
        assert_eq!(
            ends[1],
            LineEnd { number: 2, bytes: 8, sha256: lethe_domain::crypto::sha256(&content[..8]).to_vec() }
        );
        let mut reading = Reading::default();
        reading.take(&content[..8]);
        reading.number = 2;
        let mut rest = Lines::new(&content[8..], 100, reading);
        assert_eq!(rest.next_line().unwrap(), Some(Ok("{3}")));
        assert_eq!(Some(&rest.end()), ends.last());
    }
}
