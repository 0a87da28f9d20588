//! The table on the screen and the figures as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use comfy_table::{Cell, CellAlignment, Table};
use serde_json::{Map, Value, json};

use crate::bench::Bench;
use crate::meter::{Run, median};
use crate::options::Options;
use crate::servers::Usage;

/// A row: Lethe's runs, and the raw ones where there is a baseline.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    /// The ratio that is to be reached.
    pub(crate) reach: Option<f64>,
    pub(crate) lethe: Vec<Run>,
    pub(crate) raw: Vec<Run>,
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, reach: f64) -> Self {
        Self { name: name.into(), unit, reach: Some(reach), lethe: Vec::new(), raw: Vec::new() }
    }

    fn rate(runs: &[Run]) -> Option<f64> {
        median(runs.iter().map(Run::rate))
    }

    /// Lethe's median against the raw one.
    pub(crate) fn ratio(&self) -> Option<f64> {
        Some(Self::rate(&self.lethe)? / Self::rate(&self.raw)?)
    }

    fn to_json(&self) -> Value {
        json!({
            "row": self.name,
            "unit": self.unit,
            "lethe": Self::rate(&self.lethe),
            "raw": Self::rate(&self.raw),
            "ratio": self.ratio(),
            "reach": self.reach,
            "lethe_runs": self.lethe.iter().map(Run::rate).collect::<Vec<_>>(),
            "raw_runs": self.raw.iter().map(Run::rate).collect::<Vec<_>>(),
            "lethe_usage": usage(&self.lethe),
            "raw_usage": usage(&self.raw),
        })
    }
}

fn cpu_per_item(runs: &[Run], of: impl Fn(&Run) -> Option<Usage>) -> Option<f64> {
    median(runs.iter().filter_map(|run| Some(of(run)?.cpu.as_secs_f64() * 1e6 / run.items)))
}

fn memory(runs: &[Run], of: impl Fn(&Run) -> Option<Usage>) -> Option<f64> {
    median(runs.iter().filter_map(|run| of(run)?.memory.map(|bytes| bytes as f64 / 1_048_576.0)))
}

fn usage(runs: &[Run]) -> Value {
    let of = |of: fn(&Run) -> Option<Usage>| json!({"cpu_microseconds_per_item": cpu_per_item(runs, of), "memory_mib": memory(runs, of)});
    json!({"lethe": of(|run| run.lethe), "postgresql": of(|run| run.postgresql), "rabbitmq": of(|run| run.rabbitmq)})
}

