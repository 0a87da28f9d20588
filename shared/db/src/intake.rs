//! Recording requests: many in one transaction.
//!
//! **Invariant** (DESIGN rule 3): a group is one transaction; if it fails because of a message, it is halved until that
//! message stands alone.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use tokio_postgres::error::SqlState;

use super::batches::{Intake, begin_intake, open_batch};
use super::calendar::CalendarCache;
use super::details::{self, Details, Week, WeekCache};
use super::endpoints::EndpointCache;
use super::matching::{self, Matched, Wanted};
use super::reporting::Reporting;
use super::sealed::sealing_context;
use super::{Db, DbError, Tx, callbacks, statements};
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::callback_url::Origin;
use lethe_domain::opendsr::{ApiVersion, Regulation, SubjectRequest};
use lethe_domain::request::{
    Approval, BatchId, ControllerId, EndpointId, Lane, RequestKey, RequestStatus, RequestType, Slot, SubjectRequestId,
};
use lethe_process::fault;

statements! {
    /// In the order of the unique key: two groups with the same requests then wait for each other in one direction.
    INSERT_REQUESTS = "
        INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status,
                                    lane, batch_id, content_digest, details_week, group_digest, submitted_time,
                                    received_at, expected_completion_time, approval)
        SELECT controller_id, subject_request_id, api_version, regulation, request_type, 'pending', lane, batch_id,
               content_digest, details_week, group_digest, submitted_time, $13, expected_completion_time, approval
          FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[],
                      $8::bytea[], $9::bigint[], $10::bytea[], $11::timestamptz[], $12::timestamptz[], $14::text[])
               AS q (controller_id, subject_request_id, api_version, regulation, request_type, lane, batch_id,
                     content_digest, details_week, group_digest, submitted_time, expected_completion_time, approval)
         -- Known for good, also after its records were removed.
         WHERE NOT EXISTS (SELECT FROM lethe.past_requests p WHERE p.controller_id = q.controller_id
                                                               AND p.subject_request_id = q.subject_request_id)
         ORDER BY controller_id, subject_request_id
        ON CONFLICT (controller_id, subject_request_id) DO NOTHING
        RETURNING request_key, controller_id, subject_request_id";
    FIND_EXISTING = "
        SELECT r.controller_id, r.subject_request_id, r.content_digest, r.received_at, r.expected_completion_time
          FROM lethe.requests r
          JOIN unnest($1::text[], $2::uuid[]) AS q (controller_id, subject_request_id)
         USING (controller_id, subject_request_id)
        UNION ALL
        SELECT p.controller_id, p.subject_request_id, p.content_digest, p.received_at, p.expected_completion_time
          FROM lethe.past_requests p
          JOIN unnest($1::text[], $2::uuid[]) AS q (controller_id, subject_request_id)
         USING (controller_id, subject_request_id)";
    INSERT_FIRST_CALLBACKS = "
        INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                     expected_completion_time, state, next_attempt_at, created_at)
        SELECT gen_random_uuid(), request_key, url_no, 0, endpoint_id, 'pending', expected_completion_time, 'ready', $5, $5
          FROM unnest($1::bigint[], $2::smallint[], $3::bigint[], $4::timestamptz[])
               AS q (request_key, url_no, endpoint_id, expected_completion_time)";
    /// Cancellations that overtook one of these requests. Whoever remembers one holds the lock on the calendar
    /// exclusively, so either it is visible here, or it sees the request.
    TAKE_EARLY_CANCELLATIONS = "
        DELETE FROM lethe.early_cancellations e
         USING unnest($1::text[], $2::uuid[], $3::bigint[]) AS q (controller_id, subject_request_id, request_key)
         WHERE e.controller_id = q.controller_id AND e.subject_request_id = q.subject_request_id
           -- Received in time counts, however long this transaction takes.
           AND e.expires_at > $4
        RETURNING q.request_key, e.received_at";
    CANCEL_AT_BIRTH = "
        UPDATE lethe.requests r
           SET status = 'cancelled', cancelled_at = lethe.now(), cancellation_received_at = q.received_at
          FROM unnest($1::bigint[], $2::timestamptz[]) AS q (request_key, received_at)
         WHERE r.request_key = q.request_key AND r.status = 'pending'";
}

