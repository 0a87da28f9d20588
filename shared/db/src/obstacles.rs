//! What keeps work from ending, other than the work itself, for `lethe doctor`.

use jiff::Timestamp;

use super::pool::Session;
use super::{DbError, statements};
use lethe_domain::request::ControllerId;

statements! {
    /// Tables of ours whose rows nothing identifies, while something is published: deletes from them may be refused.
    WITHOUT_KEY = "
        SELECT c.oid::regclass::text FROM pg_class c
         WHERE c.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('lethe', 'subject_data'))
           AND c.relkind = 'r' AND c.relreplident <> 'f'
           AND NOT EXISTS (SELECT FROM pg_index i
                            WHERE i.indrelid = c.oid
                              AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END)
           AND EXISTS (SELECT FROM pg_publication WHERE pubdelete OR pubupdate)
         ORDER BY 1 LIMIT 10";
    /// From PostgreSQL 18 on. The key of identities holds a digest that is generated: a publication without generated columns
    /// does not identify them. Older servers do not have the column that says so.
    WITHOUT_GENERATED = "
        SELECT p.pubname::text FROM pg_publication p
         WHERE to_jsonb(p) ->> 'pubgencols' = 'n' AND (p.pubdelete OR p.pubupdate)
           AND (p.puballtables OR EXISTS (SELECT FROM pg_publication_tables t
                                           WHERE t.pubname = p.pubname AND t.schemaname = 'subject_data'))
         ORDER BY 1 LIMIT 10";
    /// By name and age; the name is their maker's.
    PREPARED = "
        SELECT transaction::text AS xid, prepared AS since FROM pg_prepared_xacts
         WHERE database = current_database() AND prepared < clock_timestamp() - interval '5 minutes'
         ORDER BY prepared LIMIT 10";
    /// A pause may outlive its work: whoever finished the last slice has died before the pause was ended.
    PAUSES = "
        SELECT p.stage, p.controller_id, p.class, p.failures, p.since FROM lethe.pauses p
         WHERE p.failures > 1
           AND EXISTS (SELECT FROM lethe.slices s
                        WHERE s.stage = p.stage AND s.controller_id = p.controller_id AND s.state = 'ready')
         ORDER BY p.since LIMIT 10";
    FOR_OPERATOR = "
        SELECT controller_id, coalesce(last_error, '') AS class, count(*) AS slices FROM lethe.slices
         WHERE state = 'ready' AND needs_operator GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 10";
}

/// What was found; of each kind the first ten.
#[derive(Clone, Debug, Default)]
pub struct Obstacles {
    /// Tables that a publication may keep from being deleted from.
    pub without_key: Vec<String>,
    /// Publications that leave out what identifies the rows of identities: deletes of these are refused.
    pub without_generated: Vec<String>,
    /// Prepared transactions that nobody has ended for minutes.
    pub prepared: Vec<Prepared>,
    /// Controllers whose work failed more than once in a row.
    pub failing: Vec<Failing>,
    /// What waiting does not mend.
    pub for_operator: Vec<ForOperator>,
}

/// A prepared transaction.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its transaction id.
    pub xid: String,
    /// When it was prepared.
    pub since: Timestamp,
}

/// A controller whose work on a stage fails.
#[derive(Clone, Debug)]
pub struct Failing {
    /// The stage.
    pub stage: String,
    /// Whose work.
    pub controller_id: ControllerId,
    /// The class of the last error.
    pub class: String,
    /// Failures in a row.
    pub failures: i32,
    /// When the first of them was.
    pub since: Timestamp,
}

/// Slices that wait for an operator.
#[derive(Clone, Debug)]
pub struct ForOperator {
    /// Whose they are.
    pub controller_id: ControllerId,
    /// The class of their error.
    pub class: String,
    /// How many there are.
    pub slices: i64,
}

/// Looks for obstacles.
///
/// # Errors
/// [`DbError`].
pub async fn find(session: &Session) -> Result<Obstacles, DbError> {
    let prepared = session.query(PREPARED, &[]).await?;
    let failing = session.query(PAUSES, &[]).await?;
    let for_operator = session.query(FOR_OPERATOR, &[]).await?;
    Ok(Obstacles {
        without_key: session.values(WITHOUT_KEY, &[]).await?,
        without_generated: session.values(WITHOUT_GENERATED, &[]).await?,
        prepared: prepared.iter().map(|row| Prepared { xid: row.get("xid"), since: row.get("since") }).collect(),
        failing: failing
            .iter()
            .map(|row| Failing {
                stage: row.get("stage"),
                controller_id: row.get("controller_id"),
                class: row.get("class"),
                failures: row.get("failures"),
                since: row.get("since"),
            })
            .collect(),
        for_operator: for_operator
            .iter()
            .map(|row| ForOperator {
                controller_id: row.get("controller_id"),
                class: row.get("class"),
                slices: row.get("slices"),
            })
            .collect(),
    })
}
