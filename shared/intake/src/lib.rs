//! AMQP and HTTP share one intake: what receiving, cancelling and asking mean.

mod answers;
pub mod options;

use std::collections::HashMap;
use std::sync::Arc;

use lethe_broker::Publisher;
use lethe_db::controllers::{self, Controller};
use lethe_db::intake::{IntakeContext, Recorded, Submission};
use lethe_db::reporting::Reporting;
use lethe_db::requests::{self, Cancellation, Overtaking, RequestRow, Target};
use lethe_db::{Db, DbError};
use lethe_domain::crypto::Keys;
use lethe_domain::disposition::Disposition;
use lethe_domain::group::{Group, Parts};
use lethe_domain::opendsr::answer::{CancellationReceived, RequestReceived, StatusAnswer};
use lethe_domain::opendsr::{ApiError, ApiVersion, Parser};
use lethe_domain::request::{BatchId, ControllerId, RequestKey, SubjectRequestId};
use lethe_domain::result_link::{Links, StoredResult};
use lethe_process::fault;
use lethe_runtime::wake::Waker;

pub use answers::Answer;

/// A list holds at most so many requests.
pub const LIST_LIMIT: usize = 1_000;

/// Receives for all transports of a process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Intake {
    db: Db,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    context: IntakeContext,
    parser: Parser,
    keys: Arc<Keys>,
    links: Links,
    waker: Waker,
}

/// A request as it came in, from a controller that was checked.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// Whose request it is.
    pub controller_id: &'a ControllerId,
    /// The body, verbatim.
    pub body: &'a [u8],
    /// The version that the path states, where there is a path.
    pub path_version: Option<ApiVersion>,
}

/// Why a message got no answer. Those that failed together share their error.
#[derive(Clone, Debug)]
pub enum Unanswered {
    /// The database is away, or something in it is not right: the same message can succeed later.
    Later(Arc<DbError>),
    /// This very message makes the database fail; its neighbours do not.
    Poison(Arc<DbError>),
}

impl From<DbError> for Unanswered {
    fn from(error: DbError) -> Self {
        let is_poison = error.disposition() == Disposition::Poison;
        if is_poison { Self::Poison(Arc::new(error)) } else { Self::Later(Arc::new(error)) }
    }
}

impl Unanswered {
    /// Nobody has said what came of the message.
    #[must_use]
    pub fn forgotten() -> Self {
        Self::Later(Arc::new(DbError::Unexpected { place: "a group" }))
    }
}

impl Intake {
    /// An intake on these. To be called within a runtime.
    #[must_use]
    pub fn new(db: Db, keys: Arc<Keys>, parser: Parser, cap: u32, links: Links, publisher: Arc<Publisher>) -> Self {
        let context = IntakeContext::new(keys.clone(), cap);
        Self { db, shared: Arc::new(Shared { context, parser, keys, links, waker: Waker::start(publisher) }) }
    }

    /// The same, acting for one controller only: what the gateway's role needs.
    #[must_use]
    pub fn acting_for(&self, controller_id: &ControllerId) -> Self {
        Self { db: self.db.acting_for(controller_id), shared: self.shared.clone() }
    }

    /// The controllers of the given ids that exist.
    ///
    /// # Errors
    /// [`DbError`].
    pub async fn controllers(&self, ids: &[&str]) -> Result<HashMap<String, Controller>, DbError> {
        let found = controllers::by_id(&self.db.session().await?, ids).await?;
        Ok(found.into_iter().map(|one| (one.controller_id.as_str().to_owned(), one)).collect())
    }

