//! What is sent in a run and what must come of it: made from the seed, before anything starts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use aws_lc_rs::digest;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::people::{self, CANARY, CONTROLLERS, Person};
use crate::receiver::{Addresses, Mood};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Erasure after the waiting period.
    Erasure,
    /// Erasure at the next expedited tick.
    Expedited,
    /// A text file.
    Access,
    /// A zip.
    Portability,
}

impl Kind {
    /// Whether subject data goes.
    pub fn erases(self) -> bool {
        matches!(self, Self::Erasure | Self::Expedited)
    }
}

/// Something wrong on purpose, of the last controller, that must keep nobody else from anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurdle {
    /// The endpoint of its callbacks never answers.
    DeadEndpoint,
    /// The store fails for this profile.
    FailingStore,
}

/// A subject request.
#[derive(Clone, Debug)]
pub struct Case {
    /// `subject_request_id`.
    pub id: String,
    /// An index into [`CONTROLLERS`].
    pub controller: usize,
    /// What it asks for.
    pub kind: Kind,
    /// `1.0`, `2.0` or `3.0`.
    pub version: &'static str,
    /// The people whose profiles it matches, by index.
    pub matches: Vec<usize>,
    /// Its callback URLs.
    pub urls: Vec<String>,
    /// What is wrong about it.
    pub hurdle: Option<Hurdle>,
    /// A profile with this mpid and the same e-mail address appears once the request is answered.
    pub late_twin: Option<i64>,
    /// Some cancellation is sent for it.
    pub is_cancelled: bool,
    /// The database refuses it for itself; it can only end as a dead letter.
    pub is_poison: bool,
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetterKind {
    /// A request, or the same one again.
    Request,
    /// A request under the same id with other content.
    Conflict,
    /// A cancellation.
    Cancellation,
    /// Not a request; answered 400.
    Malformed,
}

/// A message of a controller.
#[derive(Clone, Debug)]
pub struct Letter {
    /// What it is.
    pub kind: LetterKind,
    /// Which case it belongs to, by index.
    pub case: usize,
    /// The body.
    pub body: Vec<u8>,
    /// When it is first sent, from the start of the traffic.
    pub due: Duration,
    /// Which connection sends it, or [`HTTP_SENDER`].
    pub sender: usize,
    /// Sent again until it is answered; otherwise only until it is confirmed.
    pub is_careful: bool,
}

/// All of a run.
#[derive(Debug)]
pub struct Plan {
    /// The data subjects.
    pub people: Vec<Person>,
    /// The subject requests.
    pub cases: Vec<Case>,
    /// The messages.
    pub letters: Vec<Letter>,
}

/// Connections that publish at the same time.
pub const SENDERS: usize = 4;
/// This sender calls the gateway.
pub const HTTP_SENDER: usize = SENDERS;

/// Makes the plan of a seed: `requests` requests within `span`, and beside them `poisoned` that the database refuses.
pub fn make(seed: u64, requests: usize, poisoned: usize, span: Duration, addresses: &Addresses) -> Plan {
    let mut random = StdRng::seed_from_u64(seed);
    let people = people::generate(requests.div_ceil(CONTROLLERS.len()) + 40, &mut random);
    let mut maker =
        Maker { index: index(&people), plan: Plan { people, cases: vec![], letters: vec![] }, random, span };
    let mut order: Vec<usize> = (0..maker.plan.people.len()).collect();
    order.shuffle(&mut maker.random);
    let mut roles: BTreeMap<usize, bool> = BTreeMap::new();
    for person in order {
        if maker.plan.cases.len() >= requests {
            break;
        }
        // A quarter are neighbours: nobody asks anything about them.
        if maker.random.random_bool(0.25) {
            continue;
        }
        let household = maker.plan.people[person].household;
        // What is compiled must stay as it is, so a household is erased from or compiled, never both.
        let erased = *roles.entry(household).or_insert_with(|| maker.random.random_bool(0.75));
        maker.request(person, erased, addresses);
    }
    maker.hurdles(addresses);
    maker.poison(poisoned);
    maker.plan
}

type Index = BTreeMap<(usize, String), Vec<usize>>;

fn index(people: &[Person]) -> Index {
    let mut index = Index::new();
    for (number, person) in people.iter().enumerate() {
        for value in [&person.email, &person.customer, &person.device] {
            index.entry((person.controller, value.clone())).or_default().push(number);
        }
    }
    index
}

struct Maker {
    index: Index,
    plan: Plan,
    random: StdRng,
    span: Duration,
}

impl Maker {
    fn id(&mut self) -> String {
        uuid::Builder::from_random_bytes(self.random.random())
            .with_version(uuid::Version::Random)
            .into_uuid()
            .to_string()
    }

    fn moment(&mut self, share: f64) -> Duration {
        self.span.mul_f64(self.random.random::<f64>() * share)
    }