/// What intake needs beside the database; one for each process.
#[derive(Debug)]
pub struct IntakeContext {
    keys: Arc<Keys>,
    cap: u32,
    calendars: CalendarCache,
    endpoints: EndpointCache,
    /// Open batches, and when each was read or opened.
    batches: Mutex<HashMap<(Lane, Slot), (BatchId, Instant)>>,
    weeks: WeekCache,
}

/// A valid request of a known controller.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Whose request it is.
    pub controller_id: ControllerId,
    /// What is asked for.
    pub request: SubjectRequest,
    /// Where each callback URL leads, in the order of the URLs.
    pub origins: Vec<Origin>,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// It is recorded: now, or by an earlier submission with the same content.
    Accepted {
        /// When it was first received.
        received_at: Timestamp,
        /// When it is expected to be completed.
        expected_completion_time: Timestamp,
        /// This submission was the first.
        first: bool,
    },
    /// The id is used by a request with different content.
    Conflict,
}

/// The outcome of a group: one for each submission, and whom to wake.
#[derive(Debug, Default)]
pub struct RecordedGroup {
    /// In the order of the submissions.
    pub outcomes: Vec<Recorded>,
    /// Endpoints that have callbacks now.
    pub endpoints: BTreeSet<EndpointId>,
}

type Id = (ControllerId, SubjectRequestId);

struct Prepared<'a> {
    submission: &'a Submission,
    digest: Vec<u8>,
    sealed: Vec<u8>,
    reporting: Vec<u8>,
}

impl IntakeContext {
    /// Requests that match more than `cap` profiles wait for an operator.
    #[must_use]
    pub fn new(keys: Arc<Keys>, cap: u32) -> Self {
        Self {
            keys,
            cap,
            calendars: CalendarCache::default(),
            endpoints: EndpointCache::default(),
            batches: Mutex::default(),
            weeks: WeekCache::default(),
        }
    }

    /// The keys that seal requests.
    #[must_use]
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Records a group in one transaction: requests, matched profiles, first callbacks. After it returns, all of it
    /// is durable; after an error, none of it is.
    ///
    /// # Errors
    /// [`DbError`]; [`DbError::NoCalendar`] before a scheduler has stored one.
    pub async fn record(&self, db: &Db, group: &[&Submission]) -> Result<RecordedGroup, DbError> {
        // The first of several equal ids in one group is the one that is recorded.
        let mut firsts: HashMap<Id, usize> = HashMap::with_capacity(group.len());
        let mut prepared = Vec::with_capacity(group.len());
        let mut digested = Vec::with_capacity(group.len());
        for &submission in group {
            let content = serde_json::to_vec(&submission.request)
                .map_err(|_| DbError::Unexpected { place: "a parsed request" })?;
            let digest = self.keys.content_digest(&content);
            let id = id_of(submission);
            digested.push((id.clone(), digest.clone()));
            if !firsts.contains_key(&id) {
                firsts.insert(id.clone(), prepared.len());
                let sealed = self.keys.requests().seal(&sealing_context(&id.0, id.1), &content)?;
                let reporting = Reporting::seal(&self.keys, &id.0, id.1, &submission.request)?;
                prepared.push(Prepared { submission, digest, sealed, reporting });
            }
        }
        let mut recorded = super::retrying(|| self.record_distinct(db, &prepared)).await;
        // A week that was known has been dropped meanwhile.
        if recorded.as_ref().is_err_and(is_without_week) {
            self.weeks.forget();
            recorded = super::retrying(|| self.record_distinct(db, &prepared)).await;
        }
        let recorded = recorded?;
        let mut outcomes = Vec::with_capacity(group.len());
        let mut answered: HashSet<Id> = HashSet::new();
        for (id, digest) in digested {
            let row = recorded.rows.get(&id).ok_or(DbError::Unexpected { place: "requests" })?;
            outcomes.push(if row.digest == digest {
                Recorded::Accepted {
                    received_at: row.received_at,
                    expected_completion_time: row.expected_completion_time,
                    first: row.inserted && answered.insert(id),
                }
            } else {
                Recorded::Conflict
            });
        }
        Ok(RecordedGroup { outcomes, endpoints: recorded.endpoints })
    }

