//! The gateway keeps to its own `OpenAPI` document: schemathesis makes up calls from it, well-formed and not, and
//! checks what comes back.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what is missing fails the test")]

use std::process::Command;

use lethe_testing::{Gateway, Request, SECONDS, Worker, World, python, seconds_with};

/// The version that the virtual environment gets.
const PACKAGE: &str = "schemathesis==4.32.5";

/// Left out: `negative_data_rejection` and `positive_data_acceptance` (the parser ignores unknown fields, takes what
/// clients really send, and refuses what a schema cannot say, such as strangers' addresses for callbacks),
/// `missing_required_header` and `ignored_auth` (discovery, certificate and downloads need no credentials; tested in
/// `gateway_errors`), `unsupported_method` and `allow_header_conformance` (tested there as well), `use_after_free`,
/// `ensure_resource_availability` and `object_level_authorization` (a cancelled request remains; tested in
/// `gateway_isolation`).
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
                      response_headers_conformance";

/// Calls made up per operation; there are about twenty operations.
const EXAMPLES: &str = "10";

#[tokio::test]
async fn the_gateway_keeps_to_its_document() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let rates: [(&str, &str); 3] = [
        ("LETHE_RATE_PER_CONTROLLER", "100000"),
        ("LETHE_RATE_PER_ADDRESS", "100000"),
        ("LETHE_LOGINS_PER_ADDRESS", "100000"),
    ];
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &seconds_with(&rates)).await;
    let _compiler = Worker::start(&world, "access-compiler", SECONDS).await;
    let caller = gateway.caller(&world, "acme");
    let request = Request::access("ada@example.com").group("family");
    caller.request(&request).await;
    let token = caller.result_path(&request.id).await.rsplit('/').next().unwrap().to_owned();
    // Made-up ids and tokens are all unknown: some calls are given those that exist.
    let config = world.folder.join("schemathesis.toml");
    let text = format!(
        "[parameters]\n\"path.id\" = [\"{}\", \"{}\", \"not-a-uuid\"]\n\"path.token\" = [\"{token}\", \"unknown\"]\n",
        request.id,
        uuid::Uuid::new_v4()
    );
    std::fs::write(&config, text).unwrap();
    let suffices = |python: &std::path::Path| {
        let check =
            "from importlib.metadata import version; raise SystemExit('schemathesis==' + version('schemathesis') != '";
        let check = format!("{check}{PACKAGE}')");
        Command::new(python).args(["-c", &check]).output().is_ok_and(|output| output.status.success())
    };
    let python = python::environment("schemathesis", PACKAGE, suffices);
    let mut command = tokio::process::Command::new(python.with_file_name("schemathesis"));
    command.current_dir(&world.folder).kill_on_drop(true);
    command.arg("--config-file").arg(&config).args(["run", &format!("http://{}/openapi.json", gateway.address)]);
    command.args(["--auth", &format!("{}:{}", caller.key, caller.secret), "--checks", CHECKS]);
    command.args(["--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1"]);
    // With several workers, its generator of data sometimes fails within itself.
    command.args(["--workers", "1", "--no-shrink", "--warnings", "off", "--request-timeout", "10"]);
    // Found by name: a plug-in or a key of the machine's own must not change what is tested.
    command.env_remove("SCHEMATHESIS_HOOKS").env("NO_PROXY", "*");
    let output = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(output.status.success(), "{said}");
    assert!(said.contains("No issues found"), "{said}");
    // Beside ours: some of what it made up was good enough to be taken.
    let accepted: i64 = world.one("SELECT count(*) FROM lethe.requests", &[]).await;
    println!("{accepted} requests were accepted");
    assert!(accepted > 1, "{said}");
}
