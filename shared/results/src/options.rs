//! Where results lie.

use clap::Args;
use url::Url;

/// Where result files and their keys lie.
#[derive(Clone, Debug, Args)]
pub struct ResultOptions {
    /// Where result files go: file://, s3://, gs:// or az://
    #[arg(
        long = "result-store",
        env = "LETHE_RESULT_STORE",
        default_value = "file:///var/lib/lethe/results",
        value_name = "URL"
    )]
    pub result_store: Url,
    /// Where the keys of expiry days are kept, outside PostgreSQL
    #[arg(
        long = "key-store",
        env = "LETHE_KEY_STORE",
        default_value = "file:///var/lib/lethe/keys",
        value_name = "URL"
    )]
    pub key_store: Url,
}