    async fn record_distinct(&self, db: &Db, group: &[Prepared<'_>]) -> Result<Distinct, DbError> {
        let wanted = origins_of(group);
        let asked_at = Instant::now();
        let mut endpoints = match wanted.as_slice() {
            [] => HashMap::new(),
            wanted => self.endpoints.resolve(&db.session().await?, wanted).await?,
        };
        let tx = db.begin("record_requests").await?;
        if tx.connected_at() > asked_at && !wanted.is_empty() {
            // The server may be another one than that which was asked.
            endpoints = self.endpoints.resolve(&tx, &wanted).await?;
        }
        let Intake { received_at, calendar: version } = begin_intake(&tx).await?;
        let calendar = self.calendars.get(&tx, version).await?;

        let (mut opened, read_at) = (HashMap::new(), Instant::now());
        let mut weeks: Vec<Week> = Vec::new();
        let mut plans = Vec::with_capacity(group.len());
        let matched = self.matching(&tx, group).await?;
        for (prepared, matched) in group.iter().zip(&matched) {
            let lane = prepared.submission.request.lane();
            let slot = calendar.calendar.slot(lane, received_at)?;
            // Nobody knows when one over the cap will run: it moves on until then.
            let place =
                if matched.over_cap { received_at } else { details::place(slot.runs_at, calendar.details_span) };
            let week = self.week(&tx, &mut weeks, place).await?;
            // Over the cap there is no batch yet: the approval opens one.
            let batch = if matched.over_cap {
                None
            } else {
                Some(self.batch(&tx, &mut opened, lane, slot, calendar.version).await?)
            };
            plans.push(Plan { lane, batch, week, expected: slot.expected_completion_time });
        }
        let keys = insert_requests(&tx, &self.keys, group, &plans, received_at).await?;
        let distinct = insert_consequences(&tx, group, &plans, &matched, &keys, &endpoints, received_at).await?;
        fault::point("intake.before_commit");
        tx.commit().await?;
        self.weeks.remember(&weeks, read_at, received_at);
        let opened = opened.into_iter().map(|(slot, batch)| (slot, (batch, read_at)));
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).extend(opened);
        Ok(distinct)
    }

    async fn matching(&self, tx: &Tx, group: &[Prepared<'_>]) -> Result<Vec<Matched>, DbError> {
        let wanted: Vec<_> = group
            .iter()
            .map(|one| Wanted {
                controller_id: &one.submission.controller_id,
                identities: &one.submission.request.identities,
                named: &one.submission.request.mpids,
                cap: Some(self.cap),
            })
            .collect();
        matching::find(tx, &wanted).await
    }

    /// The week that holds an instant; `opened` are those that this transaction has read.
    async fn week(&self, tx: &Tx, opened: &mut Vec<Week>, place: Timestamp) -> Result<i64, DbError> {
        if let Some(week) = opened.iter().find(|week| week.holds(place)).copied().or_else(|| self.weeks.find(tx, place))
        {
            return Ok(week.number);
        }
        let week = details::open_week(tx, place).await?;
        opened.push(week);
        Ok(week.number)
    }

    /// The open batch of a slot; the first request of a slot opens it.
    async fn batch(
        &self,
        tx: &Tx,
        opened: &mut HashMap<(Lane, Slot), BatchId>,
        lane: Lane,
        slot: Slot,
        version: i64,
    ) -> Result<BatchId, DbError> {
        let key = (lane, slot);
        let known = self.batches.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        // One that was read before the session was connected may have been another server's, and be lost.
        let is_of_this_server = |read_at| tx.connected_at() <= read_at || fault::defect("lost_commits_believed");
        let known = known.filter(|(_, read_at)| is_of_this_server(*read_at)).map(|(batch, _)| batch);
        if let Some(batch) = known.or_else(|| opened.get(&key).copied()) {
            return Ok(batch);
        }
        let batch = open_batch(tx, lane, slot, version).await?;
        // No request is scheduled for a tick behind us.
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, old), _| old.tick_at >= slot.tick_at);
        opened.insert(key, batch);
        Ok(batch)
    }
}