    /// Receives a group. What is answered 201 is durable. One transaction for all; where that fails because of a
    /// message, the group is halved until the message stands alone.
    pub async fn receive(&self, group: &[Incoming<'_>]) -> Vec<Result<Answer, Unanswered>> {
        let group = Group::new(group).step(|incoming| match self.parse(incoming) {
            Ok(submission) => Ok((incoming, submission)),
            Err(error) => {
                let version = self.shared.parser.version_hint(incoming.body, incoming.path_version);
                Err(Ok(Answer::error(&error, version)))
            }
        });
        let valid: Vec<&Submission> = group.open().map(|(_, submission)| submission).collect();
        let recorded = self.record(&valid).await;
        group
            .with(recorded, |_| Err(Unanswered::forgotten()))
            .settle(|((incoming, submission), recorded)| Ok(received(incoming, &submission, &recorded?)))
    }

    fn parse(&self, incoming: &Incoming<'_>) -> Result<Submission, ApiError> {
        let request = self.shared.parser.request(incoming.body, incoming.path_version)?;
        let mut origins = Vec::with_capacity(request.status_callback_urls.len());
        for url in &request.status_callback_urls {
            // Checked by the parser already, which is where a refusal names its field.
            let origin = self.shared.parser.addresses.check(url);
            origins.push(origin.map_err(|refusal| ApiError::new(400, format!("status_callback_urls {refusal}")))?);
        }
        Ok(Submission { controller_id: incoming.controller_id.clone(), request, origins })
    }

    async fn record(&self, valid: &[&Submission]) -> Vec<Result<Recorded, Unanswered>> {
        let mut parts = Parts::new(valid);
        let mut outcomes = Vec::with_capacity(valid.len());
        let (mut recorded, mut suspects) = (0_usize, Vec::new());
        while let Some(part) = parts.take() {
            match self.shared.context.record(&self.db, part).await {
                Ok(group) => {
                    fault::point("intake.after_commit");
                    recorded += group.outcomes.len();
                    outcomes.extend(group.outcomes.into_iter().map(Ok));
                    self.shared.waker.endpoints(group.endpoints);
                }
                // Where several have failed alone and none was recorded, the fault is not theirs.
                Err(error)
                    if error.may_be_one_item()
                        && part.len() > 1
                        && (recorded > 0 || suspects.len() < 4)
                        && !fault::defect("no_split") =>
                {
                    parts.halve(part);
                }
                Err(error)
                    if error.disposition() == Disposition::Poison && (part.len() == 1 || fault::defect("no_split")) =>
                {
                    // More than one only where the defect is planted.
                    outcomes.extend(vec![Err(Unanswered::Poison(Arc::new(error))); part.len()]);
                }
                Err(error) => {
                    tracing::debug!(%error, "a group could not be recorded");
                    metrics::counter!("lethe_intake_failures_total", "class" => error.class()).increment(1);
                    if part.len() == 1 && error.may_be_one_item() {
                        suspects.push(outcomes.len());
                    }
                    outcomes.extend(vec![Err(Unanswered::Later(Arc::new(error))); part.len()]);
                }
            }
        }
        // Its neighbours passed: it is this very message.
        for index in suspects.into_iter().filter(|_| recorded > 0) {
            if let Some(Err(unanswered @ Unanswered::Later(_))) = outcomes.get_mut(index)
                && let Unanswered::Later(error) = unanswered.clone()
            {
                *unanswered = Unanswered::Poison(error);
            }
        }
        outcomes
    }

    /// Cancels; one answer for each target.
    ///
    /// # Errors
    /// [`DbError`]: nothing was cancelled.
    pub async fn cancel(&self, targets: &[Target], overtaking: Overtaking) -> Result<Vec<Answer>, DbError> {
        let (outcomes, endpoints) = requests::cancel(&self.db, targets, overtaking).await?;
        fault::point("cancel.after_commit");
        self.shared.waker.endpoints(endpoints);
        Ok(targets.iter().zip(outcomes).map(|(target, outcome)| cancelled(target, &outcome)).collect())
    }

    /// Records that the cancellations queued before the release of these batches are handled.
    ///
    /// # Errors
    /// [`DbError`].
    pub async fn cancellations_handled(&self, batches: &[BatchId]) -> Result<(), DbError> {
        lethe_db::batches::cancellations_handled(&self.db.session().await?, batches).await
    }

    /// Where requests stand; one outcome for each target.
    pub async fn statuses(&self, targets: &[Target]) -> Vec<Result<Answer, Unanswered>> {
        let (mut parts, mut outcomes) = (Parts::new(targets), Vec::with_capacity(targets.len()));
        while let Some(part) = parts.take() {
            let found = async { requests::find_all(&self.db.session().await?, part).await }.await;
            match found {
                Ok(found) => outcomes.extend(found.into_iter().map(|found| match found {
                    None => Ok(Answer::error(&ApiError::unknown_request(), ApiVersion::V3)),
                    Some(row) => row.and_then(|row| self.status(&row)).map_err(Unanswered::from),
                })),
                // One of them makes the others fail.
                Err(error) if error.may_be_one_item() && part.len() > 1 => parts.halve(part),
                Err(error) => outcomes.extend(vec![Err(Unanswered::from(error)); part.len()]),
            }
        }
        outcomes
    }

    fn status(&self, row: &RequestRow) -> Result<Answer, DbError> {
        let (sealed, whole) = (row.sealed_reporting.as_deref(), row.sealed_request.as_deref());
        let reporting = Reporting::open(&self.shared.keys, &row.controller_id, row.subject_request_id, sealed, whole)?;
        let group_id = reporting.and_then(|reporting| reporting.group_id);
        Ok(Answer::json(200, row.api_version, &self.status_answer(row, group_id)))
    }

    /// The requests of a group, at most [`LIST_LIMIT`], and the cursor to go on with.
    ///
    /// # Errors
    /// [`DbError`].
    pub async fn group(
        &self,
        controller_id: &ControllerId,
        group_id: &str,
        cursor: Option<&str>,
    ) -> Result<Answer, DbError> {
        let Ok(after) = cursor.map_or(Ok(RequestKey(0)), str::parse) else {
            let error = ApiError::new(400, "cursor must come from an earlier answer");
            return Ok(Answer::error(&error, ApiVersion::V3));
        };
        let digest = self.shared.keys.group_digest(controller_id.as_str(), group_id);
        let session = self.db.session().await?;
        let limit = i64::try_from(LIST_LIMIT).unwrap_or(i64::MAX) + 1;
        let mut rows = requests::of_group(&session, controller_id, &digest, after, limit).await?;
        let more = rows.len() > LIST_LIMIT;
        rows.truncate(LIST_LIMIT);
        let cursor = rows.last().filter(|_| more).map(|row| row.request_key.to_string());
        // The group of a purged request is forgotten, also towards those who know it.
        let named = |row: &RequestRow| (!row.is_purged).then(|| group_id.to_owned());
        let list: Vec<StatusAnswer> = rows.iter().map(|row| self.status_answer(row, named(row))).collect();
        let mut answer = Answer::json(200, ApiVersion::V3, &list);
        answer.cursor = cursor;
        Ok(answer)
    }

    fn status_answer(&self, row: &RequestRow, group_id: Option<String>) -> StatusAnswer {
        let url = |result: &StoredResult| self.shared.links.url(row.api_version, result);
        StatusAnswer {
            controller_id: row.controller_id.clone(),
            expected_completion_time: row.expected_completion_time,
            subject_request_id: row.subject_request_id,
            group_id,
            request_status: row.status,
            api_version: row.api_version,
            results_url: row.result.as_ref().map(url),
            results_count: row.result.as_ref().map(|result| result.lines),
            extensions: None,
        }
    }
}

fn received(incoming: &Incoming<'_>, submission: &Submission, recorded: &Recorded) -> Answer {
    let version = submission.request.api_version;
    match recorded {
        Recorded::Accepted { received_at, expected_completion_time, .. } => Answer::json(
            201,
            version,
            &RequestReceived {
                controller_id: incoming.controller_id.clone(),
                expected_completion_time: *expected_completion_time,
                received_time: *received_at,
                encoded_request: RequestReceived::encode(incoming.body),
                subject_request_id: submission.request.subject_request_id,
            },
        ),
        Recorded::Conflict => {
            let message = "this subject_request_id is used by a request with different content; use a new one";
            Answer::error(&ApiError::new(409, message), version)
        }
    }
}

fn cancelled((controller_id, subject_request_id): &Target, outcome: &Cancellation) -> Answer {
    let accepted = |received_time, api_version: Option<ApiVersion>| {
        Answer::json(
            202,
            api_version.unwrap_or(ApiVersion::V3),
            &CancellationReceived {
                controller_id: controller_id.clone(),
                received_time,
                subject_request_id: *subject_request_id,
                expected_completion_time: None,
                api_version,
            },
        )
    };
    match *outcome {
        Cancellation::Cancelled { received_at, api_version } => accepted(received_at, Some(api_version)),
        Cancellation::Remembered { received_at } => accepted(received_at, None),
        Cancellation::TooLate(status) => {
            let message = format!("the request is already {status} and can no longer be cancelled");
            Answer::error(&ApiError::new(409, message), ApiVersion::V3)
        }
        Cancellation::Unknown => Answer::error(&ApiError::unknown_request(), ApiVersion::V3),
    }
}

/// Parses the body of a cancellation or of a status query.
///
/// # Errors
/// 400 or 413.
pub fn parse_target(controller_id: &ControllerId, body: &[u8]) -> Result<Target, ApiError> {
    Parser::subject_request_id(body).map(|id: SubjectRequestId| (controller_id.clone(), id))
}