    fn request(&mut self, person: usize, erased: bool, addresses: &Addresses) {
        let kind = match (erased, self.random.random_range(0..10)) {
            (true, 0..4) => Kind::Expedited,
            (true, _) => Kind::Erasure,
            (false, 0..5) => Kind::Access,
            (false, _) => Kind::Portability,
        };
        let version = *["1.0", "2.0", "3.0"].choose(&mut self.random).unwrap();
        let number = self.plan.cases.len();
        let urls = (0..self.random.random_range(0..3))
            .map(|url| {
                let mood = if self.random.random_bool(0.3) { Mood::Flaky } else { Mood::Steady };
                format!("{}/{CANARY}/{number}/{url}", addresses.of(mood))
            })
            .collect();
        let case = self.case(person, kind, version, urls, None);
        let identity = self.identity(person, version);
        self.add(case, identity.as_ref(), person);
    }

    fn case(
        &mut self,
        person: usize,
        kind: Kind,
        version: &'static str,
        urls: Vec<String>,
        hurdle: Option<Hurdle>,
    ) -> Case {
        let controller = self.plan.people[person].controller;
        let id = self.id();
        Case {
            id,
            controller,
            kind,
            version,
            matches: vec![person],
            urls,
            hurdle,
            late_twin: None,
            is_cancelled: false,
            is_poison: false,
        }
    }

    /// An identity of a person as sent: type, value, format.
    fn identity(&mut self, person: usize, version: &str) -> Option<(&'static str, String, &'static str)> {
        let kinds = [Some("email"), Some("controller_customer_id"), Some("android_advertising_id"), None];
        let kind = (*kinds.choose(&mut self.random).unwrap())?;
        let _ = version;
        let value = self.plan.people[person].identity(kind).as_str().unwrap().to_owned();
        let normal = if kind == "email" { value.to_ascii_lowercase() } else { value.clone() };
        Some(match self.random.random_range(0..3) {
            0 => (kind, hex(digest::digest(&digest::SHA256, normal.as_bytes()).as_ref()), "sha256"),
            1 => (kind, hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, normal.as_bytes()).as_ref()), "sha1"),
            _ => (kind, value, "raw"),
        })
    }

    fn add(&mut self, mut case: Case, identity: Option<&(&'static str, String, &'static str)>, person: usize) {
        if let Some((kind, ..)) = identity {
            let value = self.plan.people[person].identity(kind).as_str().unwrap().to_owned();
            case.matches.clone_from(&self.index[&(case.controller, value)]);
        }
        let group = self.random.random_bool(0.3).then(|| format!("{CANARY}-group-{}", self.plan.cases.len() % 9));
        let body = body(&case, identity, self.plan.people[person].mpid, group.as_deref(), "2026-11-20T10:00:00Z");
        let number = self.plan.cases.len();
        let due = self.moment(1.0);
        let sender = self.random.random_range(0..=HTTP_SENDER);
        // Over HTTP there is nothing but the answer.
        let is_careful = sender == HTTP_SENDER || self.random.random_bool(0.85);
        let letter = |kind, body: &Value, due, sender, is_careful| Letter {
            kind,
            case: number,
            body: body.to_string().into_bytes(),
            due,
            sender,
            is_careful,
        };
        let mut letters = vec![letter(LetterKind::Request, &body, due, sender, is_careful)];
        let cancellation = json!({"subject_request_id": case.id});
        match self.random.random_range(0..100) {
            // The same one at once by every connection, and over HTTP.
            0..8 => {
                letters.extend((0..=HTTP_SENDER).map(|sender| letter(LetterKind::Request, &body, due, sender, true)));
            }
            // Replayed later.
            8..16 => {
                letters.push(letter(LetterKind::Request, &body, due + self.moment(1.0), (sender + 1) % SENDERS, true));
            }
            16..20 => {
                let mut other = body.clone();
                other["submitted_time"] = json!("2026-11-20T10:00:01Z");
                letters.push(letter(
                    LetterKind::Conflict,
                    &other,
                    due + self.moment(0.3),
                    (sender + 1) % SENDERS,
                    true,
                ));
            }
            20..23 => {
                let mut half = body.to_string().into_bytes();
                half.truncate(half.len() / 2);
                let malformed = Letter { body: half, ..letter(LetterKind::Malformed, &body, due, sender, true) };
                letters.push(malformed);
            }
            // Overtakes its request.
            23..29 if case.kind.erases() => {
                let early = due.saturating_sub(Duration::from_millis(self.random.random_range(0..800)));
                letters.push(letter(LetterKind::Cancellation, &cancellation, early, (sender + 1) % SENDERS, true));
            }
            // Before, at, after: the release comes within seconds.
            29..52 => {
                let later = due + Duration::from_millis(self.random.random_range(0..9_000));
                let is_careful = self.random.random_bool(0.8);
                letters.push(letter(
                    LetterKind::Cancellation,
                    &cancellation,
                    later,
                    (sender + 1) % SENDERS,
                    is_careful,
                ));
                if self.random.random_bool(0.2) {
                    letters.push(letter(LetterKind::Cancellation, &cancellation, later, sender % SENDERS, true));
                }
            }
            52..60 if case.kind == Kind::Erasure && identity.is_some_and(|(kind, ..)| *kind == "email") => {
                case.late_twin = Some(self.random.random());
            }
            _ => {}
        }
        case.is_cancelled = letters.iter().any(|letter| letter.kind == LetterKind::Cancellation);
        self.plan.letters.extend(letters);
        self.plan.cases.push(case);
    }

    /// One person of the last controller whom nobody asks about, for each hurdle.
    fn hurdles(&mut self, addresses: &Addresses) {
        let asked: BTreeSet<usize> = self.plan.cases.iter().flat_map(|case| case.matches.clone()).collect();
        let taken: BTreeSet<usize> = asked.iter().map(|person| self.plan.people[*person].household).collect();
        let last = CONTROLLERS.len() - 1;
        let free: Vec<usize> = (0..self.plan.people.len())
            .filter(|number| {
                let person = &self.plan.people[*number];
                person.controller == last && !taken.contains(&person.household)
            })
            .collect();
        for (number, person) in free.into_iter().take(8).enumerate() {
            let (hurdle, url) = if number < 6 {
                (Hurdle::DeadEndpoint, format!("{}/{CANARY}/dead/{number}", addresses.of(Mood::Dead)))
            } else {
                (Hurdle::FailingStore, format!("{}/{CANARY}/failing/{number}", addresses.of(Mood::Steady)))
            };
            let case = self.case(person, Kind::Expedited, "3.0", vec![url], Some(hurdle));
            let body = body(&case, None, self.plan.people[person].mpid, None, "2026-11-20T10:00:00Z");
            let (due, case_number) = (self.moment(0.5), self.plan.cases.len());
            self.plan.letters.push(Letter {
                kind: LetterKind::Request,
                case: case_number,
                body: body.to_string().into_bytes(),
                due,
                sender: 0,
                is_careful: true,
            });
            self.plan.cases.push(case);
        }
    }

    /// Requests that the database refuses, whatever else stands in their group.
    fn poison(&mut self, number: usize) {
        for _ in 0..number {
            let mut case = self.case(0, Kind::Erasure, "3.0", vec![], None);
            (case.is_poison, case.matches) = (true, vec![]);
            let body = body(&case, None, 1, None, POISON_TIME);
            let (due, number) = (self.moment(0.8), self.plan.cases.len());
            let letter = Letter {
                kind: LetterKind::Request,
                case: number,
                body: body.to_string().into_bytes(),
                due,
                sender: 1,
                is_careful: false,
            };
            self.plan.letters.push(letter);
            self.plan.cases.push(case);
        }
    }
}

