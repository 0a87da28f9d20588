//! What came of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::checker::{Deliveries, Violation};
use crate::defects::DEFECTS;
use crate::world::Disk;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed that repeats it.
    pub seed: u64,
    /// The planted defect.
    pub defect: Option<String>,
    /// How long it took.
    pub elapsed: Duration,
    /// Subject requests.
    pub requests: usize,
    /// By their status; those that may be lost and are, under `not there`.
    pub outcomes: BTreeMap<String, usize>,
    /// Requests of which something was said that was then lost: not judged in every point.
    pub doubtful: usize,
    /// Messages with a meaning of their own.
    pub letters: usize,
    /// How often they were published.
    pub sent: usize,
    /// Answers that came.
    pub answers: usize,
    /// Figures of callbacks.
    pub deliveries: Deliveries,
    /// How often each kind of harm was done.
    pub harm: BTreeMap<&'static str, usize>,
    /// Processes that killed themselves at a point.
    pub fired: usize,
    /// How the disk was full.
    pub disk: Disk,
    /// What must not be.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Whether the planted defect shows by its own sign.
    pub fn is_caught(&self) -> bool {
        let planted = DEFECTS.iter().find(|(name, _)| Some(*name) == self.defect.as_deref());
        planted.is_some_and(|(_, sign)| self.violations.iter().any(|violation| violation.what.contains(sign)))
    }

    /// Where the logs of a run with violations are kept.
    pub fn folder(&self) -> PathBuf {
        let name =
            self.defect.as_deref().map_or_else(|| format!("seed-{}", self.seed), |name| format!("defect-{name}"));
        // The workspace's, wherever we are started: tests run in the folder of their package.
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/chaos")).join(name)
    }

    /// Copies the logs of the workers, and writes this report beside them.
    pub fn keep_logs(&self, logs: &Path) {
        let folder = self.folder();
        let _ = std::fs::remove_dir_all(&folder);
        let _ = std::fs::create_dir_all(&folder);
        for file in lethe_testing::results::files_below(logs) {
            let _ = std::fs::copy(&file, folder.join(file.file_name().unwrap_or_default()));
        }
        let _ = std::fs::write(folder.join("report.txt"), self.to_string());
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let defect = self.defect.as_ref().map(|name| format!(", planted: {name}")).unwrap_or_default();
        writeln!(f, "seed {}{defect}: {:.0} s", self.seed, self.elapsed.as_secs_f64())?;
        let outcomes: Vec<String> = self.outcomes.iter().map(|(status, count)| format!("{count} {status}")).collect();
        writeln!(f, "  {} requests: {}", self.requests, outcomes.join(", "))?;
        if self.doubtful > 0 {
            writeln!(
                f,
                "  {} of them not judged in every point: PostgreSQL lost what it had confirmed",
                self.doubtful
            )?;
        }
        writeln!(f, "  {} messages, published {} times, {} answers", self.letters, self.sent, self.answers)?;
        let Deliveries { attempts, accepted, repeats, late_repeats } = self.deliveries;
        writeln!(
            f,
            "  {attempts} deliveries, {accepted} callbacks accepted, {repeats} repeated ({late_repeats} behind a successor)"
        )?;
        let harm: Vec<String> = self.harm.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        writeln!(f, "  harm: {}; {} died at a point", harm.join(", "), self.fired)?;
        if self.disk == Disk::Replaced {
            writeln!(
                f,
                "  no file system could be mounted: instead of a full disk, the store's folder was taken away"
            )?;
        }
        writeln!(f, "  violations: {}", self.violations.len())?;
        for violation in self.violations.iter().take(40) {
            writeln!(f, "    [{}] {}", violation.guarantee, violation.what)?;
        }
        Ok(())
    }
}
