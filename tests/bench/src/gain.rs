//! The gain over earlier binaries: their own benchmark and this one run the same rows by turns, each against its own raw
//! programs, so that both meet the same hour of the same machine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use comfy_table::Table;
use serde_json::Value;

use crate::meter::median;
use crate::options::RowName;

/// Lethe's rates and the raw ones, by row.
type Rates = BTreeMap<String, (Vec<f64>, Vec<f64>)>;

/// Runs the rows `runs` times with the binaries in `before`, and as often with ours; prints medians.
pub(crate) fn run(before: &Path, names: &[RowName], arguments: &[String], runs: u64, output: &Path) {
    let ours = std::env::current_exe().unwrap();
    let theirs = before.join("lethe-bench");
    let (mut then, mut now) = (Rates::new(), Rates::new());
    for run in 1..=runs {
        for (binary, rates, name) in [(theirs.as_path(), &mut then, "before"), (ours.as_path(), &mut now, "now")] {
            println!("run {run} of {runs}: {name}");
            measure(binary, names, arguments, &output.join(format!("gain-{name}-{run}")), rates);
        }
    }
    let mut table = Table::new();
    table.set_header(["row", "before", "now", "gain", "ratio before", "ratio now"]);
    for (row, (rates, raw)) in &now {
        let Some((earlier, earlier_raw)) = then.get(row) else { continue };
        let of = |rates: &[f64]| median(rates.iter().copied()).unwrap_or(f64::NAN);
        let cells = [of(earlier), of(rates)].map(|rate| format!("{rate:.0}"));
        let ratios = [of(rates) / of(earlier), of(earlier) / of(earlier_raw), of(rates) / of(raw)];
        let ratios = ratios.map(|ratio| format!("{ratio:.2}"));
        table.add_row([row.clone()].into_iter().chain(cells).chain(ratios));
    }
    println!("{table}");
}

fn measure(binary: &Path, names: &[RowName], arguments: &[String], folder: &Path, rates: &mut Rates) {
    let _ = std::fs::remove_dir_all(folder);
    let mut command = Command::new(binary);
    command.arg("rows").args(["--runs", "1", "--output"]).arg(folder).args(arguments);
    for name in names {
        command.arg(clap::ValueEnum::to_possible_value(name).unwrap().get_name());
    }
    assert!(command.status().unwrap().success(), "{} has failed", binary.display());
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "json")).unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for row in report["rows"].as_array().unwrap() {
        let entry = rates.entry(row["row"].as_str().unwrap().to_owned()).or_default();
        entry.0.extend(row["lethe"].as_f64());
        entry.1.extend(row["raw"].as_f64());
    }
}
