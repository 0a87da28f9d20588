//! Waiting for writers: what a transaction wrote before the start of an execution is not visible until it ends.
//!
//! The first claim of a slice remembers who was writing then. Whoever begins later writes what comes later, so their
//! number, and how they overlap, do not matter. A transaction of the list that has ended is gone for good; one that was
//! prepared lives on under another name.

use std::time::Duration;

use super::StoreError;
use lethe_db::Db;
use lethe_db::slices::{self, Claimed};
use lethe_process::fault;

/// Most writers take milliseconds. For longer ones the slice is given back, as it is: nobody waits for them with a permit.
const PATIENCE: Duration = Duration::from_millis(250);

/// Waits a moment for the writers from before the start of the execution.
///
/// # Errors
/// [`StoreError::WritersUnderWay`] if some are left.
pub(super) async fn wait(db: &Db, claimed: &Claimed) -> Result<(), StoreError> {
    if claimed.writers.is_empty() || fault::defect("writers_ignored") {
        return Ok(());
    }
    let begun = tokio::time::Instant::now();
    let mut left = claimed.writers.clone();
    let mut pause = Duration::from_millis(5);
    loop {
        let session = db.session().await?;
        left = remaining(&left, &slices::writers(&session, &claimed.controller_id).await?);
        if left.is_empty() || begun.elapsed() >= PATIENCE {
            // Whoever was seen to end need not be looked for again.
            slices::keep_writers(&session, claimed, &left).await?;
            return if left.is_empty() { Ok(()) } else { Err(StoreError::WritersUnderWay) };
        }
        drop(session);
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

fn is_prepared(writer: &str) -> bool {
    writer.starts_with("prepared/")
}

/// Those who are still to be waited for: who is there under the same name. Of a session's transaction that is not, it
/// cannot be told whether it has ended or was prepared; if it was, it is among those that are prepared now. Each
/// name can bring these in once, so this comes to an end whatever others begin meanwhile.
fn remaining(waited_for: &[String], now: &[String]) -> Vec<String> {
    let one_has_gone = waited_for.iter().any(|writer| !is_prepared(writer) && !now.contains(writer));
    now.iter().filter(|writer| waited_for.contains(writer) || (one_has_gone && is_prepared(writer))).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(waited_for: &[&str], now: &[&str]) -> Vec<String> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        remaining(&owned(waited_for), &owned(now))
    }

    #[test]
    fn later_writers_do_not_count() {
        assert_eq!(left(&["3/1/10", "4/1/11"], &["4/1/11", "5/1/12"]), ["4/1/11"]);
        assert!(left(&["3/1/10"], &["3/2/10", "4/1/11"]).is_empty());
        assert!(left(&["prepared/700"], &["prepared/701", "3/1/10"]).is_empty());
    }

    #[test]
    fn one_that_may_have_been_prepared_is_looked_for_among_the_prepared() {
        assert_eq!(left(&["3/1/10"], &["prepared/700", "5/1/12"]), ["prepared/700"]);
        assert_eq!(
            left(&["3/1/10", "prepared/600"], &["3/1/10", "prepared/600", "prepared/700"]),
            ["3/1/10", "prepared/600"]
        );
        // Later ones are not brought in by those that were brought in.
        assert!(left(&["prepared/700"], &["prepared/800"]).is_empty());
    }
}
