//! Python tools that tests run, each in a virtual environment that is made once.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python of the virtual environment `venv-<name>` below the local folder (`LETHE_LOCAL_DIR`, else `.local`).
/// Where it does not suffice yet, it is made, with `package`, a requirement with its version.
pub fn environment(name: &str, package: &str, suffices: impl Fn(&Path) -> bool) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let local = std::env::var_os("LETHE_LOCAL_DIR").map_or_else(|| root.join(".local"), |local| root.join(local));
    let environment = local.join(format!("venv-{name}"));
    let python = environment.join("bin/python");
    std::fs::create_dir_all(&local).unwrap();
    // Tests run beside each other, in processes of their own: one makes it, the others wait.
    let lock = File::create(environment.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !suffices(&python) {
        must("python3", ["-m".as_ref(), "venv".as_ref(), environment.as_os_str()]);
        must(&python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]);
        assert!(suffices(&python), "{} has no {package}", python.display());
    }
    python
}

/// Runs a command that a test cannot do without.
pub fn must<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = A>) {
    let mut command = Command::new(program);
    let output = command.args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{command:?} failed: {said}");
}

/// The machine's Python if it has a recent `cryptography`, else that of a virtual environment, made once.
pub fn with_cryptography() -> PathBuf {
    let suffices = |python: &Path| {
        let check = "import cryptography as c; raise SystemExit(int(c.__version__.split('.')[0]) < 42)";
        Command::new(python).args(["-c", check]).output().is_ok_and(|output| output.status.success())
    };
    let system = PathBuf::from("python3");
    if suffices(&system) { system } else { environment("receiver-kit", "cryptography==48.0.0", suffices) }
}
