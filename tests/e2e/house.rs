//! The house: which crate stands on which, as docs/develop/architecture.md says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lethe_runtime::fleet::WORKERS;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
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
    let map = std::fs::read_to_string(root().join("docs/develop/architecture.md")).unwrap();
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

/// The lists of workers that no compiler sees; CONTRIBUTING names each of these places.
const LISTS: [&str; 4] = ["Makefile", "deploy/local/fleet", "deploy/Dockerfile", "deploy/compose.yaml"];

#[test]
fn whoever_adds_a_worker_is_told_of_every_list_of_them() {
    let folders = std::fs::read_dir(root().join("workers")).unwrap().map(Result::unwrap);
    let workers: BTreeSet<String> = folders.map(|folder| folder.file_name().into_string().unwrap()).collect();
    assert_eq!(workers, WORKERS.map(str::to_owned).into(), "shared/runtime/src/fleet.rs, and the folders");
    let contributing = std::fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let (_, how_to) = contributing.split_once("## Add a worker").unwrap();
    let how_to = how_to.split("\n## ").next().unwrap();
    for file in LISTS {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        for worker in &workers {
            assert!(text.contains(worker.as_str()), "{file} does not name {worker}");
        }
        assert!(how_to.contains(file), "CONTRIBUTING does not say that {file} lists the workers");
    }
    assert!(how_to.contains("shared/runtime/src/fleet.rs"));
}

fn is_markdown(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

/// The Markdown files of the repository.
fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            documents(&path, found);
        } else if is_markdown(&path) {
            found.push(path);
        }
    }
}

/// The heading as its anchor.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let mut files = Vec::new();
    documents(&root(), &mut files);
    assert!(files.len() > 20, "{files:?}");
    let mut broken = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (path, wanted) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            if link.contains("://") || link.contains(' ') || link.contains('`') {
                continue;
            }
            let target = if path.is_empty() { file.clone() } else { file.parent().unwrap().join(path) };
            let is_there = match wanted {
                Some(wanted) if path.is_empty() || is_markdown(&target) => {
                    std::fs::read_to_string(&target).is_ok_and(|text| {
                        text.lines().any(|line| line.starts_with('#') && anchor(line.trim_start_matches('#')) == wanted)
                    })
                }
                _ => target.exists(),
            };
            if !is_there {
                broken.push(format!("{}: {link}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
