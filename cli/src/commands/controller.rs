//! `lethe controller`.

use anyhow::bail;
use clap::Subcommand;
use lethe_db::controllers::{self, Controller, NewController};
use lethe_domain::request::ControllerId;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use serde::Serialize;

use crate::context::database;
use crate::output::{Output, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Add a controller; its API key and secret are printed once and never again
    Add {
        /// 1 to 64 characters of A-Z a-z 0-9 _ -
        id: ControllerId,
        /// The only AMQP user that may publish its messages
        #[arg(long, value_name = "USER", conflicts_with = "any_amqp_user")]
        amqp_user: Option<String>,
        /// Let any AMQP user publish on its behalf
        #[arg(long)]
        any_amqp_user: bool,
        /// How its callbacks and answers are signed: rsa-pkcs1v15, rsa-pss or ecdsa-p256
        #[arg(long, default_value = "rsa-pkcs1v15", value_name = "ALGORITHM")]
        signature: SignatureAlgorithm,
        /// Leave profile.jsonl out of its portability files
        #[arg(long)]
        without_profile: bool,
    },
    /// List all controllers
    List,
    /// Give a controller a new API secret; the old one stops working within 30 seconds
    RotateSecret {
        /// The controller, as `lethe controller list` shows it
        id: ControllerId,
    },
}

#[derive(Serialize)]
struct Credentials {
    controller_id: ControllerId,
    api_key: String,
    api_secret: String,
}

#[derive(Serialize)]
struct Listed {
    controller_id: ControllerId,
    amqp_user: Option<String>,
    any_amqp_user: bool,
    signature: &'static str,
    include_profile: bool,
    created_at: String,
}

impl Listed {
    fn of(controller: Controller) -> Self {
        Self {
            controller_id: controller.controller_id,
            amqp_user: controller.amqp_user,
            any_amqp_user: controller.any_amqp_user,
            signature: controller.algorithm.as_str(),
            include_profile: controller.include_profile,
            created_at: controller.created_at.to_string(),
        }
    }
}

impl Command {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let db = database().await?;
        match self {
            Self::Add { id, amqp_user, any_amqp_user, signature, without_profile } => {
                let new = NewController {
                    controller_id: id.clone(),
                    amqp_user,
                    any_amqp_user,
                    algorithm: signature,
                    include_profile: !without_profile,
                };
                let Some(credentials) = controllers::add(&db, &new).await? else {
                    bail!("controller {id} already exists; `lethe controller list` shows it");
                };
                print(output, id, credentials)
            }
            Self::List => {
                let all = controllers::list(&db.session().await?).await?;
                let all: Vec<Listed> = all.into_iter().map(Listed::of).collect();
                output.list(&all, &["controller", "AMQP user", "signature", "profile in files", "added"], |one| {
                    let user = if one.any_amqp_user { "any".to_owned() } else { or_dash(one.amqp_user.as_ref()) };
                    let profile = if one.include_profile { "yes" } else { "no" };
                    vec![
                        one.controller_id.to_string(),
                        user,
                        one.signature.to_owned(),
                        profile.to_owned(),
                        one.created_at.clone(),
                    ]
                })
            }
            Self::RotateSecret { id } => match controllers::rotate_secret(&db.session().await?, &id).await? {
                Some(credentials) => print(output, id, credentials),
                None => bail!("there is no controller {id}; `lethe controller list` shows all"),
            },
        }
    }
}

fn print(output: Output, id: ControllerId, credentials: controllers::Credentials) -> anyhow::Result<()> {
    let shown = Credentials { controller_id: id, api_key: credentials.api_key, api_secret: credentials.api_secret };
    output.one(
        &shown,
        vec![
            ("controller_id", shown.controller_id.to_string()),
            ("api_key", shown.api_key.clone()),
            ("api_secret", shown.api_secret.clone()),
        ],
    )?;
    output.say("Save the secret now: Lethe stores only its hash and cannot show it again.")
}