/// PostgreSQL has no partition for a row, or the trigger of the details has found that there is none any more.
fn is_without_week(error: &DbError) -> bool {
    error.code().is_some_and(|code| *code == SqlState::CHECK_VIOLATION)
}

/// Where the callbacks of a group go.
fn origins_of(group: &[Prepared<'_>]) -> Vec<(ControllerId, Origin)> {
    let submissions = group.iter().map(|one| one.submission);
    submissions.flat_map(|one| one.origins.iter().map(|origin| (one.controller_id.clone(), origin.clone()))).collect()
}

fn id_of(submission: &Submission) -> Id {
    (submission.controller_id.clone(), submission.request.subject_request_id)
}

struct Plan {
    lane: Lane,
    batch: Option<BatchId>,
    /// Of its details.
    week: i64,
    expected: Timestamp,
}

struct Row {
    digest: Vec<u8>,
    received_at: Timestamp,
    expected_completion_time: Timestamp,
    inserted: bool,
}

struct Distinct {
    rows: HashMap<Id, Row>,
    endpoints: BTreeSet<EndpointId>,
}

/// Inserts what is new and returns the keys of it.
async fn insert_requests(
    tx: &Tx,
    keys: &Keys,
    group: &[Prepared<'_>],
    plans: &[Plan],
    received_at: Timestamp,
) -> Result<HashMap<Id, RequestKey>, DbError> {
    let requests = || group.iter().map(|one| &one.submission.request);
    let controllers: Vec<&str> = group.iter().map(|one| one.submission.controller_id.as_str()).collect();
    let ids: Vec<SubjectRequestId> = requests().map(|request| request.subject_request_id).collect();
    let versions: Vec<ApiVersion> = requests().map(|request| request.api_version).collect();
    let regulations: Vec<Option<Regulation>> = requests().map(|request| request.regulation).collect();
    let types: Vec<RequestType> = requests().map(|request| request.subject_request_type).collect();
    let lanes: Vec<Lane> = plans.iter().map(|plan| plan.lane).collect();
    let batches: Vec<Option<BatchId>> = plans.iter().map(|plan| plan.batch).collect();
    let digests: Vec<&[u8]> = group.iter().map(|one| one.digest.as_slice()).collect();
    let weeks: Vec<i64> = plans.iter().map(|plan| plan.week).collect();
    let groups: Vec<Option<Vec<u8>>> = group
        .iter()
        .map(|one| {
            let group_id = one.submission.request.group_id.as_deref();
            group_id.map(|group_id| keys.group_digest(one.submission.controller_id.as_str(), group_id))
        })
        .collect();
    let submitted: Vec<Timestamp> = requests().map(|request| request.submitted_time).collect();
    let expected: Vec<Timestamp> = plans.iter().map(|plan| plan.expected).collect();
    let approvals: Vec<Approval> =
        plans.iter().map(|plan| if plan.batch.is_some() { Approval::NotNeeded } else { Approval::Needed }).collect();
    let rows = tx
        .query(
            INSERT_REQUESTS,
            &[
                &controllers,
                &ids,
                &versions,
                &regulations,
                &types,
                &lanes,
                &batches,
                &digests,
                &weeks,
                &groups,
                &submitted,
                &expected,
                &received_at,
                &approvals,
            ],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| ((row.get("controller_id"), row.get("subject_request_id")), row.get("request_key")))
        .collect())
}

/// What follows from the requests that were inserted, and what is known of those that were there before.
async fn insert_consequences(
    tx: &Tx,
    group: &[Prepared<'_>],
    plans: &[Plan],
    matched: &[Matched],
    keys: &HashMap<Id, RequestKey>,
    endpoints: &HashMap<(ControllerId, Origin), EndpointId>,
    received_at: Timestamp,
) -> Result<Distinct, DbError> {
    let mut rows = HashMap::with_capacity(group.len());
    let mut woken = BTreeSet::new();
    let mut new_details = Vec::with_capacity(group.len());
    let (mut callback_keys, mut url_nos, mut endpoint_ids, mut expected) =
        (Vec::new(), Vec::<i16>::new(), Vec::new(), Vec::new());
    let (mut new_controllers, mut new_ids, mut new_keys) = (Vec::new(), Vec::new(), Vec::new());
    let (mut old_controllers, mut old_ids) = (Vec::new(), Vec::new());
    for ((one, plan), matched) in group.iter().zip(plans).zip(matched) {
        let id = id_of(one.submission);
        let Some(key) = keys.get(&id) else {
            old_controllers.push(id.0.as_str().to_owned());
            old_ids.push(id.1);
            continue;
        };
        new_details.push(Details {
            week: plan.week,
            request_key: *key,
            controller_id: &one.submission.controller_id,
            sealed_request: &one.sealed,
            sealed_reporting: &one.reporting,
            named: &one.submission.request.mpids,
            at_receipt: matched.mpids.iter().filter(|_| !matched.over_cap).copied().collect(),
        });
        for (url_no, origin) in (0..).zip(&one.submission.origins) {
            let endpoint = endpoints.get(&(id.0.clone(), origin.clone()));
            let endpoint = *endpoint.ok_or(DbError::Unexpected { place: "endpoints" })?;
            callback_keys.push(*key);
            url_nos.push(url_no);
            endpoint_ids.push(endpoint);
            expected.push(plan.expected);
            woken.insert(endpoint);
        }
        new_controllers.push(id.0.as_str().to_owned());
        new_ids.push(id.1);
        new_keys.push(*key);
        rows.insert(
            id,
            Row { digest: one.digest.clone(), received_at, expected_completion_time: plan.expected, inserted: true },
        );
    }
    if !new_details.is_empty() {
        details::insert(tx, &new_details).await?;
    }
    if !callback_keys.is_empty() {
        tx.execute(INSERT_FIRST_CALLBACKS, &[&callback_keys, &url_nos, &endpoint_ids, &expected, &received_at]).await?;
    }
    if !new_keys.is_empty() {
        let early = tx.query(TAKE_EARLY_CANCELLATIONS, &[&new_controllers, &new_ids, &new_keys, &received_at]).await?;
        if !early.is_empty() {
            let cancelled: Vec<RequestKey> = early.iter().map(|row| row.get("request_key")).collect();
            let times: Vec<Timestamp> = early.iter().map(|row| row.get("received_at")).collect();
            tx.execute(CANCEL_AT_BIRTH, &[&cancelled, &times]).await?;
            callbacks::add(tx, &cancelled, RequestStatus::Cancelled).await?;
        }
    }
    if !old_ids.is_empty() {
        for row in tx.query(FIND_EXISTING, &[&old_controllers, &old_ids]).await? {
            rows.insert(
                (row.get("controller_id"), row.get("subject_request_id")),
                Row {
                    digest: row.get("content_digest"),
                    received_at: row.get("received_at"),
                    expected_completion_time: row.get("expected_completion_time"),
                    inserted: false,
                },
            );
        }
    }
    Ok(Distinct { rows, endpoints: woken })
}
