//! `lethe import`: JSON Lines into the built-in store.

use anyhow::{Context as _, bail};
use clap::Subcommand;
use lethe_db::Db;
use lethe_domain::opendsr::DeniedValues;
use lethe_stores::import::{self, EventBatchLine, LineEnd, ProfileLine, Progress, Reading, SourceError};

use super::import_run::{Content, Run, Source, Summary};
use crate::context::database;
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Profiles: {"mpid":1,"identities":{"email":"…"},"attributes":{…},"audiences":[…]}; each line is the whole profile
    Profiles {
        #[command(flatten)]
        source: Source,
        /// Identity values that name nobody, in addition to empty, null, all zeros and the like; they are not indexed
        #[arg(long, env = "LETHE_DENIED_IDENTITIES", value_delimiter = ',', value_name = "VALUES")]
        denied_identities: Vec<String>,
    },
    /// Event batches: the batch object itself, with a top-level mpid
    EventBatches {
        #[command(flatten)]
        source: Source,
        /// Continue where an earlier run on this file stopped, for whatever reason
        #[arg(long, conflicts_with = "from_line")]
        resume: bool,
    },
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        let summary = match self {
            Self::Profiles { source, denied_identities } => {
                let denied = DeniedValues::new(denied_identities.iter().map(String::as_str));
                profiles(&db, &source, denied, output).await?
            }
            Self::EventBatches { source, resume } => event_batches(&db, &source, resume, output).await?,
        };
        show(&summary, output)
    }
}

fn show(summary: &Summary, output: Output) -> anyhow::Result<()> {
    let counts = [
        ("lines refused", summary.lines_refused),
        ("lines that an earlier run had stored", summary.resumed_after_line),
        ("identities left out (they name nobody)", summary.identities_left_out),
        ("e-mail addresses left out (white space, control or format characters inside)", summary.addresses_left_out),
        ("identities left out (of types that no request can name)", summary.identities_of_other_types),
        (
            "event batches without a profile (only a request that names their mpid finds them)",
            summary.batches_without_profile,
        ),
    ];
    let mut rows = vec![("lines imported", summary.lines.to_string())];
    rows.extend(counts.iter().filter(|(_, count)| *count > 0).map(|(name, count)| (*name, count.to_string())));
    if let Some(report) = summary.report.as_ref().filter(|_| summary.lines_refused > 0) {
        rows.push(("refused lines are listed in", report.display().to_string()));
    }
    output.one(summary, rows)
}

async fn check_controller(db: &Db, source: &Source) -> anyhow::Result<()> {
    if !import::controller_exists(db, &source.controller).await? {
        bail!("there is no controller {}; add it with `lethe controller add`", source.controller);
    }
    Ok(())
}

async fn profiles(db: &Db, source: &Source, denied: DeniedValues, output: Output) -> anyhow::Result<Summary> {
    check_controller(db, source).await?;
    let content = open(source, Earlier::Ignored).await?.1;
    let mut run = Run::new(source, output, false, 0)?;
    let mut left_out = import::LeftOut::default();
    let parse = move |line: &str| ProfileLine::parse(line, &denied);
    run.store_all(content, parse, async |lines: &[ProfileLine], _: &LineEnd| {
        import::profiles(db, &source.controller, lines).await?;
        for line in lines {
            left_out += line.left_out;
        }
        Ok(())
    })
    .await?;
    Ok(Summary {
        identities_left_out: left_out.nobody,
        addresses_left_out: left_out.addresses,
        identities_of_other_types: left_out.foreign,
        ..run.finish()
    })
}

async fn event_batches(db: &Db, source: &Source, resume: bool, output: Output) -> anyhow::Result<Summary> {
    check_controller(db, source).await?;
    let known = import::known(db, &source.controller).await?;
    let earlier = match (resume, source.from_line) {
        (true, _) => Earlier::GoneOnWith(known),
        (false, 1) => Earlier::Ignored,
        (false, _) => Earlier::Superseded(known),
    };
    let (mut progress, content) = open(source, earlier).await?;
    let resumed_after_line = progress.line();
    let mut run = Run::new(source, output, true, resumed_after_line)?;
    let mut without_profile = 0;
    run.store_all(content, EventBatchLine::parse, async |lines: &[EventBatchLine], end: &LineEnd| {
        let controller = &source.controller;
        without_profile += import::event_batches_of_file(db, controller, lines, end, &mut progress).await?;
        Ok(())
    })
    .await?;
    Ok(Summary { resumed_after_line, batches_without_profile: without_profile, ..run.finish() })
}

/// What earlier runs of the same file mean for this one.
enum Earlier {
    Ignored,
    /// This run continues the one that got furthest.
    GoneOnWith(Vec<Progress>),
    /// The first line was given explicitly: their records no longer account for everything that is stored.
    Superseded(Vec<Progress>),
}

/// Opens the file and skips the part that is stored already.
async fn open(source: &Source, earlier: Earlier) -> anyhow::Result<(Progress, Content)> {
    let path = source.file.clone();
    let open = move || -> Result<Option<(Progress, Content)>, SourceError> {
        let unreadable = |source| SourceError::Read { line: 1, source };
        let recognise = |known: Vec<Progress>| {
            if known.is_empty() {
                return Ok(Vec::new());
            }
            import::recognise(import::Source::open(&path)?.into_reader(), known).map_err(unreadable)
        };
        let (progress, reading) = match earlier {
            Earlier::Ignored => (Progress::default(), Reading::default()),
            Earlier::Superseded(known) => (Progress::in_place_of(&recognise(known)?), Reading::default()),
            Earlier::GoneOnWith(known) => match recognise(known)?.pop() {
                Some(furthest) => furthest,
                None => return Ok(None),
            },
        };
        let file = import::Source::open(&path)?;
        let (size, taken, mut reader) = (file.size(), file.taken(), file.into_reader());
        import::pass(&mut reader, &mut Reading::default(), progress.bytes()).map_err(unreadable)?;
        Ok(Some((progress, Content { reader, reading, size, taken })))
    };
    let opened =
        tokio::task::spawn_blocking(open).await.context("the thread that opens the file ended unexpectedly")?;
    let file = source.file.display();
    opened.with_context(|| format!("{file} cannot be imported"))?.with_context(|| {
        format!("{file} is not known: it was changed, or never imported; omit --resume to import all of it")
    })
}
