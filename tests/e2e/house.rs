//! The house: which crate stands on which, as docs/develop/architecture.md says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lethe_runtime::fleet::FLEET;

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

fn folders(path: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join(path)).unwrap().map(Result::unwrap);
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
fn the_table_of_workers_and_the_compose_file_name_each_of_them() {
    let workers = folders("workers");
    assert_eq!(workers, FLEET.map(|worker| worker.name.to_owned()).into());
    let compose = std::fs::read_to_string(root().join("deploy/compose.yaml")).unwrap();
    for worker in &workers {
        assert!(compose.contains(&format!("\n  {worker}:\n")), "deploy/compose.yaml has no service {worker}");
    }
}

/// `docs/develop/add-a-worker.md` says which places there are outside of the worker's folder.
#[test]
fn whoever_adds_a_worker_is_told_of_every_place_that_names_one() {
    let guide = std::fs::read_to_string(root().join("docs/develop/add-a-worker.md")).unwrap();
    let places: BTreeSet<String> =
        guide.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).map(str::to_owned).collect();
    assert!((1..=5).contains(&places.len()), "{places:?}");
    let mut found = BTreeSet::new();
    let mut open = [
        "shared",
        "deploy",
        "cli",
        "workers",
        "tests/testing",
        "tests/chaos/src",
        "tests/demo",
        "Makefile",
        "Cargo.toml",
    ]
    .map(|name| root().join(name))
    .to_vec();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        // What is the worker's own, what concerns it for what it does, and what is written down by the migrations.
        let own = name.starts_with("workers/erasure-executor/");
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if !own && ["erasure-executor", "ERASURE_EXECUTION", "Stage::Erasure"].iter().any(|sign| text.contains(sign)) {
            found.insert(name);
        }
    }
    for name in &found {
        assert!(places.iter().any(|place| name == place), "{name} names a slice worker, and the guide does not say so");
    }
}

#[test]
fn the_fault_suite_knows_every_fault_point_of_the_workers() {
    let mut sources = Vec::new();
    for folder in ["shared", "workers"] {
        rust_files(&root().join(folder), &mut sources);
    }
    let mut in_code = BTreeSet::new();
    for source in sources {
        let text = std::fs::read_to_string(source).unwrap();
        in_code.extend(text.split("fault::point(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()));
    }
    let mut known = BTreeSet::new();
    for worker in folders("workers") {
        let text = std::fs::read_to_string(root().join("workers").join(worker).join("fault-points")).unwrap();
        known.extend(text.lines().map(str::to_owned));
    }
    assert_eq!(known, in_code);
}

/// `make build` and the image ask it of what they have built; what runs the tests has fault points.
#[test]
fn a_binary_with_fault_points_is_not_taken_for_a_release() {
    for worker in FLEET {
        let binary = lethe_testing::worker::binary(worker.name);
        let asked = std::process::Command::new(root().join("deploy/no-fault-points")).arg(binary).output().unwrap();
        let said = String::from_utf8_lossy(&asked.stderr);
        assert!(!asked.status.success() && said.contains("LETHE_FAULT"), "{}: {said}", worker.name);
    }
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Adds the paths of a tree as in `use super::{a, b::{c, d}}`, from where `text` begins; returns the rest.
fn read_paths<'a>(mut text: &'a str, mut path: Vec<String>, paths: &mut Vec<Vec<String>>) -> &'a str {
    loop {
        text = text.trim_start();
        if let Some(mut inside) = text.strip_prefix('{') {
            while !inside.trim_start().starts_with('}') {
                inside = read_paths(inside, path.clone(), paths).trim_start().trim_start_matches(',');
            }
            return &inside.trim_start()[1..];
        }
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        path.push(text[..end].to_owned());
        text = &text[end..];
        match text.strip_prefix("::") {
            Some(rest) if rest.starts_with(|c: char| c.is_alphabetic() || c == '{' || c == '_') => text = rest,
            _ => break,
        }
    }
    paths.push(path);
    text.trim_start_matches(|c: char| !",};".contains(c))
}

/// The files of a crate that a file takes something from. Those that only gather others (`lib.rs`, `mod.rs`) do not count.
fn takes_from(module: &[String], text: &str, modules: &BTreeSet<Vec<String>>) -> BTreeSet<Vec<String>> {
    let code = text.split("#[cfg(test)]").next().unwrap();
    let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut paths = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            if !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c)) {
                read_paths(&code[at..], Vec::new(), &mut paths);
            }
        }
    }
    let absolute = paths.into_iter().filter_map(|path| {
        let mut from = if path[0] == "crate" { Vec::new() } else { module.to_vec() };
        for segment in &path {
            match segment.as_str() {
                "crate" | "self" => {}
                "super" => drop(from.pop()),
                name => from.push(name.to_owned()),
            }
        }
        (0..=from.len()).rev().map(|length| from[..length].to_vec()).find(|prefix| modules.contains(prefix))
    });
    absolute.filter(|taken| taken != module).collect()
}

