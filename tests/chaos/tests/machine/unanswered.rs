//! Time without an answer, and what is given up for it (ADR 0030), on a clock that stands still unless it is told otherwise.

use std::time::Duration;

use lethe_db::callbacks::{self, ClaimedCallback, EndpointLimits, RecordedAttempts, RetryPolicy};
use lethe_db::give_up::{self, GivenUpBy, Step};
use lethe_domain::backoff::BackoffPolicy;
use lethe_domain::delivery_attempt::DeliveryAttempt;
use lethe_domain::request::{EndpointId, SubjectRequestId};

use super::bench::Bench;

const GIVE_UP: Duration = Duration::from_secs(1_000);
const BY_COURIER: GivenUpBy = GivenUpBy::Courier { after: GIVE_UP };
const PAUSE: i64 = 100;

fn policy() -> RetryPolicy {
    let step = Duration::from_secs(10);
    let backoff = BackoffPolicy::new(step, step).unwrap();
    RetryPolicy {
        backoff,
        give_up: GIVE_UP,
        breaker_threshold: 1_000,
        probe: backoff,
        longest_pause: Duration::from_secs(PAUSE.unsigned_abs()),
    }
}

/// A bench with one request, and the endpoint of its callback.
async fn bench() -> (Bench, EndpointId) {
    let bench = Bench::new(true).await;
    bench.submit(&[SubjectRequestId::random()]).await.unwrap();
    let endpoint = bench.world.one("SELECT endpoint_id FROM lethe.endpoints", &[]).await;
    (bench, endpoint)
}

async fn claim(bench: &Bench, endpoint: EndpointId) -> Vec<ClaimedCallback> {
    let limits = EndpointLimits { in_flight: 1, lease: Duration::from_mins(1) };
    let session = bench.world.db.session().await.unwrap();
    let claimed = callbacks::claim(&session, &bench.keys, limits, &[(endpoint, 1)]).await.unwrap();
    assert_eq!(claimed.len(), 1);
    claimed
}

/// One attempt of what is due, with this answer.
async fn attempt(bench: &Bench, endpoint: EndpointId, status_code: Option<u16>) -> RecordedAttempts {
    let claimed = claim(bench, endpoint).await;
    record(bench, claimed, status_code).await
}

async fn record(bench: &Bench, claimed: Vec<ClaimedCallback>, status_code: Option<u16>) -> RecordedAttempts {
    let attempt = DeliveryAttempt {
        duration: Duration::ZERO,
        status_code,
        error_class: Some(if status_code.is_some() { "status_5xx" } else { "connect" }),
        reason: None,
        endpoint_trouble: true,
        retry_after: None,
    };
    let group: Vec<_> = claimed.into_iter().map(|one| (one, attempt.clone())).collect();
    callbacks::record(&bench.world.db, &policy(), &group, || 0.0).await.unwrap()
}

async fn unanswered(bench: &Bench) -> i64 {
    bench.world.one("SELECT extract(epoch FROM unanswered_for)::bigint FROM lethe.endpoints", &[]).await
}

