//! Release: a due batch becomes slices, step by step. Each step is one transaction: match once more,
//! apply the cap, set `in_progress`, write slices and callbacks. A batch of any size can be resumed at every step.
//!
//! **Invariant** (DESIGN rule 6): a step of a release is one transaction, bounded in requests, profiles and bytes.

use std::collections::BTreeSet;

use tokio_postgres::Row;

use super::batches::PENDING;
use super::details::{self, FoundAtRelease};
use super::leader::{self, Term};
use super::matching::{self, Matched, Wanted};
use super::pool::{Column, Session};
use super::sealed::open_request;
use super::{Db, DbError, Tx, callbacks, statements};
use lethe_domain::crypto::Keys;
use lethe_domain::opendsr::SubjectRequest;
use lethe_domain::request::{
    Approval, BatchId, ControllerId, EndpointId, Lane, Mpid, RequestKey, RequestStatus, SliceId, Stage,
};

statements! {
    /// Where the last step ended. Whoever found the batch due may have read a clock that was ahead.
    PLACE = "
        SELECT released_controller, released_request FROM lethe.batches
         WHERE batch_id = $1 AND state = 'closed' AND runs_at <= lethe.now()";
    /// Locks in the order of the key, as cancellations do.
    TAKE = "
        SELECT r.request_key, r.controller_id, r.subject_request_id, r.approval, r.details_week, d.sealed_request,
               d.at_receipt, chosen.place FROM (
            -- Bounded in bytes as well as in number; the first is taken whatever its size.
            SELECT first.request_key, row_number() OVER (ORDER BY first.controller_id, first.request_key) AS place,
                   sum(octet_length(d.sealed_request)) OVER (ORDER BY first.controller_id, first.request_key)
                       - octet_length(d.sealed_request) AS bytes_before
              FROM (SELECT request_key, controller_id, details_week FROM lethe.requests
                     WHERE batch_id = $1 AND (controller_id, request_key) > ($4, $5) AND status = 'pending'
                     ORDER BY controller_id, request_key LIMIT $2) first
              LEFT JOIN LATERAL (SELECT sealed_request FROM lethe.request_details d
                                  WHERE d.week = first.details_week AND d.request_key = first.request_key OFFSET 0) d
                ON true) chosen
          JOIN lethe.requests r USING (request_key)
          LEFT JOIN LATERAL (SELECT sealed_request, at_receipt FROM lethe.request_details d
                              WHERE d.week = r.details_week AND d.request_key = r.request_key OFFSET 0) d ON true
         WHERE r.status = 'pending' AND r.batch_id = $1 AND coalesce(chosen.bytes_before, 0) < $3
         ORDER BY r.request_key FOR UPDATE OF r";
    /// Back to the operator: visible, cancellable, in no batch.
    HOLD_BACK = "
        UPDATE lethe.requests SET approval = 'needed', batch_id = NULL WHERE request_key = ANY ($1) AND status = 'pending'";
    ADVANCE = "
        UPDATE lethe.batches SET released_controller = $2, released_request = $3 WHERE batch_id = $1";
    ADD_SLICE = "
        INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count, first_request, last_request)
        VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING slice_id";
    BEGIN_PROGRESS = "
        UPDATE lethe.requests r
           SET status = 'in_progress', in_progress_at = (SELECT lethe.now()), slice_id = q.slice_id
          FROM unnest($1::bigint[], $2::bigint[]) AS q (request_key, slice_id)
         WHERE r.request_key = q.request_key AND r.status = 'pending'";
    FINISH = "
        UPDATE lethe.batches SET state = 'released', released_at = lethe.now()
         WHERE batch_id = $1 AND state = 'closed'
           AND NOT EXISTS (SELECT FROM lethe.requests r WHERE r.batch_id = $1 AND r.status = 'pending')";
}

/// Sealed bytes of a step at most.
const MAX_STEP_BYTES: i64 = 4 << 20;

/// Bounds of a slice and of a step.
#[derive(Clone, Copy, Debug)]
pub struct SliceLimits {
    /// Requests taken in one step, that is in one transaction.
    pub step: u32,
    /// Requests of a slice at most.
    pub requests: usize,
    /// Profiles of a slice at most; a request with more is a slice of its own.
    pub mpids: usize,
}

impl Default for SliceLimits {
    fn default() -> Self {
        Self { step: 500, requests: 500, mpids: 2_000 }
    }
}

/// A step of a release.
#[derive(Debug, Default)]
pub struct Step {
    /// Slices to work on.
    pub slices: Vec<SliceId>,
    /// Endpoints that have callbacks now.
    pub endpoints: BTreeSet<EndpointId>,
    /// Requests that were released.
    pub released: usize,
    /// Requests that match too many profiles and wait for an operator now.
    pub held_back: usize,
    /// Nothing of the batch is left to release.
    pub finished: bool,
    /// The batch is not due, or another one has released it: nothing was done.
    pub passed_over: bool,
}

struct Candidate {
    key: RequestKey,
    controller_id: ControllerId,
    request: SubjectRequest,
    /// Of its details.
    week: i64,
    /// What it matched as it was received.
    known: BTreeSet<Mpid>,
    approved: bool,
}

