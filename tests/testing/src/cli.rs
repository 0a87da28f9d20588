//! The operator's command line as a process.

use std::process::Stdio;

use serde_json::Value;
use tokio::process::Child;

use crate::worker::{bare, environment};
use crate::world::World;

/// What a command came to: exit code, standard output, standard error.
pub struct Ran {
    /// The exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// The JSON that a successful command printed.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        serde_json::from_str(&self.out).unwrap()
    }
}

/// Runs `lethe` in the environment of a world.
pub async fn lethe(world: &World, arguments: &[&str]) -> Ran {
    lethe_with(world, arguments, &[]).await
}

/// Runs `lethe` in the environment of a world, with further settings.
pub async fn lethe_with(world: &World, arguments: &[&str], settings: &[(&str, &str)]) -> Ran {
    let mut command = bare("lethe");
    command.envs(environment(world)).envs(settings.iter().copied());
    let output = command.args(arguments).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// Runs `lethe` and reads the JSON that it prints.
pub async fn json(world: &World, arguments: &[&str]) -> Value {
    lethe(world, &[arguments, &["--output", "json"]].concat()).await.json()
}

/// Writes a file into the folder of a world and returns its path.
pub fn write(world: &World, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = world.folder.join(name);
    std::fs::write(&path, content).unwrap();
    path.display().to_string()
}

/// Starts `lethe` in the environment of a world. It is killed when it is dropped.
pub fn start(world: &World, arguments: &[&str]) -> Child {
    let mut command = bare("lethe");
    command.envs(environment(world)).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}
