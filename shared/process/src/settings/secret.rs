//! Secrets come from the environment, or from a file that `<NAME>_FILE` names; never from the command line.

use super::ConfigError;

/// The value of `name`, or the content of the file that `file_name` names, without the final line break.
///
/// # Errors
/// When neither is set, when both are, or when the file cannot be read.
pub fn secret(name: &'static str, file_name: &'static str) -> Result<String, ConfigError> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    match (variable(name), variable(file_name)) {
        (Some(_), Some(_)) => Err(ConfigError::new(name, format!("is set, and so is {file_name}; set one of them"))),
        (Some(value), None) => Ok(value),
        (None, Some(path)) => std::fs::read_to_string(&path)
            .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
            .map_err(|error| ConfigError::new(file_name, format!("cannot read {path}: {error}"))),
        (None, None) => Err(ConfigError::new(name, format!("is not set, and neither is {file_name}"))),
    }
}
