//! One delivery: the body, the signature over exactly its bytes, the POST.

use std::sync::Arc;
use std::time::Duration;

use lethe_db::callbacks::ClaimedCallback;
use lethe_delivery::Delivery;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::opendsr::answer::CallbackBody;
use lethe_process::fault;
use lethe_signing::signature;
use lethe_signing::signing_keys::SigningError;

use crate::options::Ready;

/// A first answer that took longer leaves no time for a second try within the lease.
const TIME_LEFT_FOR_ANOTHER: Duration = Duration::from_secs(20);

/// Sends a callback once and says what came of it.
pub(crate) async fn deliver(ready: &Ready, claimed: &ClaimedCallback) -> DeliveryAttempt {
    let body = body(ready, claimed);
    let mut attempt = match sign(ready, claimed, &body).await {
        Ok(signature) => {
            fault::point("courier.before_send");
            let attempt = ready.client.deliver(&delivery(ready, claimed, &body, signature)).await;
            fault::point("courier.after_answer");
            attempt
        }
        Err(error) => {
            tracing::error!(%error, callback = %claimed.callback_id, "a callback cannot be signed");
            DeliveryAttempt::not_sent("signing")
        }
    };
    // A receiver may still keep the certificate of the previous key (contract 6): one try more, within the attempt.
    if matches!(attempt.status_code, Some(400 | 401 | 403))
        && attempt.duration < TIME_LEFT_FOR_ANOTHER
        && let Some(Ok(signature)) = sign_with_previous(ready, claimed, &body).await
    {
        metrics::counter!("lethe_callbacks_with_previous_key_total").increment(1);
        let again = ready.client.deliver(&delivery(ready, claimed, &body, signature)).await;
        attempt = answered_last(attempt, again);
    }
    let class = attempt.error_class.unwrap_or("delivered");
    if let Some(reason) = &attempt.reason {
        tracing::info!(callback = %claimed.callback_id, endpoint = %claimed.endpoint_id, class, reason, "a delivery failed");
    }
    metrics::counter!("lethe_callback_attempts_total", "class" => class).increment(1);
    metrics::histogram!("lethe_callback_seconds").record(attempt.duration.as_secs_f64());
    attempt
}

/// Two tries of one attempt: the later answer counts, the earlier one if the later try got none; the time is that of both.
fn answered_last(first: DeliveryAttempt, second: DeliveryAttempt) -> DeliveryAttempt {
    let duration = first.duration + second.duration;
    DeliveryAttempt { duration, ..if second.status_code.is_some() { second } else { first } }
}

/// The same bytes on every attempt.
fn body(ready: &Ready, claimed: &ClaimedCallback) -> Vec<u8> {
    let result = claimed.result.as_ref();
    let body = CallbackBody {
        controller_id: &claimed.controller_id,
        expected_completion_time: claimed.expected_completion_time,
        status_callback_url: &claimed.url,
        subject_request_id: claimed.subject_request_id,
        group_id: claimed.group_id.as_deref(),
        request_status: claimed.status,
        api_version: claimed.api_version,
        results_url: result.map(|result| ready.links.url(claimed.api_version, result)),
        results_count: result.map(|result| result.lines),
        extensions: None,
    };
    body.to_bytes()
}

async fn sign(ready: &Ready, claimed: &ClaimedCallback, body: &[u8]) -> Result<String, SigningError> {
    let (signer, algorithm, bytes) = (Arc::clone(&ready.processor.signer), claimed.algorithm, body.to_vec());
    signature::off_thread(move || signer.sign(algorithm, &bytes)).await
}

async fn sign_with_previous(
    ready: &Ready,
    claimed: &ClaimedCallback,
    body: &[u8],
) -> Option<Result<String, SigningError>> {
    let (signer, algorithm, bytes) = (Arc::clone(&ready.processor.signer), claimed.algorithm, body.to_vec());
    signature::off_thread(move || signer.sign_with_previous(algorithm, &bytes).transpose()).await.transpose()
}

fn delivery(ready: &Ready, claimed: &ClaimedCallback, body: &[u8], signature: String) -> Delivery {
    let version = claimed.api_version;
    let mut headers = vec![
        (version.domain_header(), ready.processor.domain.clone()),
        (version.signature_header(), signature),
        ("X-Lethe-Callback-Id", claimed.callback_id.to_string()),
        ("X-Lethe-Attempt", claimed.attempt.to_string()),
    ];
    if claimed.replay {
        headers.push(("X-Lethe-Replay", "true".to_owned()));
    }
    Delivery { url: claimed.url.clone(), body: body.to_vec(), headers }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status_code: Option<u16>, error_class: Option<&'static str>, seconds: u64) -> DeliveryAttempt {
        let duration = Duration::from_secs(seconds);
        DeliveryAttempt { duration, status_code, error_class, ..DeliveryAttempt::not_sent("network") }
    }

    #[test]
    fn a_second_try_counts_if_it_is_answered_and_takes_its_time_anyway() {
        let refused = || answer(Some(401), Some("client_error"), 3);
        let accepted = answered_last(refused(), answer(Some(204), None, 2));
        assert_eq!((accepted.status_code, accepted.error_class), (Some(204), None));
        assert_eq!(accepted.duration, Duration::from_secs(5));
        let silent = answered_last(refused(), answer(None, Some("timeout"), 30));
        assert_eq!((silent.status_code, silent.error_class), (Some(401), Some("client_error")));
        assert_eq!(silent.duration, Duration::from_secs(33));
    }
}
