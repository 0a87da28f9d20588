//! Tables for people, JSON for programs.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Tables
    Table,
    /// JSON
    Json,
}

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output(Format);

impl Output {
    pub(crate) const fn new(format: Format) -> Self {
        Self(format)
    }

    /// Prints a list: as a table with these headings, or as a JSON array.
    pub(crate) fn list<T: Serialize>(
        self,
        items: &[T],
        headings: &[&str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> anyhow::Result<()> {
        match self.0 {
            Format::Json => print_json(&items),
            Format::Table if items.is_empty() => line("nothing found"),
            Format::Table => line(&table(headings, items.iter().map(row))),
        }
    }

    /// Prints one thing: as a table of names and values, or as a JSON object.
    pub(crate) fn one<T: Serialize>(self, item: &T, rows: Vec<(&str, String)>) -> anyhow::Result<()> {
        match self.0 {
            Format::Json => print_json(item),
            Format::Table => line(&table(&[], rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]))),
        }
    }

    /// Prints a sentence for people, and nothing for programs that asked for JSON.
    pub(crate) fn say(self, text: &str) -> anyhow::Result<()> {
        if self.0 == Format::Table { line(text) } else { Ok(()) }
    }

    /// A bar for long work; on a terminal only.
    pub(crate) fn progress(self, total: u64, unit: &str) -> ProgressBar {
        if self.0 == Format::Json || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let template = format!("{{bar:40}} {{percent:>3}} %  {{human_pos}} of {{human_len}} {unit}  {{eta}}");
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(total).with_style(style)
    }
}

/// A line on standard output.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// A table as text.
pub(crate) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    if !headings.is_empty() {
        table.set_header(headings);
    }
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(cell)));
    }
    table.trim_fmt()
}

/// Escapes whatever would move the cursor, colour the screen or reverse the direction of the text: some of what is
/// shown comes from outside.
pub(crate) fn printable(text: &str) -> String {
    let harmful = |one: char| {
        one.is_control() || matches!(one, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown = String::with_capacity(text.len());
    for one in text.chars() {
        if harmful(one) { shown.extend(one.escape_unicode()) } else { shown.push(one) }
    }
    shown
}

/// A value that may be absent.
pub(crate) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_row_and_no_rules_between_them() {
        let rows = [["1", "open"], ["17", "closed"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&["batch", "state"], rows), " batch  state\n 1      open\n 17     closed");
    }

    #[test]
    fn what_strangers_wrote_does_not_drive_the_terminal() {
        let shown = table(&[], [vec!["a\u{1b}[2J\u{9b}1m\r\nb\u{202E}c".to_owned()]]);
        assert!(shown.contains("a\\u{1b}[2J\\u{9b}1m\\u{d}\\u{a}b\\u{202e}c"), "{shown}");
    }
}
