//! The receiver kit (`docs/guide/receiver-kit`): its program in each language that this machine has must judge every test
//! vector, and what Lethe signs now, exactly as written down.
#![allow(clippy::unwrap_used, reason = "what is missing fails the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use lethe_domain::opendsr::ApiVersion;
use lethe_domain::opendsr::answer::CallbackBody;
use lethe_domain::request::{ControllerId, RequestStatus};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::signature::Signer;
use lethe_signing::signing_keys::SigningKeys;
use lethe_testing::python::{self, must};
use lethe_testing::signing::{DOMAIN, KeyFiles};

#[path = "../../docs/guide/receiver-kit/verify.rs"]
#[expect(clippy::print_stdout, unreachable_pub, reason = "elsewhere it is a program and a module to copy")]
mod verify;

/// The kit's Rust program is whole, though the tests call [`verify::run`], which is all of it but the printing.
const _: fn() -> ExitCode = verify::main;

/// The languages that a run in CI must not leave out.
const REQUIRED: [&str; 2] = ["Python", "JavaScript"];

fn kit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide/receiver-kit")
}

/// Files of this run: below `target`.
fn scratch() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("receiver-kit");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// What the programs are given, and what they must say.
struct Case {
    name: String,
    arguments: Vec<String>,
    /// Why the callback must be refused; `None` where it is valid.
    reason: Option<String>,
}

fn committed_cases() -> Vec<Case> {
    let vectors = kit().join("vectors");
    let text = std::fs::read(vectors.join("cases.json")).unwrap();
    let cases: Vec<BTreeMap<String, Option<String>>> = serde_json::from_slice(&text).unwrap();
    let case = |fields: BTreeMap<String, Option<String>>| {
        let text = |field: &str| fields.get(field).cloned().flatten();
        let file = |field: &str| text(field).map(|file| vectors.join(file).display().to_string());
        let mut arguments = vec![
            file("certificate").unwrap(),
            text("domain").unwrap(),
            file("headers").unwrap(),
            file("body").unwrap(),
        ];
        for (option, value) in [("--at", text("at")), ("--roots", file("roots"))] {
            arguments.extend(value.into_iter().flat_map(|value| [option.to_owned(), value]));
        }
        Case { name: text("name").unwrap(), arguments, reason: text("reason") }
    };
    cases.into_iter().map(case).collect()
}

/// A callback of each version of the API, signed by Lethe's own code with fresh keys.
fn fresh_cases() -> Vec<Case> {
    let folder = scratch();
    let files = KeyFiles::write(&folder);
    let signer = Signer::new(SigningKeys::load(&files.key, &files.certificate).unwrap());
    let case = |version: &ApiVersion| {
        let body = callback(*version).to_bytes();
        let signature = signer.sign(SignatureAlgorithm::RsaPkcs1v15, &body).unwrap();
        let headers =
            BTreeMap::from([(version.domain_header(), DOMAIN.to_owned()), (version.signature_header(), signature)]);
        let write = |kind: &str, bytes: &[u8]| {
            let path = folder.join(format!("{}-{kind}.json", version.path()));
            std::fs::write(&path, bytes).unwrap();
            path.display().to_string()
        };
        let headers = write("headers", &serde_json::to_vec(&headers).unwrap());
        let arguments = vec![files.certificate.display().to_string(), DOMAIN.to_owned(), headers, write("body", &body)];
        Case { name: format!("signed now, {}", version.path()), arguments, reason: None }
    };
    ApiVersion::ALL.iter().map(case).collect()
}

fn callback(api_version: ApiVersion) -> CallbackBody<'static> {
    static CONTROLLER: std::sync::OnceLock<ControllerId> = std::sync::OnceLock::new();
    CallbackBody {
        controller_id: CONTROLLER.get_or_init(|| "acme".parse().unwrap()),
        expected_completion_time: "2026-12-09T12:30:00Z".parse().unwrap(),
        status_callback_url: "https://controller.example.com/dsr/callbacks",
        subject_request_id: "3f0c7d52-8a41-4e6b-9d27-5b1e0c94a7f1".parse().unwrap(),
        group_id: None,
        request_status: RequestStatus::Completed,
        api_version,
        results_url: None,
        results_count: None,
        extensions: None,
    }
}

