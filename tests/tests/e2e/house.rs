//! The house: which crate stands on which, as ARCHITECTURE.md says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The crates of ours that the `[dependencies]` of a manifest name.
fn stands_on(manifest: &str) -> BTreeSet<String> {
    let (_, dependencies) = manifest.split_once("[dependencies]").unwrap();
    let dependencies = dependencies.split("\n[").next().unwrap();
    dependencies
        .lines()
        .filter_map(|line| line.strip_prefix("lethe-")?.split(['.', ' ']).next())
        .map(str::to_owned)
        .collect()
}

/// The words in backticks of a cell.
fn quoted(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_map_names_each_crate_and_what_it_stands_on() {
    let map = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let mut below = BTreeSet::new();
    let mut on_the_map = BTreeSet::new();
    for row in map.lines().filter(|line| line.starts_with("| `shared/") && line.matches('|').count() == 5) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let name = quoted(cells[0]).pop_first().unwrap();
        let name = name.trim_start_matches("shared/").trim_end_matches('/').to_owned();
        let manifest = std::fs::read_to_string(root().join("shared").join(&name).join("Cargo.toml")).unwrap();
        let stands_on = stands_on(&manifest);
        assert_eq!(stands_on, quoted(cells[3]), "{name}: the manifest, and the map");
        assert!(stands_on.is_subset(&below), "{name} stands on what comes below it on the map");
        below.insert(name.clone());
        on_the_map.insert(name);
    }
    let folders = std::fs::read_dir(root().join("shared")).unwrap().map(Result::unwrap);
    let crates: BTreeSet<String> = folders.map(|folder| folder.file_name().into_string().unwrap()).collect();
    assert_eq!(on_the_map, crates, "each crate has a row");
}

/// What a worker must not carry along, by crates that its binary would link.
#[test]
fn workers_link_only_what_they_need() {
    for (worker, not) in [
        ("erasure-executor", &["results", "delivery", "audit", "intake", "signing"][..]),
        ("callback-courier", &["results", "stores", "audit", "intake"]),
        ("access-compiler", &["delivery", "audit", "intake", "signing"]),
        ("identity-matcher", &["results", "stores", "delivery", "audit"]),
    ] {
        let manifest = std::fs::read_to_string(root().join("workers").join(worker).join("Cargo.toml")).unwrap();
        let mut all = stands_on(&manifest);
        let mut open: Vec<String> = all.iter().cloned().collect();
        while let Some(name) = open.pop() {
            let manifest = std::fs::read_to_string(root().join("shared").join(&name).join("Cargo.toml")).unwrap();
            open.extend(stands_on(&manifest).into_iter().filter(|below| all.insert(below.clone())));
        }
        for name in not {
            assert!(!all.contains(*name), "{worker} links {name}");
        }
    }
}
