//! Compiling a request: stream the stores into an encrypted file, record it, complete the request.

use std::sync::Arc;
use std::time::Duration;

use crate::file::{self, FileError, Format, Written};
use jiff::tz::TimeZone;
use lethe_broker::Publisher;
use lethe_db::results::{self, NewResult};
use lethe_db::slices::{self, Claimed, Member, Trouble};
use lethe_db::{Db, DbError, batches, controllers};
use lethe_domain::crypto;
use lethe_domain::request::Stage;
use lethe_domain::result_link;
use lethe_process::fault;
use lethe_results::day_keys::DayKeyError;
use lethe_results::store::{self, Content};
use lethe_runtime::service::Service;
use lethe_runtime::wake;
use lethe_runtime::work::{self, Attempt, SliceWork};
use lethe_stores::Stores;
use uuid::Uuid;

use crate::options::Ready;

/// A key store that cannot be used, or asked, is tried again.
const PROBE_AGAIN: Duration = Duration::from_secs(5);

/// Compiles until the service is told to stop.
pub(crate) async fn run(service: Service, ready: Ready) -> Result<(), DbError> {
    if !await_fit_key_store(&service, &ready).await {
        return Ok(());
    }
    let (permits, backoff) = (ready.compilations, ready.backoff);
    let stores = Stores::built_in(&service.db);
    let compiler = Compiler { db: service.db.clone(), publisher: service.publisher.clone(), stores, ready };
    work::run(&service, Stage::Compilation, permits, backoff, Arc::new(compiler)).await;
    Ok(())
}

/// Waits until the key store was tested and found fit. In an unfit one, two compilers could each create the key of a
/// day, and whatever the first of them encrypted would be lost. Returns `false` if told to stop meanwhile.
async fn await_fit_key_store(service: &Service, ready: &Ready) -> bool {
    let fit = service.health.component("key_store");
    let mut told = None;
    loop {
        let found = match store::probe(&ready.key_store, &ready.key_store_url).await {
            Ok(fitness) if fitness.is_fit() => {
                fit.set(true);
                return true;
            }
            Ok(fitness) => fitness.as_str().to_owned(),
            Err(error) => format!("it could not be tested: {error}"),
        };
        if told.as_ref() != Some(&found) {
            tracing::error!(
                found,
                "the key store cannot be used, and nothing is compiled: see \"The key store\" in docs/operate/keys.md"
            );
            told = Some(found);
        }
        tokio::select! {
            () = tokio::time::sleep(PROBE_AGAIN) => {}
            () = service.shutdown.cancelled() => return false,
        }
    }
}

struct Compiler {
    db: Db,
    publisher: Arc<Publisher>,
    stores: Stores,
    ready: Ready,
}

impl SliceWork for Compiler {
    async fn attempt(&self, claimed: &Claimed) -> Result<Attempt, DbError> {
        let members = slices::members(&self.db.session().await?, claimed.slice_id).await?;
        // A compilation is a slice of one request; none is left where an earlier attempt committed and then died.
        let Some(member) = members.first() else { return Ok(Attempt::Done) };
        // An attempt that died between writing and recording left an object that no record names. The lease is checked after
        // the folder was listed: what was there while the lease was ours does not belong to a successor, however late it is deleted.
        let (results, url) = (&self.ready.results, &self.ready.results_url);
        let left = Content::of(results, url, &folder(claimed)).await;
        slices::hold(&self.db.session().await?, claimed).await?;
        fault::point("compile.before_delete");
        let deleted = match left {
            Ok(left) => left.delete(results).await,
            Err(error) => Err(error),
        };
        // Nothing new is written while something old cannot be deleted.
        if let Err(error) = deleted {
            tracing::warn!(%error, "what an earlier attempt left could not be deleted");
            return Ok(Attempt::Failed { class: "result_store".to_owned(), trouble: Trouble::Slice });
        }
        match self.compile(claimed, member).await {
            Ok(Compiled::Recorded) => Ok(Attempt::Done),
            Ok(Compiled::Failed { class, trouble }) => Ok(Attempt::Failed { class, trouble }),
            Err(error) => Err(error),
        }
    }
}

enum Compiled {
    Recorded,
    Failed { class: String, trouble: Trouble },
}

