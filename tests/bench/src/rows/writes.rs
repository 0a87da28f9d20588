//! What one request writes: WAL without page images, rows, and what is kept of it, from its publication until the last of three
//! callbacks is delivered and the trail is sealed. The requests match nobody, so that no subject data is in the figures.
//!
//! WAL is that of the whole server during the run, by `pg_walinspect`; where that extension cannot be had, the figure is left
//! out. What is kept is measured after a VACUUM FULL, before the purge of personal data.

use lethe_testing::worker::{SECONDS, queue_workers};

use super::intake::{PEOPLE, people};
use crate::bench::Bench;
use crate::broker::Link;
use crate::receiver::Receivers;
use crate::report::Report;
use crate::requests;

const TUPLES: &str = "
    SELECT ARRAY[sum(n_tup_ins), sum(n_tup_upd), sum(n_tup_hot_upd), sum(n_tup_del)]::bigint[]
      FROM pg_stat_all_tables WHERE schemaname = 'lethe'";
const SIZE: &str = "
    SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c
     WHERE c.relnamespace = 'lethe'::regnamespace AND c.relkind = 'r'";
const COMPACT: &str = "
    VACUUM (FULL) lethe.requests, lethe.request_details, lethe.callbacks, lethe.callback_attempts, lethe.slice_receipts,
                  lethe.audit_entries, lethe.audit_seals, lethe.audit_unsealed, lethe.slices, lethe.batches, lethe.endpoints";

pub(crate) async fn facts(bench: &Bench, report: &mut Report) {
    people(bench, PEOPLE, bench.sizes.profiles).await;
    bench.clean().await;
    bench.world.run(COMPACT).await;
    let size = bench.count(SIZE).await;
    let receivers = Receivers::start(bench.sizes.endpoints).await;
    let count = bench.sizes.chained_requests;
    let made = requests::erasures_from(bench.sizes.profiles, count, &receivers.urls);
    let link = Link::connect(bench).await;
    let workers = bench.workers(&queue_workers(), SECONDS).await;
    bench.is_led().await;
    bench.is_sealed().await;
    bench.settle().await;
    let tuples: Vec<i64> = bench.world.one(TUPLES, &[]).await;
    let lsn: String = bench.world.one("SELECT pg_current_wal_lsn()::text", &[]).await;
    let delivered = receivers.expect(3 * count);
    link.publish(&[PEOPLE.to_owned()], "dsr.requests", None, &made).await;
    delivered.await;
    bench.reaches("SELECT count(*) FROM (SELECT FROM lethe.callbacks WHERE state <> 'delivered' LIMIT 1) one", 0).await;
    bench.is_sealed().await;
    let wal = wal_since(bench, &lsn).await;
    for worker in workers {
        worker.stop().await;
    }
    // Statistics of a session are told when it ends.
    let after: Vec<i64> = bench.world.one(TUPLES, &[]).await;
    let each = |number: i64| number as f64 / count as f64;
    let written: Vec<f64> = after.iter().zip(&tuples).map(|(after, before)| each(after - before)).collect();
    if let Some(bytes) = wal {
        report.fact("WAL of a request, without page images", format!("{:.0} bytes", each(bytes)), "4,000 bytes");
    }
    let rows = format!(
        "{:.1} inserts, {:.1} updates ({:.1} in place), {:.1} deletes",
        written[0], written[1], written[2], written[3]
    );
    report.fact("rows that a request writes", rows, "2 inserts, 2 updates");
    bench.world.run(COMPACT).await;
    report.fact(
        "kept of a request, before the purge",
        format!("{:.0} bytes", each(bench.count(SIZE).await - size)),
        "1,700 bytes after it",
    );
}

async fn wal_since(bench: &Bench, lsn: &str) -> Option<i64> {
    let session = bench.world.db.session().await.unwrap();
    session.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect").await.ok()?;
    let sql = "SELECT sum(record_size)::bigint FROM pg_get_wal_stats($1::text::pg_lsn, pg_current_wal_flush_lsn())";
    session.query_one(sql, &[&lsn]).await.ok()?.get(0)
}
