//! Groups of lines: gathered up to a number and a size, stored in one transaction each, and halved where PostgreSQL
//! refuses one, until the line stands alone.

use std::io::BufRead;
use std::ops::Range;

use super::ImportError;
use super::rule::{InvalidLine, Rule};
use super::source::{LineEnd, Lines, SourceError};
use crate::StoreError;
use lethe_domain::disposition::Disposition;

/// How much one transaction stores at most, and what becomes of lines that cannot be taken.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Lines.
    pub lines: usize,
    /// Bytes of lines, and one line.
    pub bytes: usize,
    /// Lines before this one are passed over.
    pub from_line: u64,
    /// Whether to go on behind a line that cannot be taken.
    pub skips_invalid: bool,
}

/// Lines that are stored together.
#[derive(Debug)]
pub struct Group<T> {
    /// What was read.
    pub lines: Vec<T>,
    /// Where each of them ends.
    pub ends: Vec<LineEnd>,
    /// Lines between them that cannot be taken, by number.
    pub invalid: Vec<(u64, InvalidLine)>,
    /// Why this group is the last one; `None` if another one follows.
    pub end: Option<End>,
}

/// Why reading ends.
#[derive(Debug)]
pub enum End {
    /// The file is over.
    File,
    /// The last of the invalid lines is not passed over.
    Invalid,
    /// The file cannot be read any further.
    Unreadable(SourceError),
}

/// Gathers the next group.
pub fn gather<T>(
    lines: &mut Lines<impl BufRead>,
    limits: Limits,
    parse: impl Fn(&str) -> Result<T, InvalidLine>,
) -> Group<T> {
    let mut group = Group { lines: Vec::new(), ends: Vec::new(), invalid: Vec::new(), end: None };
    let mut bytes = 0;
    while group.lines.len() + group.invalid.len() < limits.lines && bytes < limits.bytes {
        let read = match lines.next_line() {
            Ok(None) => Err(End::File),
            Err(error) => Err(End::Unreadable(error)),
            Ok(Some(line)) => Ok(line.and_then(|text| {
                bytes += text.len();
                parse(text)
            })),
        };
        match read {
            _ if lines.number() < limits.from_line && read.is_ok() => {}
            Ok(Ok(line)) => {
                group.lines.push(line);
                group.ends.push(lines.end());
            }
            Ok(Err(invalid)) => {
                group.invalid.push((lines.number(), invalid));
                if !limits.skips_invalid {
                    group.end = Some(End::Invalid);
                    break;
                }
            }
            Err(end) => {
                group.end = Some(end);
                break;
            }
        }
    }
    group
}

/// What became of the lines of a group.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many are stored.
    pub stored: usize,
    /// Those that PostgreSQL refuses, by their place in the group.
    pub refused: Vec<(usize, InvalidLine)>,
}

/// Stores `count` lines in their order. Without `skips_invalid` nothing behind a refused line is stored.
///
/// # Errors
/// What is not to be blamed on a line.
pub async fn store(
    count: usize,
    skips_invalid: bool,
    mut store: impl AsyncFnMut(Range<usize>) -> Result<(), ImportError>,
) -> Result<Outcome, ImportError> {
    let mut outcome = Outcome::default();
    let mut left = Vec::new();
    let mut next = (count > 0).then_some(0..count);
    while let Some(range) = next.take().or_else(|| left.pop()) {
        match store(range.clone()).await {
            Ok(()) => outcome.stored += range.len(),
            Err(error) if range.len() > 1 && (is_refusal(&error) || is_too_much(&error)) => {
                let middle = range.start + range.len() / 2;
                left.push(middle..range.end);
                next = Some(range.start..middle);
            }
            Err(error) if is_refusal(&error) => {
                let sqlstate = error.sqlstate().unwrap_or_default();
                outcome.refused.push((range.start, InvalidLine::line(Rule::Refused { sqlstate })));
                if !skips_invalid {
                    break;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(outcome)
}

/// Whether the server refuses what it was given: data, checks, limits, and what a trigger raises.
fn is_refusal(error: &ImportError) -> bool {
    let ImportError::Store(error) = error else { return false };
    let is_raised = matches!(error, StoreError::Db(error) if error.is_raised());
    is_raised || error.disposition() == Disposition::Poison || error.class() == "sqlstate_P0001"
}

fn is_too_much(error: &ImportError) -> bool {
    matches!(error, ImportError::Store(StoreError::Db(error)) if error.is_too_much())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::source::Reading;

    const LIMITS: Limits = Limits { lines: 2, bytes: 100, from_line: 1, skips_invalid: true };

    fn groups(content: &str, limits: Limits) -> Vec<Group<String>> {
        let mut lines = Lines::new(content.as_bytes(), 20, Reading::default());
        let parse = |text: &str| {
            if text.contains('x') { Err(InvalidLine::line(Rule::Malformed)) } else { Ok(text.to_owned()) }
        };
        let mut groups = Vec::new();
        while groups.last().is_none_or(|group: &Group<String>| group.end.is_none()) {
            groups.push(gather(&mut lines, limits, parse));
        }
        groups
    }

    #[test]
    fn groups_are_bounded_and_stop_where_they_have_to() {
        let content = "{1}\n{x}\n\n{3}\n{4}\n{x}\n{5}\n";
        let all = groups(content, LIMITS);
        let shape: Vec<_> = all.iter().map(|group| (group.lines.len(), group.invalid.len())).collect();
        assert_eq!(shape, [(1, 1), (2, 0), (1, 1), (0, 0)]);
        assert_eq!((all[0].invalid[0].0, all[1].ends[0].number), (2, 4));
        let stopped = groups(content, Limits { skips_invalid: false, ..LIMITS });
        assert!(stopped.len() == 1 && matches!(stopped[0].end, Some(End::Invalid)));
        assert_eq!(stopped[0].lines, ["{1}"]);
        let later = groups(content, Limits { from_line: 3, lines: 10, skips_invalid: false, ..LIMITS });
        assert_eq!(later[0].lines, ["{3}", "{4}"]);
        assert_eq!(later[0].invalid[0].0, 6);
        assert_eq!(groups("{1}\n{2}\n{3}\n", Limits { bytes: 1, ..LIMITS }).len(), 4);
    }
}
