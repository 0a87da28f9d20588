//! Matching: which profiles of a controller carry any of the identities of a request (contract 4).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::TryStreamExt;
use tokio_postgres::types::ToSql;

use super::pool::Session;
use super::{DbError, statements};
use lethe_domain::opendsr::{Identity, IdentityFormat};
use lethe_domain::request::{ControllerId, Mpid};

statements! {
    /// One probe of one index per identity, whatever the size: the lateral query with its limit leaves the planner no
    /// other way. One controller at a time, so that its partition is chosen, and locked, alone. Keys come from us: a
    /// call of an SQL function for each probe costs many times the probe, and beside the row-level security of the gateway
    /// only plain comparisons may choose rows of an index.
    MATCH_SHA256 = "
        SELECT q.ord, found.mpid
          FROM unnest($2::int[], $3::uuid[]) AS q (ord, key)
         CROSS JOIN LATERAL (
            SELECT p.mpid FROM subject_data.profile_identities p
             WHERE p.controller_id = $1 AND p.by_sha256 = q.key LIMIT $4) found";
    MATCH_SHA1 = "
        SELECT q.ord, found.mpid
          FROM unnest($2::int[], $3::uuid[]) AS q (ord, key)
         CROSS JOIN LATERAL (
            SELECT p.mpid FROM subject_data.profile_identities p
             WHERE p.controller_id = $1 AND p.by_sha1 = q.key LIMIT $4) found";
    MATCH_MD5 = "
        SELECT q.ord, found.mpid
          FROM unnest($2::int[], $3::uuid[]) AS q (ord, key)
         CROSS JOIN LATERAL (
            SELECT p.mpid FROM subject_data.profile_identities p
             WHERE p.controller_id = $1 AND p.by_md5 = q.key LIMIT $4) found";
}

/// The index that knows the keys of a kind of digest.
const PROBES: [(&str, IdentityFormat); 3] =
    [(MATCH_SHA256, IdentityFormat::Sha256), (MATCH_SHA1, IdentityFormat::Sha1), (MATCH_MD5, IdentityFormat::Md5)];

/// What is looked for: the identities of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// Whose profiles.
    pub controller_id: &'a ControllerId,
    /// Which identities.
    pub identities: &'a [Identity],
    /// The profiles that the request names itself; they do not count for the cap.
    pub named: &'a [Mpid],
    /// How many other profiles may match; `None` for an approved request.
    pub cap: Option<u32>,
}

/// What was found for one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Matched {
    /// The matching profiles, without those that the request names itself. Incomplete where the cap is exceeded.
    pub mpids: BTreeSet<Mpid>,
    /// More profiles match than the cap allows.
    pub over_cap: bool,
}

/// Finds the profiles of each wanted request, in the order of `wanted`. Rows are streamed, and those of a request
/// that is over its cap are dropped, so that memory stays bounded whatever matches.
///
/// # Errors
/// [`DbError`].
pub(crate) async fn find(session: &Session, wanted: &[Wanted<'_>]) -> Result<Vec<Matched>, DbError> {
    let mut found = vec![Matched::default(); wanted.len()];
    let mut of_controller: BTreeMap<&ControllerId, Vec<(i32, &Wanted<'_>)>> = BTreeMap::new();
    for (ord, one) in (0..).zip(wanted).filter(|(_, one)| !one.identities.is_empty()) {
        of_controller.entry(one.controller_id).or_default().push((ord, one));
    }
    for (controller_id, theirs) in of_controller {
        find_of(session, controller_id, &theirs, &mut found).await?;
    }
    Ok(found)
}

async fn find_of(
    session: &Session,
    controller_id: &ControllerId,
    wanted: &[(i32, &Wanted<'_>)],
    found: &mut [Matched],
) -> Result<(), DbError> {
    let by_ord: HashMap<i32, &Wanted<'_>> = wanted.iter().copied().collect();
    // One more than the cap and the named ones can explain shows that it is exceeded.
    let named = |one: &Wanted<'_>| i64::try_from(one.named.len()).unwrap_or(0);
    let limit_of = |one: &Wanted<'_>| one.cap.map_or(i64::MAX, |cap| i64::from(cap) + 1 + named(one));
    let limit: i64 = wanted.iter().map(|(_, one)| limit_of(one)).max().unwrap_or(0);
    for (statement, kind) in PROBES {
        let (mut ords, mut keys) = (Vec::new(), Vec::new());
        for (ord, identity) in wanted.iter().flat_map(|(ord, one)| one.identities.iter().map(move |one| (*ord, one))) {
            let (of, key) = identity.key().ok_or(DbError::Unexpected { place: "an identity's digest" })?;
            if of == kind {
                ords.push(ord);
                keys.push(key);
            }
        }
        if ords.is_empty() {
            continue;
        }
        let params: [&(dyn ToSql + Sync); 4] = [controller_id, &ords, &keys, &limit];
        let rows = session.stream(statement, &params).await?;
        futures_util::pin_mut!(rows);
        while let Some(row) = rows.try_next().await? {
            let (ord, mpid): (i32, Mpid) = (row.get("ord"), row.get("mpid"));
            let place = usize::try_from(ord).ok().and_then(|index| found.get_mut(index)).zip(by_ord.get(&ord));
            let (matched, one) = place.ok_or(DbError::Unexpected { place: "profile_identities" })?;
            if matched.over_cap || one.named.contains(&mpid) {
                continue;
            }
            matched.mpids.insert(mpid);
            matched.over_cap = one.cap.is_some_and(|cap| matched.mpids.len() > cap as usize);
        }
    }
    Ok(())
}
