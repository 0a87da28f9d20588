//! Wake-ups that are doubled, of long ago, for nothing, or in another order.

use lethe_broker::{Broker, Outgoing, Publisher};
use reqwest::Method;
use serde_json::json;

use super::Driver;
use super::broker::WORK;

/// A wake-up that says nothing.
pub const NO_WAKE_UP: &str = "\u{0}no wake-up";

impl Driver {
    pub(super) async fn stray_wake_ups(&self) {
        let ids = |sql: &'static str| async move {
            let rows = self.world.attempt(sql, &[]).await.unwrap_or_default();
            rows.iter().map(|row| row.get(0)).collect::<Vec<i64>>()
        };
        let mut messages = Vec::new();
        let mut add = |queue: &str, body: String| messages.push(Outgoing::to_queue(queue, body.into_bytes()));
        for id in ids("SELECT slice_id FROM lethe.slices ORDER BY random() LIMIT 20").await {
            // To both stages: only one of them is the right one.
            for queue in &WORK[..2] {
                add(queue, json!({"slice_id": id}).to_string());
                add(queue, json!({"slice_id": id}).to_string());
            }
        }
        for id in ids("SELECT endpoint_id FROM lethe.endpoints").await {
            add(WORK[2], json!({"endpoint_id": id}).to_string());
        }
        for queue in WORK {
            add(queue, json!({"slice_id": 999_999_999, "endpoint_id": 999_999_999}).to_string());
            add(queue, NO_WAKE_UP.to_owned());
        }
        if let Ok(broker) = Broker::new(&self.world.tests.amqp_url, "chaos") {
            let _ = Publisher::new(broker).publish(&messages).await;
        }
    }

    /// The management API takes messages and puts them back.
    pub(super) async fn shuffle(&self) {
        let body = json!({"count": 20, "ackmode": "ack_requeue_true", "encoding": "auto"});
        for queue in WORK.iter().chain(&["dsr.identity-matching"]) {
            let path = format!("/queues/{}/{queue}/get", self.world.tests.name);
            let _ = self.world.tests.management.try_call(Method::POST, &path, Some(body.clone())).await;
        }
    }
}
