//! Invented people of several controllers. Everything personal about them carries [`CANARY`], which must never turn up
//! outside the places that hold personal data.

use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};

/// A part of every personal value, callback path and group id of a run.
pub const CANARY: &str = "pii7q2x";

/// The controllers. The last one has the troubles that must not reach the others.
pub const CONTROLLERS: [&str; 3] = ["acme", "globex", "initech"];

/// A data subject at one controller.
#[derive(Clone, Debug)]
pub struct Person {
    /// An index into [`CONTROLLERS`].
    pub controller: usize,
    /// The profile.
    pub mpid: i64,
    /// Shared by the two people of a household, and with a namesake at another controller.
    pub email: String,
    /// Nobody else's.
    pub customer: String,
    /// Nobody else's.
    pub device: String,
    /// Event batches imported before anything begins.
    pub batches: u32,
    /// Households come whole or not at all.
    pub household: usize,
}

impl Person {
    /// The line that is imported.
    pub fn profile(&self) -> String {
        json!({
            "mpid": self.mpid,
            "identities": {"email": self.email, "controller_customer_id": self.customer, "android_advertising_id": self.device},
            "attributes": {"city": format!("{CANARY}-town"), "plan": "plus"},
            "audiences": [{"id": 7, "name": format!("{CANARY}-audience")}],
        })
        .to_string()
    }

    /// The lines that are imported, and that a result file must hold byte by byte.
    pub fn event_batches(&self) -> Vec<String> {
        let line = |n| json!({"mpid": self.mpid, "n": n, "note": format!("{CANARY} \\ \"quoted\" ünïcode {n}")});
        (0..self.batches).map(|n| line(n).to_string()).collect()
    }

    /// Rows in the three tables.
    pub fn rows(&self) -> (i64, i64, i64) {
        (1, 3, i64::from(self.batches))
    }

    /// An identity by its type.
    pub fn identity(&self, kind: &str) -> Value {
        match kind {
            "email" => json!(self.email),
            "controller_customer_id" => json!(self.customer),
            _ => json!(self.device),
        }
    }
}

/// `households` households at each controller: every fourth of two people, the others of one.
pub fn generate(households: usize, random: &mut StdRng) -> Vec<Person> {
    let mut people = Vec::new();
    for household in 0..households * CONTROLLERS.len() {
        let controller = household % CONTROLLERS.len();
        // Namesakes: the same address at each of the controllers.
        let email = format!("Home{}.{CANARY}@Example.com", household / CONTROLLERS.len());
        let members = if random.random_bool(0.25) { 2 } else { 1 };
        for member in 0..members {
            people.push(Person {
                controller,
                mpid: random.random::<i64>(),
                email: email.clone(),
                customer: format!("{CANARY}-customer-{household}-{member}"),
                device: uuid::Builder::from_random_bytes(random.random()).into_uuid().to_string(),
                batches: random.random_range(0..6),
                household,
            });
        }
    }
    // A few people with much data, so that work can be struck in the middle of it.
    for person in people.iter_mut().step_by(97) {
        person.batches = 1_500;
    }
    people
}
