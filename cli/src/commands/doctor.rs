//! `lethe doctor`: checks everything that must be right, and says how to fix what is not.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use jiff::Timestamp;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use lethe_broker::topology::{self, QueueState};
use lethe_db::obstacles::{self, Failing, ForOperator, Obstacles, Prepared};
use lethe_db::{Db, DbError, batches, calendar, installation, migrate, overview};
use lethe_results::ResultOptions;
use lethe_results::store;
use lethe_runtime::options::KeyOptions;
use lethe_signing::SigningOptions;

use super::doctor_findings::{Findings, Verdict};
use super::doctor_schedule;
use crate::context;
use crate::output::Output;

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    signing: SigningOptions,
    #[command(flatten)]
    results: ResultOptions,
}

impl Doctor {
    pub(crate) async fn run(self, output: Output) -> anyhow::Result<()> {
        let mut findings = Findings::default();
        self.keys_and_certificate(&mut findings);
        self.stores(&mut findings);
        doctor_schedule::key_store(&mut findings, &self.results.key_store).await;
        self.database(&mut findings).await;
        broker(&mut findings).await;
        output.list(findings.as_slice(), &["subject", "verdict", "finding", "what to do"], |one| {
            let verdict = match one.verdict {
                Verdict::Good => "good",
                Verdict::Look => "look",
                Verdict::Bad => "BAD",
            };
            vec![one.subject.to_owned(), verdict.to_owned(), one.what.clone(), one.advice.clone()]
        })?;
        let bad = findings.as_slice().iter().filter(|one| one.verdict == Verdict::Bad).count();
        if bad > 0 {
            bail!("{bad} findings need attention");
        }
        Ok(())
    }

    fn keys_and_certificate(&self, findings: &mut Findings) {
        let advice = "point LETHE_MASTER_KEY_FILE to the file that all processes share";
        findings.check("master key", self.keys.keys(), "readable", advice);
        let processor = self.signing.processor();
        let advice = "see \"Keys and certificate\" in docs/guide/run.md";
        let Some(processor) =
            findings.check("signing key and certificate", processor, "belong together and name the domain", advice)
        else {
            return;
        };
        let advice = "renew the certificate with the same key; receivers refuse an expired one";
        for certificate in processor.signer.certificates() {
            let days = (certificate.not_after.as_second() - Timestamp::now().as_second()) / 86_400;
            match days {
                ..0 => findings.add("certificate", Verdict::Bad, "has expired", advice),
                0..30 => findings.add("certificate", Verdict::Look, format!("expires in {days} days"), advice),
                _ => findings.add("certificate", Verdict::Good, format!("valid for {days} days"), ""),
            }
        }
    }

    async fn database(&self, findings: &mut Findings) {
        let Some(db) = server(findings).await else { return };
        let schema = migrate::check_version(&db).await;
        if findings.check("schema", schema, "matches this release", "run `lethe migrate`").is_none() {
            return;
        }
        if let Ok(keys) = self.keys.keys() {
            let checked = installation::compare_master_key(&db, &keys).await;
            findings.check("master key", checked, "matches the database", "use the same file as the other processes");
        }
        neighbours(findings, &db).await;
        state(findings, &db).await;
        match async { obstacles::find(&db.session().await?).await }.await {
            Ok(found) => tell(findings, &found),
            Err(error) => findings.add("obstacles", Verdict::Bad, error, ""),
        }
    }

    fn stores(&self, findings: &mut Findings) {
        for (subject, setting, url) in [
            ("result store", "LETHE_RESULT_STORE", &self.results.result_store),
            ("key store", "LETHE_KEY_STORE", &self.results.key_store),
        ] {
            findings.check(
                subject,
                store::open(setting, url),
                "can be opened",
                "make it writable for the user of the workers",
            );
        }
    }
}

