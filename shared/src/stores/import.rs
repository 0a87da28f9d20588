//! Import of subject data from JSON Lines into the built-in store (contract 8).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::StoreError;
use crate::db::{Db, DbError, statements};
use crate::opendsr::{DeniedValues, Identity, IdentityFormat, IdentityType};
use crate::request::{ControllerId, Mpid};

statements! {
    UPSERT_PROFILES = "
        INSERT INTO subject_data.profiles AS p (controller_id, mpid, attributes, audiences)
        SELECT $1, mpid, attributes::jsonb, audiences::jsonb
          FROM unnest($2::bigint[], $3::text[], $4::text[]) AS q (mpid, attributes, audiences) ORDER BY mpid
        ON CONFLICT (controller_id, mpid)
        DO UPDATE SET attributes = excluded.attributes, audiences = excluded.audiences, updated_at = clock_timestamp()";
    INSERT_IDENTITIES = "
        INSERT INTO subject_data.profile_identities (controller_id, identity_type, identity_value, mpid)
        SELECT $1, identity_type, identity_value, mpid
          FROM unnest($2::bigint[], $3::text[], $4::text[]) AS q (mpid, identity_type, identity_value)
         ORDER BY mpid, identity_type
        ON CONFLICT DO NOTHING";
    INSERT_EVENT_BATCHES = "
        INSERT INTO subject_data.event_batches (controller_id, mpid, body)
        SELECT $1, mpid, body::json FROM unnest($2::bigint[], $3::text[]) AS q (mpid, body)";
    CONTROLLER_EXISTS = "SELECT 1 FROM lethe.controllers WHERE controller_id = $1";
}

/// The longest line, in bytes: one line must fit into one file of a portability result.
pub const MAX_LINE: usize = 64 * 1024 * 1024 - 1;

/// A line that cannot be imported.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidLine {
    /// No JSON object of the expected shape.
    #[error("is no valid JSON object with an integer `mpid` (column {column})")]
    Json {
        /// From 1.
        column: usize,
    },
    /// An identity type that nobody knows.
    #[error("has an unknown identity type")]
    IdentityType,
    /// Longer than [`MAX_LINE`].
    #[error("is longer than 64 MiB")]
    TooLong,
}

impl InvalidLine {
    fn json(error: &serde_json::Error) -> Self {
        Self::Json { column: error.column() }
    }
}

/// A line of an import of profiles.
#[derive(Debug)]
pub struct ProfileLine {
    mpid: Mpid,
    identities: Vec<(IdentityType, String)>,
    attributes: String,
    audiences: String,
    /// Identities that name nobody, which are left out.
    pub skipped: usize,
}

/// A line of an import of event batches: the batch itself, verbatim.
#[derive(Debug)]
pub struct EventBatchLine {
    mpid: Mpid,
    body: String,
}

/// A list would do for a struct as far as serde is concerned; here only an object does.
fn require_object(line: &str) -> Result<(), InvalidLine> {
    if line.trim_start().starts_with('{') { Ok(()) } else { Err(InvalidLine::Json { column: 1 }) }
}

impl ProfileLine {
    /// Reads `{"mpid":1,"identities":{"email":"…"},"attributes":{…},"audiences":[…]}`.
    ///
    /// # Errors
    /// [`InvalidLine`].
    pub fn parse(line: &str, denied: &DeniedValues) -> Result<Self, InvalidLine> {
        #[derive(Deserialize)]
        struct Line<'a> {
            mpid: i64,
            #[serde(default)]
            identities: BTreeMap<String, Option<String>>,
            #[serde(borrow)]
            attributes: Option<&'a RawValue>,
            #[serde(borrow)]
            audiences: Option<&'a RawValue>,
        }
        require_object(line)?;
        let parsed: Line<'_> = serde_json::from_str(line).map_err(|error| InvalidLine::json(&error))?;
        let (mut identities, mut skipped) = (Vec::new(), 0);
        for (name, value) in parsed.identities {
            let kind = IdentityType::named(&name).ok_or(InvalidLine::IdentityType)?;
            let value = value.unwrap_or_default();
            // What names nobody would match strangers: it is not indexed.
            if Identity::new(kind, IdentityFormat::Raw, &value, denied).is_ok() {
                identities.push((kind, value));
            } else {
                skipped += 1;
            }
        }
        let raw = |value: Option<&RawValue>, default: &str| value.map_or(default, RawValue::get).to_owned();
        Ok(Self {
            mpid: Mpid(parsed.mpid),
            identities,
            attributes: raw(parsed.attributes, "{}"),
            audiences: raw(parsed.audiences, "[]"),
            skipped,
        })
    }
}

