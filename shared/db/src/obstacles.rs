//! What keeps work from its end and is not the work itself, for `lethe doctor`.

use jiff::Timestamp;

use super::pool::Session;
use super::{DbError, statements};

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
    /// By name and age; the name is their maker's.
    PREPARED = "
        SELECT transaction::text, prepared FROM pg_prepared_xacts
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
        SELECT controller_id, last_error, count(*) FROM lethe.slices
         WHERE state = 'ready' AND needs_operator GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 10";
}

/// What was found; of each kind the first ten.
#[derive(Clone, Debug, Default)]
pub struct Obstacles {
    /// Tables that a publication may keep from being deleted from.
    pub without_key: Vec<String>,
    /// Prepared transactions that nobody has ended for minutes: xid, and since when.
    pub prepared: Vec<(String, Timestamp)>,
    /// Controllers whose work failed more than once in a row: stage, controller, class, how often, since when.
    pub pauses: Vec<(String, String, String, i32, Timestamp)>,
    /// What waiting does not mend: controller, class, number of slices.
    pub for_operator: Vec<(String, String, i64)>,
}

/// Looks for obstacles.
///
/// # Errors
/// [`DbError`].
pub async fn find(session: &Session) -> Result<Obstacles, DbError> {
    let without_key = session.query(WITHOUT_KEY, &[]).await?;
    let prepared = session.query(PREPARED, &[]).await?;
    let pauses = session.query(PAUSES, &[]).await?;
    let for_operator = session.query(FOR_OPERATOR, &[]).await?;
    Ok(Obstacles {
        without_key: without_key.iter().map(|row| row.get(0)).collect(),
        prepared: prepared.iter().map(|row| (row.get(0), row.get(1))).collect(),
        pauses: pauses.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))).collect(),
        for_operator: for_operator
            .iter()
            .map(|row| (row.get(0), row.get::<_, Option<_>>(1).unwrap_or_default(), row.get(2)))
            .collect(),
    })
}
