//! Compilation: from the wake-up of one portability request until its encrypted zip is recorded. Megabytes are those of
//! the event batches, unpacked.
//!
//! The raw program reads the same event batches with one binary COPY, deflates them into a zip of the same level with the
//! same library, encrypts with AES-256-GCM in chunks of the same size, and writes one file, synchronised once at its end:
//! four tasks with short channels between them. It keeps no lease, reads no profile, and reads everything by one
//! statement, where Lethe reads pages that can be resumed.

use std::io::{self, Write};

use bytes::Bytes;
use futures_util::TryStreamExt;
use lethe_broker::topology::ACCESS_COMPILATION;
use lethe_results::cipher::Encryptor;
use lethe_testing::Worker;
use tokio::sync::mpsc;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::bench::{Bench, DAILY};
use crate::broker::Link;
use crate::meter::Run;
use crate::people::{People, fill};
use crate::report::Row;

/// Bytes of an event batch, about.
const BATCH: u64 = 2_000;
/// The level of Lethe's own zips.
const LEVEL: i64 = 2;
const CONTROLLER: &str = "compiled";

pub(crate) async fn row(bench: &Bench) -> Row {
    let mut row = Row::new("compile", "MB/s", 0.8);
    prepare(bench, CONTROLLER, bench.sizes.compiled_mb).await;
    for _ in 0..bench.sizes.runs {
        row.lethe.push(lethe(bench, CONTROLLER).await.0);
        row.raw.push(raw(bench, CONTROLLER).await);
    }
    row
}

/// A controller with one profile that has so many megabytes of event batches.
pub(crate) async fn prepare(bench: &Bench, id: &str, megabytes: u64) {
    let (controller, is_new) = bench.controller(id).await;
    if is_new {
        let people = People { profiles: 1, event_batches: megabytes * 1_000_000 / BATCH, bytes: BATCH };
        fill(bench, &controller, people).await;
    }
    bench.calendar(DAILY).await;
}

async fn megabytes(bench: &Bench, controller: &str) -> f64 {
    let sql = format!(
        "SELECT sum(octet_length(body::text) + 1)::bigint FROM subject_data.event_batches WHERE controller_id = '{controller}'"
    );
    bench.count(&sql).await as f64 / 1e6
}

/// Lethe's side; and the most memory that the compiler had.
pub(crate) async fn lethe(bench: &Bench, controller: &str) -> (Run, Option<u64>) {
    bench.clean().await;
    bench
        .world
        .run(&format!(
            "WITH batch AS (
                 INSERT INTO lethe.batches (lane, tick_at, runs_at, calendar_version, state)
                 SELECT 'access', now(), now(), max(version), 'released' FROM lethe.calendars RETURNING batch_id),
             slice AS (
                 INSERT INTO lethe.slices (batch_id, controller_id, stage, request_count, mpid_count,
                                           first_request, last_request)
                 SELECT batch_id, '{controller}', 'compilation', 1, 1, 0, 0 FROM batch RETURNING slice_id, batch_id),
             request AS (
                 INSERT INTO lethe.requests (controller_id, subject_request_id, api_version, regulation, request_type, status,
                                             lane, batch_id, slice_id, content_digest, submitted_time, received_at,
                                             expected_completion_time, details_week)
                 SELECT '{controller}', gen_random_uuid(), '3.0', 'gdpr', 'portability', 'pending', 'access', batch_id,
                        slice_id, sha256('x'), now(), now(), now(), w.week
                   FROM slice, lethe.week_of(now()) w RETURNING request_key, details_week)
             INSERT INTO lethe.request_details (week, request_key, controller_id, sealed_request, at_receipt)
             SELECT details_week, request_key, '{controller}', 'x', '{{1}}' FROM request;
             UPDATE lethe.requests SET status = 'in_progress', in_progress_at = now();
             UPDATE lethe.slices SET first_request = (SELECT request_key FROM lethe.requests),
                                     last_request = (SELECT request_key FROM lethe.requests)"
        ))
        .await;
    let size = megabytes(bench, controller).await;
    bench.settle().await;
    let link = Link::connect(bench).await;
    let slice = bench.count("SELECT slice_id FROM lethe.slices").await;
    let workers = bench.workers(&["access-compiler"], &[]).await;
    let meter = bench.meter(&workers);
    link.wake(ACCESS_COMPILATION.name, "slice_id", &[slice]).await;
    bench.reaches("SELECT count(*) FROM lethe.requests WHERE status = 'completed'", 1).await;
    let run = meter.stop(size);
    let memory = crate::servers::peak_memory(workers[0].id());
    for worker in workers {
        Worker::stop(worker).await;
    }
    (run, memory)
}