/// The requests of these rows, and the keys of those that cannot be opened. Where not one can, the master key is the
/// wrong one, and that is an error: nothing of the batch must be touched.
fn read_candidates(rows: &[Row], keys: &Keys) -> Result<(Vec<Candidate>, Vec<RequestKey>), DbError> {
    let (mut candidates, mut unreadable, mut first_error) = (Vec::with_capacity(rows.len()), Vec::new(), None);
    for row in rows {
        match read_candidate(row, keys) {
            Ok(candidate) => candidates.push(candidate),
            Err(error) => {
                let key: RequestKey = row.get("request_key");
                tracing::error!(%error, request = %key, "a request cannot be opened");
                unreadable.push(key);
                first_error.get_or_insert(error);
            }
        }
    }
    match first_error {
        Some(error) if candidates.is_empty() => Err(error),
        _ => Ok((candidates, unreadable)),
    }
}

fn read_candidate(row: &Row, keys: &Keys) -> Result<Candidate, DbError> {
    let unexpected = || DbError::Unexpected { place: "requests" };
    let controller_id: ControllerId = row.get("controller_id");
    let sealed: Option<&[u8]> = row.get("sealed_request");
    let request = open_request(keys, &controller_id, row.get("subject_request_id"), sealed.ok_or_else(unexpected)?)?;
    Ok(Candidate {
        key: row.get("request_key"),
        controller_id,
        request,
        week: row.get::<_, Option<i64>>("details_week").ok_or_else(unexpected)?,
        known: row.get::<_, Option<Vec<Mpid>>>("at_receipt").unwrap_or_default().into_iter().collect(),
        approved: row.column::<Approval>("approval")? == Approval::Approved,
    })
}

/// The next requests of a batch, `None` where it is not due. How far we are then is written now: whatever of them cannot
/// be released is handled in this transaction.
async fn take(tx: &Tx, batch_id: BatchId, limits: SliceLimits) -> Result<Option<Vec<Row>>, DbError> {
    let Some(place) = tx.query_opt(PLACE, &[&batch_id]).await? else { return Ok(None) };
    let (controller, request): (&str, RequestKey) = (place.get("released_controller"), place.get("released_request"));
    let rows = tx.query(TAKE, &[&batch_id, &i64::from(limits.step), &MAX_STEP_BYTES, &controller, &request]).await?;
    // The order is the database's: it compares texts by its own rules.
    if let Some(last) = rows.iter().max_by_key(|row| row.get::<_, i64>("place")) {
        tx.execute(
            ADVANCE,
            &[&batch_id, &last.get::<_, &str>("controller_id"), &last.get::<_, RequestKey>("request_key")],
        )
        .await?;
    }
    Ok(Some(rows))
}

async fn match_again(session: &Session, candidates: &[Candidate], cap: u32) -> Result<Vec<Matched>, DbError> {
    let wanted: Vec<Wanted<'_>> = candidates
        .iter()
        .map(|one| Wanted {
            controller_id: &one.controller_id,
            identities: &one.request.identities,
            named: &one.request.mpids,
            cap: (!one.approved).then_some(cap),
        })
        .collect();
    matching::find(session, &wanted).await
}

/// Releases the next requests of a batch under the leader's term. One that is not due is passed over.
///
/// # Errors
/// [`DbError::LeadershipLost`]; [`DbError::ClockAhead`]; [`DbError::Crypto`] where a request was sealed under another master key. After an
/// error nothing of this step took place; where it was too much ([`DbError::is_too_much`]), less of it may do.
pub async fn step(
    db: &Db,
    keys: &Keys,
    term: &Term,
    batch: (BatchId, Lane),
    cap: u32,
    limits: SliceLimits,
) -> Result<Step, DbError> {
    super::retrying(|| step_once(db, keys, term, batch, cap, limits)).await
}

