//! One delivery: the body, the signature over exactly its bytes, the POST.

use std::sync::Arc;

use lethe::callback::client::Delivery;
use lethe::callback::signature::SigningError;
use lethe::db::callbacks::{Attempt, ClaimedCallback};
use lethe::fault;
use lethe::opendsr::answer::CallbackBody;

use crate::options::Ready;

/// Sends a callback once and says what came of it.
pub(crate) async fn deliver(ready: &Ready, claimed: &ClaimedCallback) -> Attempt {
    let attempt = match sign(ready, claimed).await {
        Ok(delivery) => {
            fault::point("courier.before_send");
            let attempt = ready.client.deliver(&delivery).await;
            fault::point("courier.after_answer");
            attempt
        }
        Err(error) => {
            tracing::error!(%error, callback = %claimed.callback_id, "a callback was not signed");
            Attempt::not_sent("signing")
        }
    };
    let class = attempt.error_class.unwrap_or("delivered");
    metrics::counter!("lethe_callback_attempts_total", "class" => class).increment(1);
    metrics::histogram!("lethe_callback_seconds").record(attempt.duration.as_secs_f64());
    attempt
}

async fn sign(ready: &Ready, claimed: &ClaimedCallback) -> Result<Delivery, SigningError> {
    let request = &claimed.request;
    let result = claimed.result.as_ref();
    let body = CallbackBody {
        controller_id: &claimed.controller_id,
        expected_completion_time: claimed.expected_completion_time,
        status_callback_url: &claimed.url,
        subject_request_id: request.subject_request_id,
        group_id: request.group_id.as_deref(),
        request_status: claimed.status,
        api_version: request.api_version,
        results_url: result.map(|(id, salt, _)| ready.links.url(request.api_version, *id, salt)),
        results_count: result.map(|(_, _, lines)| *lines),
        extensions: None,
    };
    let body = body.to_bytes();
    let (signer, algorithm, bytes) = (Arc::clone(&ready.signer), claimed.algorithm, body.clone());
    let signature = tokio::task::spawn_blocking(move || signer.sign(algorithm, &bytes)).await;
    let signature = signature.map_err(|_| SigningError::Failed)??;
    Ok(Delivery {
        url: claimed.url.clone(),
        body,
        headers: vec![
            (request.api_version.domain_header(), ready.domain.clone()),
            (request.api_version.signature_header(), signature),
            ("X-Lethe-Callback-Id", claimed.callback_id.to_string()),
            ("X-Lethe-Attempt", claimed.attempt.to_string()),
        ],
    })
}