/// The program of one language: a command that takes a case's arguments.
struct Program {
    language: &'static str,
    command: Vec<PathBuf>,
}

/// One for each language on this machine. Says which are missing, and fails in CI where one must not be.
fn programs() -> Vec<Program> {
    let found = [
        ("Python", find("python3", "--version", || vec![python::with_cryptography(), kit().join("verify.py")])),
        ("JavaScript", find("node", "--version", || vec!["node".into(), kit().join("verify.mjs")])),
        ("Go", find("go", "version", || vec![built_go()])),
    ];
    let ci = std::env::var_os("CI").is_some();
    let mut programs = Vec::new();
    for (language, command) in found {
        let Some(command) = command else {
            assert!(!(ci && REQUIRED.contains(&language)), "receiver kit: {language} is missing, and CI is set");
            eprintln!("receiver kit: {language} is not on this machine; its program was not run");
            continue;
        };
        programs.push(Program { language, command });
    }
    programs
}

fn find(program: &str, version: &str, command: impl FnOnce() -> Vec<PathBuf>) -> Option<Vec<PathBuf>> {
    let answers = Command::new(program).arg(version).output().is_ok_and(|output| output.status.success());
    answers.then(command)
}

fn built_go() -> PathBuf {
    let program = scratch().join("verify-go");
    must("go", ["build".as_ref(), "-o".as_ref(), program.as_os_str(), kit().join("verify.go").as_os_str()]);
    program
}

/// What a program said: nothing against it, or the reason. Anything but the two agreed forms is an error.
fn judged(program: &Program, case: &Case) -> Result<Option<String>, String> {
    let (first, rest) = program.command.split_first().unwrap();
    let output = Command::new(first).args(rest).args(&case.arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match (output.status.code(), stdout.as_ref(), stderr.trim_end()) {
        (Some(0), "valid\n", "") => Ok(None),
        (Some(1), "", reason) => Ok(Some(reason.to_owned())),
        _ => Err(format!("{}, stdout {stdout:?}, stderr {stderr:?}", output.status)),
    }
}

#[test]
fn every_language_judges_every_vector_as_written_down() {
    let programs = programs();
    let cases: Vec<Case> = committed_cases().into_iter().chain(fresh_cases()).collect();
    let mut deviations = Vec::new();
    for case in &cases {
        let rust = verify::run(case.arguments.iter().cloned()).err().map(|error| error.to_string());
        let others = programs.iter().map(|program| (program.language, judged(program, case)));
        for (language, verdict) in std::iter::once(("Rust", Ok(rust))).chain(others) {
            if verdict.as_ref() != Ok(&case.reason) {
                deviations.push(format!("{language}, {}: {verdict:?}, not {:?}", case.name, case.reason));
            }
        }
    }
    let languages: Vec<&str> = std::iter::once("Rust").chain(programs.iter().map(|one| one.language)).collect();
    println!("receiver kit: {} cases in {}", cases.len(), languages.join(", "));
    assert!(deviations.is_empty(), "{}", deviations.join("\n"));
}

#[test]
fn the_bodies_are_as_lethe_writes_them() {
    let bodies = kit().join("vectors/bodies");
    let v3 = callback(ApiVersion::V3);
    let v1 = CallbackBody {
        group_id: Some("Grüße – Köln, 東京"),
        request_status: RequestStatus::InProgress,
        results_url: Some("https://privacy.processor.example/v1/results/c2FtcGxlLXRva2Vu".to_owned()),
        results_count: Some(3),
        ..callback(ApiVersion::V1)
    };
    for (file, body) in [("v3.json", v3), ("v1.json", v1)] {
        assert_eq!(std::fs::read(bodies.join(file)).unwrap(), body.to_bytes(), "{file}");
    }
}

/// Nobody can sign with the keys of the vectors: `make.py` throws them away.
#[test]
fn no_private_key_is_kept() {
    let mut folders = vec![kit()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let text = std::fs::read(&path).unwrap();
                assert!(!text.windows(11).any(|part| part == b"PRIVATE KEY"), "{}", path.display());
            }
        }
    }
}