/// The server itself; `None` where it does not answer.
async fn server(findings: &mut Findings) -> Option<Db> {
    let opened = async {
        let db = context::any_database()?;
        db.ping().await?;
        anyhow::Ok(db)
    };
    let advice = "check DATABASE_URL, the server and the network path to it";
    let db = findings.check("PostgreSQL", opened.await, "answers and accepts writes", advice)?;
    let checks = async {
        let session = db.session().await?;
        let version: i32 = session.value("SELECT current_setting('server_version_num')::int", &[]).await?;
        let settings = session
            .query_one(
                "SELECT current_setting('server_encoding') AS encoding, current_setting('fsync') AS fsync,
                        current_setting('synchronous_commit') AS synchronous_commit, clock_timestamp() AS clock",
                &[],
            )
            .await?;
        anyhow::Ok((version, settings))
    };
    match checks.await {
        Err(error) => findings.add("PostgreSQL", Verdict::Bad, error, "check the rights of the user in DATABASE_URL"),
        Ok((version, settings)) => {
            let verdict = if version >= 150_000 { Verdict::Good } else { Verdict::Bad };
            findings.add(
                "PostgreSQL version",
                verdict,
                version / 10_000,
                if verdict == Verdict::Good { "" } else { "use 15 or newer" },
            );
            let encoding: String = settings.get("encoding");
            if encoding != "UTF8" {
                findings.add("encoding", Verdict::Bad, encoding, "create the database with ENCODING 'UTF8'");
            }
            for name in ["fsync", "synchronous_commit"] {
                if settings.get::<_, &str>(name) == "off" {
                    findings.add(
                        "durability",
                        Verdict::Bad,
                        format!("{name} is off"),
                        "turn it on: a request that was answered with 201 must survive a crash",
                    );
                }
            }
            let skew = Timestamp::now().duration_since(settings.get::<_, Timestamp>("clock")).as_secs_f64();
            let verdict = if skew.abs() < 5.0 { Verdict::Good } else { Verdict::Look };
            findings.add(
                "clock skew",
                verdict,
                format!("{skew:.1} s"),
                if verdict == Verdict::Good {
                    ""
                } else {
                    "synchronise the clocks (NTP); PostgreSQL's is the one that counts"
                },
            );
        }
    }
    Some(db)
}

/// What others on the same servers may do to us.
async fn neighbours(findings: &mut Findings, db: &Db) {
    let asked = async {
        let session = db.session().await?;
        let connections = "SELECT count(*) AS used, current_setting('max_connections')::bigint
                                 - current_setting('superuser_reserved_connections')::bigint AS places
                             FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let row = session.query_one(connections, &[]).await?;
        let open = "SELECT controller_id FROM lethe.controllers WHERE any_amqp_user ORDER BY 1 LIMIT 10";
        let open: Vec<String> = session.values(open, &[]).await?;
        Ok::<_, DbError>((row.get::<_, i64>("used"), row.get::<_, i64>("places"), open))
    };
    match asked.await {
        Err(error) => findings.add("connections", Verdict::Look, error, ""),
        Ok((used, limit, open)) => {
            let (verdict, advice) = if used * 10 < limit * 9 {
                (Verdict::Good, "")
            } else {
                (Verdict::Look, "raise max_connections, or lower LETHE_DATABASE_CONNECTIONS of the workers")
            };
            findings.add("connections", verdict, format!("{used} of {limit} are open"), advice);
            if !open.is_empty() {
                let what = format!("any user of the broker may publish on behalf of {}", open.join(", "));
                findings.add("AMQP users", Verdict::Look, what, "add the controller with --amqp-user instead");
            }
        }
    }
}

/// What keeps work from its end.
fn tell(findings: &mut Findings, found: &Obstacles) {
    for table in &found.without_key {
        let advice = "give it a key, or ALTER TABLE … REPLICA IDENTITY DEFAULT: see \"Publications\" in the runbook";
        findings.add(
            "publication",
            Verdict::Bad,
            format!("{table} has no key, so deletes from it are refused"),
            advice,
        );
    }
    for publication in &found.without_generated {
        let what = format!("{publication} leaves generated columns out, so deletes of identities are refused");
        let advice = format!("ALTER PUBLICATION {publication} SET (publish_generated_columns = stored)");
        findings.add("publication", Verdict::Bad, what, &advice);
    }
    for Prepared { xid, since } in &found.prepared {
        let advice = "an erasure that began later waits for it: see \"Find a failing store\" in the runbook";
        findings.add("prepared transaction", Verdict::Look, format!("{xid}, since {since}"), advice);
    }
    for Failing { stage, controller_id, class, failures, since } in &found.failing {
        let what = format!("{controller_id}, {stage}: {class}, {failures} times since {since}");
        findings.add("failing controller", Verdict::Look, what, "see \"Find a failing store\" in the runbook");
    }
    for ForOperator { controller_id, class, slices } in &found.for_operator {
        let what = format!("{controller_id}: {class}, {slices} slices; waiting will not fix it");
        findings.add("failing work", Verdict::Bad, what, "see \"Find a failing store\" in the runbook");
    }
}

