//! The requests of the benchmark: erasures of version 3 with three identities each.

use lethe_db::intake::{IntakeContext, Submission};
use lethe_domain::opendsr::{DeniedValues, Parser};
use lethe_domain::request::ControllerId;
use lethe_testing::Request;

use crate::bench::Bench;
use crate::people::{IDENTITIES, identity};

/// A request before it is sent.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    /// As sent.
    pub(crate) body: Vec<u8>,
}

/// Requests for `count` people out of `profiles`, far from each other; each reports to one of `urls`, in turn.
pub(crate) fn erasures(count: u64, profiles: u64, urls: &[String]) -> Vec<Made> {
    let people: Vec<u64> = (0..count).map(|index| person(index, profiles)).collect();
    made(&people, urls)
}

/// Requests for the `count` people whose numbers follow `profiles`: where there are so many profiles, for nobody.
pub(crate) fn erasures_from(profiles: u64, count: u64, urls: &[String]) -> Vec<Made> {
    made(&(1..=count).map(|number| profiles + number).collect::<Vec<_>>(), urls)
}

/// Requests for these profiles; each reports to one of `urls`, in turn.
pub(crate) fn of_people(mpids: &[i64], urls: &[String]) -> Vec<Made> {
    let people: Vec<u64> = mpids.iter().map(|mpid| mpid.unsigned_abs()).collect();
    made(&people, urls)
}

fn made(people: &[u64], urls: &[String]) -> Vec<Made> {
    let one = |(index, person): (usize, &u64)| {
        let mut request = Request::new("erasure");
        for (place, (kind, _, _)) in IDENTITIES.iter().enumerate() {
            request = request.identity(kind, &identity(place, *person));
        }
        if let Some(url) = urls.get(index % urls.len().max(1)) {
            request = request.callback(url);
        }
        Made { body: request.bytes() }
    };
    people.iter().enumerate().map(one).collect()
}

/// The number of the person of request `index`: each once, as long as there are as many, and neighbours far apart.
pub(crate) fn person(index: u64, profiles: u64) -> u64 {
    // A prime that divides no power of ten, so that all remainders come up.
    1 + (index * 7_919 + 13) % profiles
}

/// Records requests through the product's own intake, in this process: no broker, large groups.
pub(crate) async fn record(bench: &Bench, controller: &str, made: Vec<Made>) {
    let parser = Parser {
        extension_domains: Vec::new(),
        denied: DeniedValues::default(),
        addresses: "127.0.0.0/8,http".parse().unwrap(),
    };
    let context = IntakeContext::new(bench.world.keys(), 1_000);
    let controller_id: ControllerId = controller.parse().unwrap();
    let submissions: Vec<Submission> = made
        .iter()
        .map(|made| {
            let request = parser.request(&made.body, None).unwrap();
            let check = |url: &String| parser.addresses.check(url).unwrap();
            let origins = request.status_callback_urls.iter().map(check).collect();
            Submission { controller_id: controller_id.clone(), request, origins }
        })
        .collect();
    let groups: Vec<&[Submission]> = submissions.chunks(500).collect();
    let (odd, even) = groups.split_at(groups.len() / 2);
    let record = async |groups: &[&[Submission]]| {
        for group in groups {
            context.record(&bench.world.db, &group.iter().collect::<Vec<_>>()).await.unwrap();
        }
    };
    futures_util::join!(record(odd), record(even));
}
