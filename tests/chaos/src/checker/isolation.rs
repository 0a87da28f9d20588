//! Guarantee 5: what is wrong on purpose holds up nobody else. Looked at before it is mended.

use crate::plan::{Hurdle, Plan};
use crate::world::World;

use super::{Listed, Violation};

/// While the hurdles stand: the request whose store fails is not said to be done, and nothing came of what is dead.
/// `lost`: PostgreSQL has lost commits, and may know nothing of them; whether it should is judged elsewhere.
pub async fn hurdles_hold(world: &World, plan: &Plan, lost: bool) -> Vec<Violation> {
    let listed: Vec<Listed> = world.list(&["request", "list"]).await;
    let mut violations = Vec::new();
    for case in plan.cases.iter().filter(|case| case.hurdle == Some(Hurdle::FailingStore)) {
        let listed = listed.iter().find(|listed| listed.subject_request_id == case.id);
        let status = listed.map_or("", |listed| listed.status.as_str());
        if status != "in_progress" && !(lost && status.is_empty()) {
            violations.push(Violation::of(2, format!("{}, whose store fails, is {status}", case.id)));
        }
    }
    violations
}
