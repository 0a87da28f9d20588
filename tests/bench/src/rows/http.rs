//! HTTP: calls of one controller with 32 at once, against a gateway with a scheduler behind it, limits per second raised. The
//! caller shares the cores with the gateway and PostgreSQL.
//!
//! Each status call asks for another request, in the first round; the second round asks for the same ones in the same order,
//! so that whatever is remembered shows as that. A call for a group has 20 requests to list, and each submit is a new request.

use std::time::Instant;

use futures_util::{StreamExt, stream};
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_testing::Request;
use lethe_testing::gateway::{Caller, Gateway};

use super::intake::people;
use crate::bench::{Bench, DAILY};
use crate::report::Report;
use crate::requests;

const AT_ONCE: usize = 32;
/// Requests of a group.
const GROUP: usize = 20;

pub(crate) async fn facts(bench: &Bench, report: &mut Report) {
    for (id, algorithm, name) in [
        ("calls", SignatureAlgorithm::RsaPkcs1v15, "RSA-2048"),
        ("calls-ecdsa", SignatureAlgorithm::EcdsaP256, "ECDSA P-256"),
    ] {
        let known: Option<String> =
            bench.world.optional("SELECT controller_id FROM lethe.controllers WHERE controller_id = $1", &[&id]).await;
        if known.is_none() {
            bench.world.controller_with(id, |new| new.algorithm = algorithm).await;
        }
        people(bench, id, 100).await;
        bench.clean().await;
        let limits: Vec<(&str, &str)> = DAILY
            .iter()
            .copied()
            .chain([("LETHE_RATE_PER_CONTROLLER", "1000000"), ("LETHE_RATE_PER_ADDRESS", "1000000")])
            .collect();
        let mut workers = bench.workers(&["scheduler"], &limits).await;
        bench.is_led().await;
        let gateway = Gateway::start(&bench.world, &limits).await;
        let caller = gateway.caller(&bench.world, id);
        let count = usize::try_from(bench.sizes.calls).unwrap();
        let bodies: Vec<Vec<u8>> =
            requests::erasures(bench.sizes.calls, 1_000_000, &[]).into_iter().map(|made| made.body).collect();
        let rate = calls(&bodies, async |body: Vec<u8>| caller.post("/v3/requests", body).await.status).await;
        report.fact(format!("HTTP submit, {name}"), format!("{rate:.0} calls/s"), "–");
        let ids: Vec<String> =
            bench.world.all("SELECT subject_request_id::text FROM lethe.requests ORDER BY 1", &[]).await;
        assert_eq!(ids.len(), count, "all of them are there");
        bench.is_sealed().await;
        bench.settle().await;
        for round in ["first", "repeated"] {
            let rate = calls(&ids, async |id: String| caller.status(&id).await.status).await;
            report.fact(format!("HTTP status, {round}, {name}"), format!("{rate:.0} calls/s"), "–");
        }
        if algorithm == SignatureAlgorithm::RsaPkcs1v15 {
            groups(bench, report, &caller, count / GROUP).await;
        }
        workers.push(gateway.worker);
        for worker in workers {
            worker.stop().await;
        }
    }
}

async fn groups(bench: &Bench, report: &mut Report, caller: &Caller<'_>, count: usize) {
    let member = |index: usize| {
        let group = format!("group-{}", index / GROUP);
        Request::erasure(&format!("member-{index}@example.com")).group(&group).bytes()
    };
    let members: Vec<Vec<u8>> = (0..count * GROUP).map(member).collect();
    calls(&members, async |body: Vec<u8>| caller.post("/v3/requests", body).await.status).await;
    bench.settle().await;
    let paths: Vec<String> = (0..count).map(|group| format!("/v3/requests?group_id=group-{group}")).collect();
    let rate = calls(&paths, async |path: String| caller.get(&path).await.status).await;
    report.fact(format!("HTTP group status, {GROUP} requests each, RSA-2048"), format!("{rate:.0} calls/s"), "–");
}

/// Calls a second; each has to succeed.
async fn calls<T: Clone>(what: &[T], call: impl AsyncFn(T) -> u16) -> f64 {
    let started = Instant::now();
    let mut statuses = stream::iter(what.iter().cloned()).map(async |one| call(one).await).buffer_unordered(AT_ONCE);
    while let Some(status) = statuses.next().await {
        assert!((200..300).contains(&status), "answered {status}");
    }
    what.len() as f64 / started.elapsed().as_secs_f64()
}
