//! Invented people: profiles and event batches, few with very many.

use std::collections::BTreeMap;

use lethe_domain::opendsr::DeniedValues;
use lethe_domain::request::ControllerId;
use lethe_stores::import::{self, EventBatchLine, ProfileLine};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::output::{progress, say};
use crate::world::World;

pub(crate) struct Person {
    pub(crate) controller_id: ControllerId,
    pub(crate) mpid: i64,
    pub(crate) email: String,
    pub(crate) customer_id: String,
    pub(crate) device_id: String,
    pub(crate) event_batches: u32,
}

pub(crate) struct People(pub(crate) Vec<Person>);

impl People {
    pub(crate) fn event_batches(&self) -> u64 {
        self.0.iter().map(|person| u64::from(person.event_batches)).sum()
    }
}

const GROUP: usize = 2_000;

/// Generates people and imports them for the two controllers in turn.
pub(crate) async fn generate(world: &World, profiles: u32, event_batches: u32, seed: u64) -> anyhow::Result<People> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut people: Vec<Person> = (0..profiles)
        .map(|number| Person {
            controller_id: world.controllers[number as usize % 2].clone(),
            // Real ids use all 64 bits, half of them negative.
            mpid: random.random::<i64>(),
            email: format!("Person.{number}@Example.com"),
            customer_id: format!("customer-{number}"),
            device_id: uuid::Builder::from_random_bytes(random.random()).into_uuid().to_string(),
            event_batches: 0,
        })
        .collect();
    for _ in 0..event_batches {
        // The cube of a uniform number: a tenth of the people have almost half of the data.
        let share: f64 = random.random::<f64>().powi(3);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index below the number of people"
        )]
        let index = (share * f64::from(profiles)) as usize;
        people[index.min(profiles as usize - 1)].event_batches += 1;
    }
    let bar = progress(u64::from(profiles) + u64::from(event_batches), "rows imported");
    for controller_id in &world.controllers {
        let theirs: Vec<&Person> = people.iter().filter(|person| person.controller_id == *controller_id).collect();
        for group in theirs.chunks(GROUP) {
            let lines: Result<Vec<_>, _> =
                group.iter().map(|person| ProfileLine::parse(&profile(person), &DeniedValues::default())).collect();
            import::profiles(&world.db, controller_id, &lines?).await?;
            bar.inc(group.len() as u64);
        }
        let mut lines = Vec::with_capacity(GROUP);
        for (person, number) in theirs.iter().flat_map(|person| (0..person.event_batches).map(move |n| (person, n))) {
            lines.push(EventBatchLine::parse(&event_batch(person, number))?);
            if lines.len() == GROUP {
                import::event_batches(&world.db, controller_id, &lines).await?;
                bar.inc(GROUP as u64);
                lines.clear();
            }
        }
        import::event_batches(&world.db, controller_id, &lines).await?;
    }
    bar.finish_and_clear();
    say(&format!("{profiles} profiles and {event_batches} event batches of two controllers imported"))?;
    Ok(People(people))
}

fn profile(person: &Person) -> String {
    let identities = BTreeMap::from([
        ("email", &person.email),
        ("controller_customer_id", &person.customer_id),
        ("android_advertising_id", &person.device_id),
    ]);
    json!({
        "mpid": person.mpid, "identities": identities,
        "attributes": {"city": "Example Town", "plan": "plus", "newsletter": true},
        "audiences": [{"id": 7, "name": "likely to return"}],
    })
    .to_string()
}

fn event_batch(person: &Person, number: u32) -> String {
    json!({
        "mpid": person.mpid.to_string(), "timestamp_unixtime_ms": 1_700_000_000_000_i64 + i64::from(number),
        "environment": "production", "user_identities": {"email": person.email},
        "events": [{"event_type": "custom_event", "data": {"event_name": "View \\ \"quoted\" ünïcode", "event_num": number}}],
    })
    .to_string()
}