/// Named figures of one point of a curve.
type Point = Vec<(&'static str, f64)>;

/// Everything that was measured.
pub(crate) struct Report {
    name: &'static str,
    started: jiff::Timestamp,
    conditions: Value,
    rows: Vec<Row>,
    facts: Vec<(String, String, String)>,
    curves: BTreeMap<&'static str, Vec<Point>>,
}

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        let name = match options.command {
            crate::options::Command::Rows { .. } | crate::options::Command::Gain { .. } => "rows",
            crate::options::Command::Growth { .. } => "growth",
            crate::options::Command::Scale { .. } => "scale",
        };
        Self {
            name,
            started: jiff::Timestamp::now(),
            conditions: Value::Null,
            rows: Vec::new(),
            facts: Vec::new(),
            curves: BTreeMap::new(),
        }
    }

    /// Notes on what all of it was measured.
    pub(crate) async fn conditions(&mut self, bench: &Bench) {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let setting = async |name: &str| bench.world.one::<String>("SELECT current_setting($1)", &[&name]).await;
        self.conditions = json!({
            "started": self.started.to_string(),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "cpu": model.trim_start_matches([' ', '\t', ':']),
            "load_before": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
            "postgresql": setting("server_version").await,
            "fsync": setting("fsync").await,
            "synchronous_commit": setting("synchronous_commit").await,
            "shared_buffers": setting("shared_buffers").await,
            "rabbitmq": bench.rabbitmq_version().await,
            "sizes": bench.sizes,
        });
        println!("{}", serde_json::to_string_pretty(&self.conditions).unwrap());
    }

    /// Adds a row and says so.
    pub(crate) fn row(&mut self, row: Row) {
        let rate = |runs| Row::rate(runs).map_or("–".to_owned(), number);
        let ratio = row.ratio().map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
        println!("{}: {} {}, raw {}, ratio {ratio}", row.name, rate(&row.lethe), row.unit, rate(&row.raw));
        self.rows.push(row);
    }

    /// Adds a figure that has no raw side.
    pub(crate) fn fact(&mut self, name: impl Into<String>, figure: impl Into<String>, reach: impl Into<String>) {
        let (name, figure, reach) = (name.into(), figure.into(), reach.into());
        println!("{name}: {figure} (to reach: {reach})");
        self.facts.push((name, figure, reach));
    }

    /// Adds a point to a curve: named figures, the first of which is the abscissa.
    pub(crate) fn point(&mut self, curve: &'static str, figures: &[(&'static str, f64)]) {
        let text: Vec<String> = figures.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
        println!("{curve}: {}", text.join(", "));
        self.curves.entry(curve).or_default().push(figures.to_vec());
    }

    /// Writes `<name>-<date>.json`; returns where.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        std::fs::create_dir_all(folder).unwrap();
        let facts: Vec<Value> = self
            .facts
            .iter()
            .map(|(name, figure, reach)| json!({"row": name, "lethe": figure, "reach": reach}))
            .collect();
        let rows: Vec<Value> = self.rows.iter().map(Row::to_json).collect();
        let point =
            |point: &Point| point.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect::<Map<_, _>>();
        let curves: Map<String, Value> = self
            .curves
            .iter()
            .map(|(name, points)| ((*name).to_owned(), points.iter().map(point).collect::<Vec<_>>().into()))
            .collect();
        let all = json!({"conditions": self.conditions, "rows": rows, "facts": facts, "curves": curves});
        self.write_curves(folder);
        let path = folder.join(format!("{}-{}.json", self.name, self.started.strftime("%Y-%m-%dT%H-%M-%SZ")));
        std::fs::write(&path, serde_json::to_vec_pretty(&all).unwrap()).unwrap();
        path
    }
}

impl Report {
    /// Each curve once more as columns in `curves/<name>.tsv`, for the plots.
    fn write_curves(&self, folder: &Path) {
        let folder = folder.join("curves");
        std::fs::create_dir_all(&folder).unwrap();
        for (name, points) in &self.curves {
            let names: Vec<&str> = points[0].iter().map(|(name, _)| *name).collect();
            let mut text = names.join("\t") + "\n";
            for point in points {
                let values: Vec<String> = point.iter().map(|(_, value)| value.to_string()).collect();
                text += &(values.join("\t") + "\n");
            }
            std::fs::write(folder.join(format!("{name}.tsv")), text).unwrap();
        }
    }
}

/// With separators of thousands above 100, with decimals below.
fn number(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.rows.is_empty() {
            writeln!(
                f,
                "\nCPU in microseconds per item, memory in MiB; Lethe's is the peak of its workers.\n{}",
                self.table()
            )?;
        }
        if !self.facts.is_empty() {
            let mut table = Table::new();
            table.set_header(["", "Lethe", "reach"]);
            for (name, figure, reach) in &self.facts {
                table.add_row([name, figure, reach]);
            }
            writeln!(f, "{table}")?;
        }
        Ok(())
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.set_header([
            "row",
            "unit",
            "Lethe",
            "raw",
            "ratio",
            "reach",
            "CPU Lethe",
            "CPU PostgreSQL",
            "CPU RabbitMQ",
            "MiB Lethe",
            "MiB PostgreSQL",
            "MiB RabbitMQ",
        ]);
        for row in &self.rows {
            let shown = |value: Option<f64>| value.map_or("–".to_owned(), number);
            let ratio = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
            let parts: [fn(&Run) -> Option<Usage>; 3] = [|run| run.lethe, |run| run.postgresql, |run| run.rabbitmq];
            let figures =
                [shown(Row::rate(&row.lethe)), shown(Row::rate(&row.raw)), ratio(row.ratio()), ratio(row.reach)];
            let cpu = parts.map(|part| shown(cpu_per_item(&row.lethe, part)));
            let memory = parts.map(|part| shown(memory(&row.lethe, part)));
            let numbers = figures.into_iter().chain(cpu).chain(memory);
            let cells = numbers.map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
            table.add_row([Cell::new(&row.name), Cell::new(row.unit)].into_iter().chain(cells));
        }
        table
    }
}
