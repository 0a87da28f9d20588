//! One run over the file of an import: a thread reads and parses, groups are stored as they come, and however the
//! run ends, it reports which line was stored last.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use lethe_domain::request::ControllerId;
use lethe_stores::import::{self, End, Group, ImportError, InvalidLine, Limits, LineEnd, Lines, MAX_LINE, Reading};
use serde::Serialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::context::Usage;
use crate::output::Output;

/// Bytes of one transaction at most, and one line.
const BYTES: usize = 8 << 20;

#[derive(Debug, Args)]
pub(crate) struct Source {
    /// A file of JSON Lines, gzipped or not
    pub(super) file: PathBuf,
    /// Whose data it is
    #[arg(long, value_name = "ID")]
    pub(super) controller: ControllerId,
    /// Begin at this line
    #[arg(long, value_name = "LINE", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) from_line: u64,
    /// Skip lines that cannot be imported, and list them in the report
    #[arg(long)]
    pub(super) skip_invalid: bool,
    /// Where skipped lines are listed, by number, field and rule [default: FILE.refused.jsonl]
    #[arg(long, value_name = "FILE", requires = "skip_invalid")]
    pub(super) report: Option<PathBuf>,
    /// Maximum number of lines in a transaction
    #[arg(long, value_name = "LINES", default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) group: u32,
}

/// What an import came to.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    /// Lines that are stored.
    pub(super) lines: u64,
    /// The last line of the file that was read.
    pub(super) last_line: u64,
    /// Lines that cannot be taken.
    pub(super) lines_refused: u64,
    /// The last line that an earlier run had stored; this run continued after it.
    pub(super) resumed_after_line: u64,
    pub(super) identities_left_out: u64,
    pub(super) addresses_left_out: u64,
    pub(super) identities_of_other_types: u64,
    pub(super) batches_without_profile: u64,
    /// Where refused lines are listed.
    pub(super) report: Option<PathBuf>,
}

/// What is read: behind what an earlier run stored.
pub(super) struct Content {
    pub(super) reader: Box<dyn BufRead + Send>,
    pub(super) reading: Reading,
    /// Bytes of the file, packed as it is, and how many of them are taken.
    pub(super) size: u64,
    pub(super) taken: Arc<AtomicU64>,
}

/// A run and what it came to so far.
pub(super) struct Run<'a> {
    source: &'a Source,
    output: Output,
    /// Whether `--resume` knows the last line that is stored.
    resumes: bool,
    stop: watch::Receiver<bool>,
    report: Option<Report>,
    /// The last line that is stored.
    stored_line: u64,
    summary: Summary,
}

impl<'a> Run<'a> {
    /// `after` is the line that an earlier run stored last.
    pub(super) fn new(source: &'a Source, output: Output, resumes: bool, after: u64) -> anyhow::Result<Self> {
        let goes_on = after > 0 || source.from_line > 1;
        let report = if source.skip_invalid { Some(Report::open(source, goes_on)?) } else { None };
        let stop = listen().context("cannot listen for signals")?;
        let summary = Summary { report: report.as_ref().map(|report| report.path.clone()), ..Summary::default() };
        Ok(Self { source, output, resumes, stop, report, stored_line: after, summary })
    }

    pub(super) fn finish(self) -> Summary {
        self.summary
    }