async fn step(bench: &Bench, endpoint: EndpointId) -> Option<Step> {
    let cutoff = give_up::cutoff(&bench.world.db, BY_COURIER).await.unwrap();
    give_up::step(&bench.world.db, endpoint, BY_COURIER, cutoff, false).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn time_without_an_answer_is_what_passes_between_attempts() {
    let (bench, endpoint) = bench().await;
    for (pause, status_code, expected) in [
        (0, None, 0),
        (60, None, 60),
        (90, None, 150),
        // Nobody has tried for a day: the couriers were stopped.
        (86_400, None, 150 + PAUSE),
        // Any answer begins anew.
        (60, Some(503), 0),
        (60, None, 0),
        (60, None, 60),
    ] {
        bench.advance(pause).await;
        let recorded = attempt(&bench, endpoint, status_code).await;
        assert_eq!(unanswered(&bench).await, expected, "after {pause} s and {status_code:?}");
        assert!(recorded.unanswered.is_empty());
    }
    let since =
        "SELECT unanswered_since = lethe.now() - interval '60 s' AND last_answer_at = lethe.now() - interval '120 s'
                   FROM lethe.endpoints";
    assert!(bench.world.one::<bool>(since, &[]).await);
    assert_eq!(step(&bench, endpoint).await, None, "it is not to be given up");
    let mut told = Vec::new();
    for _ in 0..10 {
        bench.advance(PAUSE).await;
        told = attempt(&bench, endpoint, None).await.unanswered;
    }
    assert_eq!(told, [endpoint]);
}

/// Some twelve hundred callbacks of which eleven hundred are old enough; one is under way, one was sent again by an operator.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_enough_is_exhausted_in_steps_and_the_rest_is_kept() {
    let (bench, endpoint) = bench().await;
    let world = &bench.world;
    world
        .run(
            "INSERT INTO lethe.callbacks (callback_id, request_key, url_no, sequence, endpoint_id, request_status,
                                          expected_completion_time, state, next_attempt_at, created_at)
             SELECT gen_random_uuid(), request_key, 1 + n / 2, n % 2, endpoint_id, 'pending', lethe.now(),
                    CASE n % 2 WHEN 0 THEN 'ready' ELSE 'waiting' END, lethe.now(),
                    lethe.now() + CASE WHEN n > 1098 THEN interval '900 s' ELSE '0' END
               FROM lethe.requests, lethe.endpoints, generate_series(0, 1198) AS n;
             UPDATE lethe.callbacks SET lease_token = gen_random_uuid(), lease_expires_at = lethe.now() + interval '1 day'
              WHERE url_no = 1 AND sequence = 0;
             UPDATE lethe.callbacks SET replays = 1, replayed_at = lethe.now() + interval '900 s'
              WHERE url_no = 2 AND sequence = 0;
             UPDATE lethe.endpoints SET unanswered_for = '1000 s'",
        )
        .await;
    bench.advance(1_000).await;
    let mut exhausted = Vec::new();
    while let Some(done) = step(&bench, endpoint).await
        && done.exhausted > 0
    {
        exhausted.push((done.exhausted, done.first));
    }
    let limit = usize::try_from(give_up::STEP).unwrap();
    assert!(exhausted.iter().all(|(callbacks, _)| *callbacks <= limit), "{exhausted:?}");
    assert!(exhausted[0].1 && exhausted[1..].iter().all(|(_, first)| !first), "{exhausted:?}");
    // 549 pairs are old, but for two that are held by their first one; and so are the first one of the next pair and the
    // callback of the request itself.
    let total: usize = exhausted.iter().map(|(callbacks, _)| callbacks).sum();
    assert_eq!(total, 2 * 547 + 2);
    let left = "SELECT count(*) FROM lethe.callbacks WHERE state = 'exhausted' AND created_at > lethe.now() - interval '1000 s'";
    assert_eq!(world.one::<i64>(left, &[]).await, 0);
    let reasons = "SELECT DISTINCT exhausted_because FROM lethe.callbacks WHERE state = 'exhausted'";
    assert_eq!(world.all::<Option<String>>(reasons, &[]).await, [Some("endpoint_given_up".to_owned())]);
    let kept: Vec<i16> = world
        .all(
            "SELECT url_no FROM lethe.callbacks WHERE state = 'ready' AND created_at <= lethe.now() - interval '1000 s'
              ORDER BY url_no",
            &[],
        )
        .await;
    assert_eq!(kept, [1, 2]);
    // It answers: nothing is given up any more, and that it was is forgotten.
    world.run("UPDATE lethe.callbacks SET state = 'delivered' WHERE state <> 'exhausted'").await;
    bench.submit(&[SubjectRequestId::random()]).await.unwrap();
    attempt(&bench, endpoint, Some(503)).await;
    assert_eq!(step(&bench, endpoint).await, None);
    assert!(world.one::<bool>("SELECT given_up_at IS NULL FROM lethe.endpoints", &[]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_on_a_callback_that_is_gone_is_not_recorded() {
    let (bench, endpoint) = bench().await;
    let claimed = claim(&bench, endpoint).await;
    // Lost by a failover while it was under way; or its records were removed.
    let lost = "BEGIN; SET LOCAL session_replication_role = replica; DELETE FROM lethe.callbacks; COMMIT";
    bench.world.run(lost).await;
    record(&bench, claimed, Some(503)).await;
    assert_eq!(bench.world.one::<i64>("SELECT count(*) FROM lethe.callback_attempts", &[]).await, 0);
}