/// Each attempt writes an object of its own, so that an old holder that wakes up cannot touch what the new one writes. The
/// token of the lease is in its name: after a failover the number of an attempt may be given once more.
fn object_path(claimed: &Claimed) -> String {
    format!("{}/{}-{}", folder(claimed), claimed.attempts, claimed.token())
}

/// What is written for a slice lies here, and nothing else.
fn folder(claimed: &Claimed) -> String {
    claimed.slice_id.to_string()
}

impl Compiler {
    async fn compile(&self, claimed: &Claimed, member: &Member) -> Result<Compiled, DbError> {
        let session = self.db.session().await?;
        let controller = controllers::by_id(&session, &[claimed.controller_id.as_str()]).await?;
        let controller = controller.into_iter().next().ok_or(DbError::Unexpected { place: "controllers" })?;
        let expires_at = batches::now(&session).await?.checked_add(self.ready.lifetime);
        drop(session);
        let expires_at = expires_at.map_err(|_| DbError::Unexpected { place: "the lifetime of results" })?;
        let format = if member.request_type == "portability" {
            Format::Zip { include_profile: controller.include_profile }
        } else {
            Format::Text
        };
        let expiry_day = expires_at.to_zoned(TimeZone::UTC).date();
        let day_key = tokio::time::timeout(store::CALL_LIMIT, self.ready.day_keys.get_or_create(expiry_day)).await;
        let day_key = match day_key.unwrap_or(Err(DayKeyError::Silent)) {
            Ok(key) => key,
            Err(error) => {
                tracing::warn!(%error, "no key for the day of expiry");
                return Ok(Compiled::Failed { class: "key_store".to_owned(), trouble: Trouble::Slice });
            }
        };
        let result_id = Uuid::new_v4();
        let key = crypto::random::<{ crypto::KEY_LEN }>()?;
        let wrapped_key = day_key.seal(result_id.as_bytes(), &key)?;
        let path = object_path(claimed);
        fault::point("compile.before_file");
        // A holder whose lease was taken over writes nothing: if it then died, nobody would delete what it had written.
        slices::hold(&self.db.session().await?, claimed).await?;
        let written = match self.write(claimed, member, &path, &key, format).await {
            Ok(written) => written,
            Err(FileError::Store(lethe_stores::StoreError::Db(DbError::LeaseLost))) => return Err(DbError::LeaseLost),
            Err(error) => {
                tracing::warn!(%error, "a result file could not be written");
                let trouble = match &error {
                    FileError::Store(error) => error.trouble(),
                    _ => Trouble::Slice,
                };
                return Ok(Compiled::Failed { class: error.class(), trouble });
            }
        };
        fault::point("compile.file_written");
        let salt = crypto::random::<16>()?;
        let token = result_link::token(&self.ready.keys, result_id, &salt);
        let found = written.lines > 0;
        let result = NewResult {
            result_id,
            request_key: member.request_key,
            token_salt: salt.to_vec(),
            token_sha256: result_link::token_digest(&token),
            object_path: found.then(|| path.clone()),
            media_type: format.media_type(),
            size_bytes: i64::try_from(written.size).unwrap_or(i64::MAX),
            lines: i64::try_from(written.lines).unwrap_or(i64::MAX),
            wrapped_key: found.then_some(wrapped_key),
            expiry_day,
            expires_at,
        };
        let recorded = results::complete(&self.db, claimed, &result).await;
        if recorded.as_ref().is_err_and(|error| matches!(error, DbError::LeaseLost)) {
            // Another attempt has taken over; what we wrote belongs to nobody.
            let _ = store::delete(&self.ready.results, &path).await;
        }
        let finished = recorded?;
        fault::point("finish.after_commit");
        metrics::counter!("lethe_requests_completed_total", "stage" => "compilation")
            .increment(finished.completed as u64);
        metrics::counter!("lethe_result_bytes_total").increment(written.size);
        wake::endpoints(&self.publisher, finished.endpoints).await;
        Ok(Compiled::Recorded)
    }

    async fn write(
        &self,
        claimed: &Claimed,
        member: &Member,
        path: &str,
        key: &[u8; crypto::KEY_LEN],
        format: Format,
    ) -> Result<Written, FileError> {
        let lines = lethe_stores::export_all(&self.stores, &claimed.controller_id, &member.mpids, claimed.as_of);
        file::write(&self.ready.results, path, key, format, lines).await
    }
}