#[test]
fn no_files_take_from_each_other_in_a_circle() {
    let mut crates =
        ["cli", "tests/demo", "tests/chaos", "tests/bench", "tests/testing"].map(|name| root().join(name)).to_vec();
    for folder in ["shared", "workers"] {
        crates.extend(folders(folder).iter().map(|name| root().join(folder).join(name)));
    }
    let (mut arrows, mut circles) = (0, Vec::new());
    for folder in crates {
        let mut files = Vec::new();
        rust_files(&folder.join("src"), &mut files);
        let texts: BTreeMap<Vec<String>, String> = files
            .iter()
            .filter(|file| !["lib.rs", "main.rs", "mod.rs"].iter().any(|name| file.ends_with(name)))
            .map(|file| {
                let path = file.strip_prefix(folder.join("src")).unwrap().with_extension("");
                let module = path.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
                (module, std::fs::read_to_string(file).unwrap())
            })
            .collect();
        let modules = texts.keys().cloned().collect();
        let takes: BTreeMap<_, _> =
            texts.iter().map(|(module, text)| (module, takes_from(module, text, &modules))).collect();
        arrows += takes.values().map(BTreeSet::len).sum::<usize>();
        for module in &modules {
            let (mut reached, mut open) = (BTreeSet::new(), vec![module]);
            while let Some(next) = open.pop() {
                open.extend(takes[next].iter().filter(|taken| reached.insert((*taken).clone())));
            }
            if reached.contains(module) {
                let with = takes[module].iter().filter(|taken| reached.contains(*taken)).map(|taken| taken.join("::"));
                circles.push(format!(
                    "{}: {} takes from {:?}",
                    folder.display(),
                    module.join("::"),
                    with.collect::<Vec<_>>()
                ));
            }
        }
    }
    assert!(circles.is_empty(), "{circles:#?}");
    assert!(arrows > 300, "only {arrows} were found");
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

#[test]
fn the_summary_lists_every_page() {
    let docs = root().join("docs").canonicalize().unwrap();
    let (mut pages, summary) = (Vec::new(), std::fs::read_to_string(docs.join("SUMMARY.md")).unwrap());
    documents(&docs, &mut pages);
    for page in pages.iter().filter(|page| !page.ends_with("SUMMARY.md")) {
        let link = page.strip_prefix(&docs).unwrap().to_str().unwrap();
        assert!(summary.contains(&format!("]({link})")), "docs/SUMMARY.md does not list {link}");
    }
}

/// Words of old, each with the one that stands for it now (docs/develop/glossary.md).
const REPLACED: [(&str, &str); 7] = [
    ("\u{ab}", "\""),
    ("\u{bb}", "\""),
    ("is no valid", "is not a valid"),
    ("no UTF-8", "invalid UTF-8"),
    ("set aside", "dead-lettered, or rejected"),
    ("driven again", "woken again"),
    ("in nobody's hand", "unleased"),
];

#[test]
fn words_that_were_replaced_do_not_come_back() {
    let mut files = Vec::new();
    documents(&root(), &mut files);
    for folder in ["cli", "shared", "workers", "tests"] {
        rust_files(&root().join(folder), &mut files);
    }
    for file in files.iter().filter(|file| !file.ends_with("CHANGELOG.md") && !file.ends_with("house.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        for (old, new) in REPLACED {
            assert!(!text.contains(old), "{}: {old:?}; write {new:?}", file.display());
        }
    }
}

#[test]
fn each_rule_stands_at_the_head_of_the_module_that_keeps_it() {
    let text = std::fs::read_to_string(root().join("docs/develop/architecture.md")).unwrap();
    let (_, rules) = text.split_once("\n## DESIGN rules\n").unwrap();
    for number in 1..=19 {
        let (_, rule) =
            rules.split_once(&format!("\n{number}. ")).unwrap_or_else(|| panic!("there is no rule {number}"));
        let (_, keeper) = rule.split_once(" Kept by `").unwrap();
        let module = std::fs::read_to_string(root().join(keeper.split('`').next().unwrap())).unwrap();
        let head: Vec<&str> = module.lines().take_while(|line| line.starts_with("//!")).collect();
        assert!(head.join("\n").contains(&format!("**Invariant** (DESIGN rule {number}):")), "rule {number}");
    }
}
