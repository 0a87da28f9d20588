//! Faults for the fault suite (`docs/develop/chaos.md`): named points at which a process kills or stops itself, and planted
//! defects that the suite must catch. Only in builds with debug assertions, and only as `LETHE_FAULT` says; a release
//! build holds nothing of it.
//!
//! `LETHE_FAULT` is a list, separated by commas: `kill@POINT:N` and `stop@POINT:N` at the Nth pass of a point (SIGKILL
//! and SIGSTOP), `defect:NAME` for the life of the process.

/// A place where the suite may end or stop this process.
#[inline]
pub fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::pass(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// Whether a defect is planted; never in a release build.
#[inline]
#[must_use]
pub fn defect(name: &'static str) -> bool {
    #[cfg(debug_assertions)]
    return armed::is_planted(name);
    #[cfg(not(debug_assertions))]
    {
        let _ = name;
        false
    }
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Point {
        signal: &'static str,
        name: String,
        /// Passes until it happens.
        left: AtomicU32,
    }

    #[derive(Default)]
    struct Faults {
        points: Vec<Point>,
        defects: Vec<String>,
    }

    static FAULTS: LazyLock<Faults> =
        LazyLock::new(|| std::env::var("LETHE_FAULT").map(|text| parse(&text)).unwrap_or_default());

    fn parse(text: &str) -> Faults {
        let mut faults = Faults::default();
        for part in text.split(',') {
            if let Some(name) = part.strip_prefix("defect:") {
                faults.defects.push(name.to_owned());
                continue;
            }
            let (signal, place) = match part.split_once('@') {
                Some(("kill", place)) => ("-KILL", place),
                Some(("stop", place)) => ("-STOP", place),
                _ => continue,
            };
            let (name, passes) = place.split_once(':').unwrap_or((place, "1"));
            let left = AtomicU32::new(passes.parse().unwrap_or(1));
            faults.points.push(Point { signal, name: name.to_owned(), left });
        }
        faults
    }

    pub(super) fn pass(name: &str) {
        for point in FAULTS.points.iter().filter(|point| point.name == name) {
            // Below zero it has happened already; nobody passes a point four billion times.
            if point.left.fetch_sub(1, Ordering::SeqCst) == 1 {
                signal_self(point.signal);
            }
        }
    }

    /// By way of `kill`, since a signal to oneself takes unsafe code. All threads stand still before it returns, or
    /// soon after: this one waits for the other side of the stop.
    fn signal_self(signal: &str) {
        let id = std::process::id().to_string();
        let _ = std::process::Command::new("kill").args([signal, &id]).status();
    }

    pub(super) fn is_planted(name: &str) -> bool {
        FAULTS.defects.iter().any(|planted| planted == name)
    }

    #[cfg(test)]
    mod tests {
        use super::parse;

        #[test]
        fn points_and_defects_are_read() {
            let faults = parse("kill@a.b:3,stop@c,defect:d,nonsense");
            let points: Vec<_> = faults.points.iter().map(|p| (p.signal, p.name.as_str())).collect();
            assert_eq!(points, [("-KILL", "a.b"), ("-STOP", "c")]);
            assert_eq!(faults.points[0].left.load(std::sync::atomic::Ordering::SeqCst), 3);
            assert_eq!(faults.defects, ["d"]);
        }
    }
}