/// The raw side.
async fn raw(bench: &Bench, controller: &str) -> Run {
    bench.clean().await;
    let size = megabytes(bench, controller).await;
    let file = bench.world.folder.join("results").join("raw");
    let meter = bench.raw_meter();
    let (batches, unpacked) = mpsc::channel::<Vec<Bytes>>(4);
    let (packed, unencrypted) = mpsc::channel::<Bytes>(16);
    let (encrypted, unwritten) = mpsc::channel::<Bytes>(16);
    let packing = tokio::task::spawn_blocking(move || pack(unpacked, packed));
    let encrypting = tokio::task::spawn_blocking(move || encrypt(unencrypted, &encrypted));
    let writing = tokio::task::spawn_blocking(move || write(&file, unwritten));
    copy_out(bench, controller, batches).await;
    packing.await.unwrap().unwrap();
    encrypting.await.unwrap().unwrap();
    writing.await.unwrap().unwrap();
    meter.stop(size)
}

/// Rows of one column, as binary COPY sends them: after a header, for each row the number of columns and the length.
async fn copy_out(bench: &Bench, controller: &str, batches: mpsc::Sender<Vec<Bytes>>) {
    let session = bench.raw_db.session().await.unwrap();
    session.batch_execute("SET statement_timeout = 0").await.unwrap();
    let sql = format!(
        "COPY (SELECT body FROM subject_data.event_batches WHERE controller_id = '{controller}' AND mpid = 1 ORDER BY id) TO STDOUT (FORMAT binary)"
    );
    let rows = session.raw().copy_out(sql.as_str()).await.unwrap();
    futures_util::pin_mut!(rows);
    let (mut bundle, mut size, mut is_first) = (Vec::new(), 0, true);
    while let Some(mut message) = rows.try_next().await.unwrap() {
        if std::mem::take(&mut is_first) {
            let _ = message.split_to(19);
        }
        // The server sends one message for each row; the last one holds the end alone.
        if message.len() > 6 {
            let line = message.slice(6..);
            size += line.len();
            bundle.push(line);
        }
        if size > 128 * 1024 {
            size = 0;
            batches.send(std::mem::take(&mut bundle)).await.unwrap();
        }
    }
    batches.send(bundle).await.unwrap();
    session.batch_execute("RESET statement_timeout").await.unwrap();
}

/// Hands bytes on in pieces.
struct Outlet {
    sender: mpsc::Sender<Bytes>,
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sender.blocking_send(Bytes::copy_from_slice(bytes)).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn pack(mut unpacked: mpsc::Receiver<Vec<Bytes>>, packed: mpsc::Sender<Bytes>) -> io::Result<()> {
    let outlet = io::BufWriter::with_capacity(64 * 1024, Outlet { sender: packed });
    let mut zip = ZipWriter::new_stream(outlet);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .compression_level(Some(LEVEL))
        .large_file(true);
    zip.start_file("events-00001.jsonl", options)?;
    while let Some(bundle) = unpacked.blocking_recv() {
        for line in bundle {
            zip.write_all(&line)?;
            zip.write_all(b"\n")?;
        }
    }
    zip.finish()?.into_inner().flush()
}

fn encrypt(mut unencrypted: mpsc::Receiver<Bytes>, encrypted: &mpsc::Sender<Bytes>) -> io::Result<()> {
    let mut encryptor = Encryptor::new(&[7; 32], |bytes| encrypted.blocking_send(bytes).map_err(io::Error::other))?;
    while let Some(bytes) = unencrypted.blocking_recv() {
        encryptor.write_all(&bytes)?;
    }
    encryptor.finish().map(drop)
}

fn write(path: &std::path::Path, mut unwritten: mpsc::Receiver<Bytes>) -> io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    while let Some(bytes) = unwritten.blocking_recv() {
        file.write_all(&bytes)?;
    }
    file.sync_all()
}