async fn state(findings: &mut Findings, db: &Db) {
    let loaded = async {
        let session = db.session().await?;
        Ok::<_, lethe_db::DbError>((
            calendar::current(&session).await?,
            overview::load(&session).await?,
            batches::due(&session).await?,
        ))
    };
    match loaded.await {
        Err(error) => findings.add("state", Verdict::Bad, error, ""),
        Ok((calendar, overview, _)) => {
            match calendar {
                None => findings.add("calendar", Verdict::Bad, "none is stored; requests wait", "start a scheduler"),
                Some(calendar) => findings.add(
                    "calendar",
                    Verdict::Good,
                    format!("version {}, erasure at `{}`", calendar.version, calendar.calendar.erasure),
                    "",
                ),
            }
            doctor_schedule::clock(findings, db).await;
            doctor_schedule::lost(findings, db, overview.lost_endpoints).await;
            for (stage, seconds) in overview.oldest_seconds {
                let advice = match stage.as_str() {
                    "approval" => "look at `lethe request list --awaiting-approval`",
                    "callback" => "look at `lethe callback list --state ready`; start more couriers",
                    "closing" | "release" => "start a scheduler, or look at its log",
                    _ => "start more workers of this stage, or look at `lethe request list --status in_progress`",
                };
                if seconds > 300.0 {
                    findings.add("oldest work", Verdict::Look, format!("{stage}: {seconds:.0} s"), advice);
                }
            }
        }
    }
}

async fn broker(findings: &mut Findings) {
    let connected = async {
        let broker = context::broker()?;
        let encrypted = broker.is_encrypted();
        anyhow::Ok((broker.connect().await?, encrypted))
    };
    let advice = "check AMQP_URL, the server and the rights of the user; a queue with other arguments must be deleted";
    let Some((link, encrypted)) = findings.check(
        "RabbitMQ and topology",
        connected.await,
        "answers; every exchange and queue is declared",
        advice,
    ) else {
        return;
    };
    if !encrypted {
        findings.add("RabbitMQ", Verdict::Look, "the connection is not encrypted", "use amqps:// unless it is local");
    }
    for queue in topology::QUEUES {
        let dead = topology::dead_letters_of(queue.name);
        if let Ok(QueueState { ready: count @ 1.., .. }) = topology::state(link.channel(), &dead).await {
            findings.add(
                "dead letters",
                Verdict::Look,
                format!("{count} in {dead}"),
                "each carries its reason in the headers error-code and error-message",
            );
        }
    }
    if let Ok(QueueState { ready: count @ 1.., .. }) = topology::state(link.channel(), topology::REJECTED).await {
        findings.add(
            "rejected messages",
            Verdict::Look,
            format!("{count} in {}", topology::REJECTED),
            "each carries its reason in the headers error-code and error-message",
        );
    }
    let advice = "set max_message_size = 2097152 in rabbitmq.conf: larger messages only cost memory";
    let asked = tokio::time::timeout(PATIENCE, takes_large_messages(link.channel())).await;
    let Ok(takes) = asked else {
        let advice = "free memory or disk space on its host: nothing can be published until then";
        let what = if link.is_blocked() { "has raised an alarm" } else { "does not confirm messages" };
        findings.add("RabbitMQ", Verdict::Bad, what, advice);
        return;
    };
    match takes {
        Ok(false) => {
            findings.add("max_message_size", Verdict::Good, "the broker refuses messages over 2 MiB", "");
        }
        Ok(true) => findings.add("max_message_size", Verdict::Look, "the broker accepts messages over 2 MiB", advice),
        Err(error) => findings.add("max_message_size", Verdict::Look, error, advice),
    }
    link.close().await;
}

/// How long the broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Publishes one byte more than 2 MiB to a queue of our own, which ends with the connection. The channel may end with it.
async fn takes_large_messages(channel: &Channel) -> Result<bool, lapin::Error> {
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let queue = channel.queue_declare("".into(), options, FieldTable::default()).await?;
    let body = vec![b' '; (2 << 20) + 1];
    let published = channel
        .basic_publish(
            "".into(),
            queue.name().clone(),
            BasicPublishOptions::default(),
            &body,
            BasicProperties::default(),
        )
        .await;
    // The broker answers by closing the channel.
    let confirmed = match published {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    match confirmed {
        Ok(confirmation) => Ok(confirmation.is_ack()),
        Err(error) if matches!(error.kind(), lapin::ErrorKind::ProtocolError(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