    /// Reads lines and stores them in groups. What stands before a line that cannot be taken is stored.
    pub(super) async fn store_all<T: Send + 'static>(
        &mut self,
        content: Content,
        parse: impl Fn(&str) -> Result<T, InvalidLine> + Send + 'static,
        mut store: impl AsyncFnMut(&[T], &LineEnd) -> Result<(), ImportError>,
    ) -> anyhow::Result<()> {
        let bar = self.output.progress(content.size, "bytes");
        let taken = Arc::clone(&content.taken);
        let mut groups = read(content, self.limits(), parse);
        loop {
            let group = tokio::select! {
                biased;
                () = requested(&mut self.stop) => bail!("interrupted: {}", self.go_on()),
                group = groups.recv() => group.context("the thread that reads the file ended unexpectedly")?,
            };
            self.store_group(&group, &mut store).await?;
            bar.set_position(taken.load(Ordering::Relaxed));
            match group.end {
                None => {}
                Some(End::File) => break,
                Some(End::Invalid) => match group.invalid.last() {
                    Some((number, invalid)) => return Err(self.refusal(*number, invalid)),
                    None => break,
                },
                Some(End::Unreadable(error)) => {
                    return Err(anyhow!(error).context(format!("{}: {}", self.source.file.display(), self.go_on())));
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn limits(&self) -> Limits {
        let Source { from_line, skip_invalid, group, .. } = *self.source;
        Limits { lines: group as usize, bytes: BYTES, from_line, skips_invalid: skip_invalid }
    }

    async fn store_group<T>(
        &mut self,
        group: &Group<T>,
        store: &mut impl AsyncFnMut(&[T], &LineEnd) -> Result<(), ImportError>,
    ) -> anyhow::Result<()> {
        let mut stored_line = self.stored_line;
        let outcome = import::store(group.lines.len(), self.source.skip_invalid, async |range: Range<usize>| {
            let Some(end) = group.ends[range.clone()].last() else { return Ok(()) };
            store(&group.lines[range], end).await?;
            stored_line = end.number;
            Ok(())
        })
        .await;
        self.stored_line = stored_line;
        let outcome = outcome.map_err(|error| anyhow!(error).context(self.go_on_after_failure()))?;
        self.summary.lines += outcome.stored as u64;
        let refused = outcome.refused.iter().map(|(index, invalid)| (group.ends[*index].number, invalid));
        if !self.source.skip_invalid {
            if let Some((number, invalid)) = refused.into_iter().next() {
                return Err(self.refusal(number, invalid));
            }
            self.summary.last_line = group.ends.last().map_or(self.summary.last_line, |end| end.number);
            return Ok(());
        }
        let mut left_out: Vec<(u64, &InvalidLine)> =
            refused.chain(group.invalid.iter().map(|(number, invalid)| (*number, invalid))).collect();
        left_out.sort_by_key(|(number, _)| *number);
        if let Some(report) = &mut self.report {
            report.write(&left_out)?;
        }
        self.summary.lines_refused += left_out.len() as u64;
        let last = [group.ends.last().map(|end| end.number), left_out.last().map(|(number, _)| *number)];
        self.summary.last_line = last.into_iter().flatten().max().unwrap_or(self.summary.last_line);
        // What is left out is done with as well.
        self.stored_line = self.stored_line.max(self.summary.last_line);
        Ok(())
    }

    fn refusal(&self, number: u64, invalid: &InvalidLine) -> anyhow::Error {
        let file = self.source.file.display();
        let (way, stored) = (self.way_from(number), self.stored());
        anyhow!(
            "line {number} of {file} cannot be imported: {invalid}. Fix it and continue with {way}, or skip such lines with --skip-invalid; {stored}"
        )
    }

    fn stored(&self) -> String {
        match self.stored_line {
            0 => "this run has stored nothing".to_owned(),
            line => format!("the lines up to {line} are stored"),
        }
    }

    fn way_from(&self, line: u64) -> String {
        // Of a file of which nothing is stored, `--resume` knows nothing.
        format!("--from-line {line}{}", if self.resumes && self.stored_line > 0 { " (or --resume)" } else { "" })
    }

    fn go_on(&self) -> String {
        let next = self.source.from_line.max(self.stored_line + 1);
        format!("{}; continue with {}", self.stored(), self.way_from(next))
    }

    /// After a failed commit, only the record in the database tells whether it took place.
    fn go_on_after_failure(&self) -> String {
        if self.resumes { format!("{}, possibly more; continue with --resume", self.stored()) } else { self.go_on() }
    }
}

/// Reads and parses on a thread of its own, a little ahead.
fn read<T: Send + 'static>(
    content: Content,
    limits: Limits,
    parse: impl Fn(&str) -> Result<T, InvalidLine> + Send + 'static,
) -> mpsc::Receiver<Group<T>> {
    let (sender, groups) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        let mut lines = Lines::new(content.reader, MAX_LINE, content.reading);
        let mut is_over = false;
        while !is_over {
            let group = import::gather(&mut lines, limits, &parse);
            is_over = group.end.is_some();
            // A send fails when nobody stores any more.
            is_over |= sender.blocking_send(group).is_err();
        }
    });
    groups
}

/// Becomes true on Ctrl-C and SIGTERM: the group that is under way is finished first.
fn listen() -> std::io::Result<watch::Receiver<bool>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        let _ = sender.send(true);
    });
    Ok(receiver)
}

async fn requested(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|is_requested| *is_requested).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// By whatever names, links included.
fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
    identity(one).is_some_and(|file| identity(other) == Some(file))
}

/// The list of lines that were left out, as JSON Lines: number, field and rule, never a value.
struct Report {
    path: PathBuf,
    file: File,
}

impl Report {
    /// A new list, or an earlier one that goes on.
    fn open(source: &Source, goes_on: bool) -> anyhow::Result<Self> {
        let path = source.report.clone().unwrap_or_else(|| {
            let mut name = source.file.clone().into_os_string();
            name.push(".refused.jsonl");
            name.into()
        });
        if is_same_file(&path, &source.file) {
            let path = path.display();
            bail!(Usage(format!("the report {path} is the imported file itself; name another one with --report")));
        }
        let file = OpenOptions::new().create(true).write(true).append(goes_on).truncate(!goes_on).open(&path);
        let file = file.with_context(|| {
            format!("the report {} cannot be written; name another one with --report", path.display())
        })?;
        Ok(Self { path, file })
    }

    fn write(&mut self, lines: &[(u64, &InvalidLine)]) -> anyhow::Result<()> {
        let mut text = Vec::new();
        for (number, invalid) in lines {
            let entry = json!({
                "line": number, "field": invalid.field, "rule": invalid.rule.to_string(), "column": invalid.column,
            });
            writeln!(text, "{entry}")?;
        }
        self.file.write_all(&text).with_context(|| format!("the report {} cannot be written", self.path.display()))
    }
}