async fn step_once(
    db: &Db,
    keys: &Keys,
    term: &Term,
    (batch_id, lane): (BatchId, Lane),
    cap: u32,
    limits: SliceLimits,
) -> Result<Step, DbError> {
    let tx = db.begin("release_slices").await?;
    leader::assert_term(&tx, term).await?;
    let Some(rows) = take(&tx, batch_id, limits).await? else {
        tx.rollback().await;
        return Ok(Step { passed_over: true, ..Step::default() });
    };
    let (mut candidates, unreadable) = read_candidates(&rows, keys)?;
    if candidates.is_empty() {
        let finished = tx.execute(FINISH, &[&batch_id]).await? == 1;
        if !finished {
            // Something is pending that lies behind us: from the beginning, then.
            tx.execute(ADVANCE, &[&batch_id, &"", &RequestKey(0)]).await?;
        }
        leader::assert_clock(&tx, term).await?;
        tx.commit().await?;
        return Ok(Step { finished, ..Step::default() });
    }
    candidates.sort_by(|a, b| (&a.controller_id, a.key).cmp(&(&b.controller_id, b.key)));
    let mut matched = match_again(&tx, &candidates, cap).await?;
    join_known(&candidates, &mut matched, cap);

    let mut step = Step::default();
    let mut held: Vec<RequestKey> =
        candidates.iter().zip(&matched).filter(|(_, found)| found.over_cap).map(|(one, _)| one.key).collect();
    // An operator decides on what cannot be opened as well: it holds up nobody else.
    held.extend(unreadable);
    if !held.is_empty() {
        tx.execute(HOLD_BACK, &[&held]).await?;
        step.held_back = held.len();
    }
    let ready: Vec<(&Candidate, &Matched)> =
        candidates.iter().zip(&matched).filter(|(_, found)| !found.over_cap).collect();
    let (mut keys_of_slices, mut slice_ids) = (Vec::new(), Vec::new());
    let stage = Stage::of(lane);
    for members in cut(&ready, stage, limits) {
        let (Some((first, _)), Some((last, _))) = (members.first(), members.last()) else { continue };
        let mpids: usize = members.iter().map(|(one, found)| found.mpids.len() + one.request.mpids.len()).sum();
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
            [&batch_id, &first.controller_id, &stage, &count(members.len()), &count(mpids), &first.key, &last.key];
        let slice: SliceId = tx.value(ADD_SLICE, &params).await?;
        step.slices.push(slice);
        for (one, _) in members {
            keys_of_slices.push(one.key);
            slice_ids.push(slice);
        }
    }
    if !keys_of_slices.is_empty() {
        details::add_released(&tx, &found_now(&ready)).await?;
        let released = tx.execute(BEGIN_PROGRESS, &[&keys_of_slices, &slice_ids]).await?;
        step.released = usize::try_from(released).unwrap_or(0);
        step.endpoints = callbacks::add(&tx, &keys_of_slices, RequestStatus::InProgress).await?.into_iter().collect();
    }
    lethe_process::fault::point("release.before_commit");
    leader::assert_clock(&tx, term).await?;
    tx.commit().await?;
    Ok(step)
}

/// The union with what was matched at receipt; data that has gone meanwhile still counts, since a store beside the
/// built-in one may hold it. The cap counts the union.
fn join_known(candidates: &[Candidate], matched: &mut [Matched], cap: u32) {
    for (one, found) in candidates.iter().zip(matched) {
        found.mpids.extend(&one.known);
        found.over_cap |= !one.approved && found.mpids.len() > cap as usize;
    }
}

/// Cuts requests, sorted by controller, into slices: of one controller each, bounded in requests and in profiles.
fn cut<'a, 'b>(
    ready: &'b [(&'a Candidate, &'a Matched)],
    stage: Stage,
    limits: SliceLimits,
) -> Vec<&'b [(&'a Candidate, &'a Matched)]> {
    let most = stage.requests_per_slice(limits.requests);
    let mut slices = Vec::new();
    let mut begin = 0;
    let mut mpids = 0;
    for (index, (one, found)) in ready.iter().enumerate() {
        let size = found.mpids.len() + one.request.mpids.len();
        let full = index - begin >= most || mpids + size > limits.mpids;
        if index > begin && (full || ready[begin].0.controller_id != one.controller_id) {
            slices.push(&ready[begin..index]);
            begin = index;
            mpids = 0;
        }
        mpids += size;
    }
    if begin < ready.len() {
        slices.push(&ready[begin..]);
    }
    slices
}

/// What was matched now and not before: what is known from the receipt keeps its source.
fn found_now(ready: &[(&Candidate, &Matched)]) -> Vec<FoundAtRelease> {
    let new = |(one, found): &(&Candidate, &Matched)| FoundAtRelease {
        week: one.week,
        request_key: one.key,
        mpids: found.mpids.difference(&one.known).copied().collect(),
    };
    ready.iter().map(new).filter(|found| !found.mpids.is_empty()).collect()
}

/// What a batch that has not run yet would be executed on, exact as of the caller's snapshot.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Requests that would be released.
    pub requests: usize,
    /// Requests that would be held back for an operator.
    pub held_back: usize,
    /// Profiles, by controller; a profile that two requests match is there once.
    pub mpids: std::collections::BTreeMap<ControllerId, BTreeSet<Mpid>>,
}

/// Plans a batch without changing anything: the same matching and the same cap as [`step`].
///
/// # Errors
/// [`DbError`].
pub async fn plan(tx: &Tx, keys: &Keys, batch_id: BatchId, cap: u32) -> Result<Plan, DbError> {
    let mut plan = Plan::default();
    let mut after = RequestKey(0);
    loop {
        let rows = tx.query(PENDING, &[&batch_id, &after, &500_i64]).await?;
        let (candidates, unreadable) = read_candidates(&rows, keys)?;
        let Some(last) = rows.last() else { return Ok(plan) };
        after = last.get("request_key");
        plan.held_back += unreadable.len();
        let mut matched = match_again(tx, &candidates, cap).await?;
        join_known(&candidates, &mut matched, cap);
        for (one, found) in candidates.iter().zip(matched) {
            if found.over_cap {
                plan.held_back += 1;
            } else {
                plan.requests += 1;
                let all = plan.mpids.entry(one.controller_id.clone()).or_default();
                all.extend(found.mpids);
                all.extend(&one.request.mpids);
            }
        }
    }
}
