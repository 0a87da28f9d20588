//! How far a file of event batches is stored. Written in the transaction that stores the batches; a later run recognises
//! the file by the digest of its beginning (ADR 0038).

use std::io::{self, BufRead, Read};

use uuid::Uuid;

use super::ImportError;
use super::source::{LineEnd, Reading};
use lethe_db::{Db, DbError, Tx, statements};
use lethe_domain::request::ControllerId;

statements! {
    KNOWN_PROGRESS = "
        SELECT import_id, bytes, lines, sha256 FROM lethe.import_progress
         WHERE controller_id = $1 ORDER BY stored_at DESC LIMIT 10000";
    /// An import that is over for long is not gone on with.
    FORGET_PROGRESS = "
        DELETE FROM lethe.import_progress WHERE stored_at < clock_timestamp() - interval '90 days'";
    BEGIN_PROGRESS = "
        INSERT INTO lethe.import_progress (import_id, controller_id, bytes, lines, sha256) VALUES ($1, $2, $3, $4, $5)";
    /// The condition keeps two runs of one import from storing the same lines.
    MOVE_PROGRESS = "
        UPDATE lethe.import_progress SET bytes = $3, lines = $4, sha256 = $5, stored_at = clock_timestamp()
         WHERE import_id = $1 AND controller_id = $2 AND bytes = $6";
    SUPERSEDE_PROGRESS = "
        DELETE FROM lethe.import_progress WHERE controller_id = $1 AND import_id = ANY ($2)";
}

/// How far one import is.
#[derive(Clone, Debug)]
pub struct Progress {
    import_id: Uuid,
    /// The end of the last line that is stored; `None` before the first.
    stored: Option<LineEnd>,
    /// Earlier runs that count no more as soon as this one has stored something.
    superseded: Vec<Uuid>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { import_id: Uuid::new_v4(), stored: None, superseded: Vec::new() }
    }
}

impl Progress {
    /// A new run, in the place of earlier ones: to go on with one of these would store once more what this run stores.
    #[must_use]
    pub fn in_place_of(earlier: &[(Self, Reading)]) -> Self {
        Self { superseded: earlier.iter().map(|(progress, _)| progress.import_id).collect(), ..Self::default() }
    }

    /// The number of the last line that is stored; 0 before the first.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.stored.as_ref().map_or(0, |end| end.number)
    }

    /// Bytes up to the end of that line.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.stored.as_ref().map_or(0, |end| end.bytes)
    }

    /// Moves on to `end`, in the transaction that stores what lies before it. Call [`Self::stored`] after its commit.
    pub(super) async fn record(&self, tx: &Tx, controller_id: &ControllerId, end: &LineEnd) -> Result<(), ImportError> {
        let (bytes, lines) = (signed(end.bytes), signed(end.number));
        let moved = match &self.stored {
            None => {
                if !self.superseded.is_empty() {
                    tx.execute(SUPERSEDE_PROGRESS, &[controller_id, &self.superseded]).await?;
                }
                tx.execute(BEGIN_PROGRESS, &[&self.import_id, controller_id, &bytes, &lines, &end.sha256]).await?
            }
            Some(before) => {
                let before = signed(before.bytes);
                let params: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
                    [&self.import_id, controller_id, &bytes, &lines, &end.sha256, &before];
                tx.execute(MOVE_PROGRESS, &params).await?
            }
        };
        if moved == 1 { Ok(()) } else { Err(ImportError::Overtaken) }
    }

    pub(super) fn stored(&mut self, end: &LineEnd) {
        self.stored = Some(end.clone());
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The imports of a controller that could be gone on with. Forgets those of all controllers that are long over.
///
/// # Errors
/// [`DbError`].
pub async fn known(db: &Db, controller_id: &ControllerId) -> Result<Vec<Progress>, DbError> {
    let session = db.session().await?;
    session.execute(FORGET_PROGRESS, &[]).await?;
    let rows = session.query(KNOWN_PROGRESS, &[controller_id]).await?;
    let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
    let progress = rows.iter().map(|row| {
        let end = LineEnd {
            bytes: unsigned(row.get("bytes")),
            number: unsigned(row.get("lines")),
            sha256: row.get("sha256"),
        };
        Progress { import_id: row.get("import_id"), stored: Some(end), superseded: Vec::new() }
    });
    Ok(progress.collect())
}

/// Which imports began with the same content, the one that came furthest last. What was read of `reader` up to the end of
/// each is returned with it; `reader` itself may be further.
///
/// # Errors
/// What reading failed with.
pub fn recognise(mut reader: impl BufRead, mut known: Vec<Progress>) -> io::Result<Vec<(Progress, Reading)>> {
    known.sort_by_key(Progress::bytes);
    let (mut reading, mut found) = (Reading::default(), Vec::new());
    for progress in known {
        let Some(end) = &progress.stored else { continue };
        pass(&mut reader, &mut reading, end.bytes)?;
        if reading.bytes < end.bytes {
            break;
        }
        reading.number = end.number;
        if reading.end() == *end {
            found.push((progress, reading.clone()));
        }
    }
    Ok(found)
}

/// Reads up to `bytes` from the beginning, or to the end.
///
/// # Errors
/// What reading failed with.
pub fn pass(reader: &mut impl BufRead, reading: &mut Reading, bytes: u64) -> io::Result<()> {
    let mut reader = reader.take(bytes.saturating_sub(reading.bytes));
    loop {
        let piece = reader.fill_buf()?;
        if piece.is_empty() {
            return Ok(());
        }
        reading.take(piece);
        let length = piece.len();
        reader.consume(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(content: &[u8], lines: u64) -> Progress {
        let mut reading = Reading::default();
        reading.take(content);
        reading.number = lines;
        Progress { stored: Some(reading.end()), ..Progress::default() }
    }

    #[test]
    fn a_file_is_known_by_its_longest_beginning() {
        let content = b"{1}\n{2}\n{3}\n";
        let known = || {
            vec![progress(content, 3), progress(b"{1}\n", 1), progress(b"{1}\n{x}\n", 2), progress(b"{1}\n{2}\n", 2)]
        };
        let line =
            |content: &[u8]| recognise(content, known()).unwrap().last().map_or(0, |(progress, _)| progress.line());
        assert_eq!(line(content), 3);
        assert_eq!(line(b"{1}\n{2}\n{3}\n{4}\n"), 3, "it has grown");
        assert_eq!(line(b"{1}\n{2}\n{mended}\n"), 2);
        assert_eq!(line(b"{1}"), 0);
        assert_eq!(line(b"{2}\n{1}\n"), 0);
        let all = recognise(&content[..], known()).unwrap();
        let lines: Vec<u64> = all.iter().map(|(progress, _)| progress.line()).collect();
        assert_eq!(lines, [1, 2, 3]);
        let (_, reading) = all.last().unwrap();
        assert_eq!((reading.number, reading.bytes), (3, 12));
    }
}