/// The world's database refuses requests that were submitted at this instant.
pub const POISON_TIME: &str = "1999-12-31T23:59:59Z";

fn hex(bytes: &[u8]) -> String {
    lethe_domain::crypto::hex(bytes)
}

/// The request as its version writes it. Without an identity it names the profile by its id.
fn body(
    case: &Case,
    identity: Option<&(&'static str, String, &'static str)>,
    mpid: i64,
    group: Option<&str>,
    submitted: &str,
) -> Value {
    let kind = match case.kind {
        Kind::Erasure | Kind::Expedited => "erasure",
        Kind::Access => "access",
        Kind::Portability => "portability",
    };
    let mut body = json!({
        "subject_request_id": case.id,
        "subject_request_type": kind,
        "submitted_time": submitted,
        "api_version": case.version,
        "status_callback_urls": case.urls,
    });
    if case.version != "1.0" {
        body["regulation"] = json!("gdpr");
    }
    if let Some(group) = group {
        body["group_id"] = json!(group);
    }
    let mut extension = json!({});
    if case.kind == Kind::Expedited {
        extension["skip_waiting_period"] = json!(true);
    }
    if case.version == "3.0" {
        body["subject_identities"] = match identity {
            Some((kind, value, format)) => json!({*kind: {"value": value, "encoding": format}}),
            None => json!({}),
        };
        if identity.is_none() {
            extension["subject_identities"] = json!({"mpid": {"value": mpid.to_string(), "encoding": "raw"}});
        }
    } else {
        body["subject_identities"] = match identity {
            Some((kind, value, format)) => {
                json!([{"identity_type": kind, "identity_value": value, "identity_format": format}])
            }
            None => json!([]),
        };
        if identity.is_none() {
            extension["mpids"] = json!([mpid]);
        }
    }
    if extension != json!({}) {
        body["extensions"] = json!({"opendsr.mparticle.com": extension});
    }
    body
}