impl EventBatchLine {
    /// Reads an event batch with a top-level `mpid`. Its own `timestamp_unixtime_ms` is the device's; the time of
    /// receipt is that of the import, since an erasure covers what was received before it, whatever a device says.
    ///
    /// # Errors
    /// [`InvalidLine`].
    pub fn parse(line: &str) -> Result<Self, InvalidLine> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Integer {
            Number(i64),
            Text(String),
        }
        #[derive(Deserialize)]
        struct Line {
            mpid: Integer,
        }
        if line.len() > MAX_LINE {
            return Err(InvalidLine::TooLong);
        }
        require_object(line)?;
        let parsed: Line = serde_json::from_str(line).map_err(|error| InvalidLine::json(&error))?;
        let mpid = match parsed.mpid {
            Integer::Number(number) => Some(number),
            Integer::Text(text) => text.trim().parse().ok(),
        };
        Ok(Self { mpid: Mpid(mpid.ok_or(InvalidLine::Json { column: 0 })?), body: line.to_owned() })
    }
}

/// Whether there is such a controller, and hence partitions for its data.
///
/// # Errors
/// [`StoreError`].
pub async fn controller_exists(db: &Db, controller_id: &ControllerId) -> Result<bool, StoreError> {
    Ok(db.session().await?.query_opt(CONTROLLER_EXISTS, &[controller_id]).await?.is_some())
}

/// Inserts or updates profiles, in one transaction.
///
/// # Errors
/// [`StoreError`].
pub async fn profiles(db: &Db, controller_id: &ControllerId, lines: &[ProfileLine]) -> Result<(), StoreError> {
    // Within one statement a key can be updated once only: the last line of a profile counts.
    let mut latest: BTreeMap<Mpid, &ProfileLine> = BTreeMap::new();
    for line in lines {
        latest.insert(line.mpid, line);
    }
    let mpids: Vec<Mpid> = latest.keys().copied().collect();
    let attributes: Vec<&str> = latest.values().map(|line| line.attributes.as_str()).collect();
    let audiences: Vec<&str> = latest.values().map(|line| line.audiences.as_str()).collect();
    let (mut owners, mut types, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for line in lines {
        for (kind, value) in &line.identities {
            owners.push(line.mpid);
            types.push(kind.as_str());
            values.push(value.as_str());
        }
    }
    crate::db::retrying(|| async {
        let tx = db.begin("import_profiles").await?;
        tx.execute(UPSERT_PROFILES, &[controller_id, &mpids, &attributes, &audiences]).await?;
        tx.execute(INSERT_IDENTITIES, &[controller_id, &owners, &types, &values]).await?;
        tx.commit().await
    })
    .await
    .map_err(StoreError::from)
}

/// Inserts event batches, in one transaction.
///
/// # Errors
/// [`StoreError`].
pub async fn event_batches(db: &Db, controller_id: &ControllerId, lines: &[EventBatchLine]) -> Result<(), StoreError> {
    let mpids: Vec<Mpid> = lines.iter().map(|line| line.mpid).collect();
    let bodies: Vec<&str> = lines.iter().map(|line| line.body.as_str()).collect();
    let insert = async {
        let tx = db.begin("import_event_batches").await?;
        tx.execute(INSERT_EVENT_BATCHES, &[controller_id, &mpids, &bodies]).await?;
        tx.commit().await
    };
    insert.await.map_err(|error: DbError| error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_lose_identities_that_name_nobody() {
        let line =
            r#"{"mpid":-5,"identities":{"email":"a@example.com","android_id":"","other":null},"attributes":{"a":1}}"#;
        let parsed = ProfileLine::parse(line, &DeniedValues::default()).unwrap();
        assert_eq!((parsed.mpid, parsed.identities.len(), parsed.skipped), (Mpid(-5), 1, 2));
        assert_eq!((parsed.attributes.as_str(), parsed.audiences.as_str()), (r#"{"a":1}"#, "[]"));
        assert_eq!(
            ProfileLine::parse(r#"{"mpid":1,"identities":{"shoe_size":"44"}}"#, &DeniedValues::default()).unwrap_err(),
            InvalidLine::IdentityType
        );
    }

    #[test]
    fn event_batches_stay_verbatim() {
        let line = r#"{"mpid": "9007199254740993",  "timestamp_unixtime_ms":1400000000000, "x":"\u00e4\\n"}"#;
        let parsed = EventBatchLine::parse(line).unwrap();
        assert_eq!((parsed.mpid, parsed.body.as_str()), (Mpid(9_007_199_254_740_993), line));
        assert!(EventBatchLine::parse(r#"{"x":1}"#).is_err());
        assert!(EventBatchLine::parse("[1]").is_err());
    }
}
