//! Connections: TLS, clients that take up room, and a stop that lets downloads end (contract 1 and 9).

use std::process::Output;

use lethe_testing::gateway::Raw;
use lethe_testing::signing::SigningPair;
use lethe_testing::wait::{eventually, patiently, seconds};
use lethe_testing::worker::{bare, environment};
use lethe_testing::{Gateway, Request, SECONDS, Worker, World, seconds_with};
use reqwest::{Certificate, Client};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;

/// What a client that trusts only this certificate is answered.
async fn trusting(pair: &SigningPair, address: &str) -> Option<u16> {
    let root = Certificate::from_der(&pair.der).unwrap();
    let client = Client::builder().no_proxy().tls_certs_only([root]).build().unwrap();
    let port = address.rsplit(':').next().unwrap();
    let answer =
        client.get(format!("https://localhost:{port}/v3/discovery")).timeout(patiently(seconds(5))).send().await;
    answer.ok().map(|answer| answer.status().as_u16())
}

#[tokio::test]
async fn certificates_are_read_again_and_broken_ones_are_not_used() {
    let world = World::new().await;
    let algorithm = lethe_domain::signature_algorithm::SignatureAlgorithm::EcdsaP256;
    let [served, second, third] =
        ["served", "second", "third"].map(|name| SigningPair::write(&world.folder, name, algorithm, 2090));
    let (key, certificate) = (served.key.display().to_string(), served.certificate.display().to_string());
    let settings = [("LETHE_TLS_KEY_FILE", key.as_str()), ("LETHE_TLS_CERT_FILE", certificate.as_str())];
    let gateway = Gateway::start(&world, &settings).await;
    assert_eq!(trusting(&served, &gateway.address).await, Some(200));
    assert_eq!(trusting(&second, &gateway.address).await, None);
    let plain = gateway.call(reqwest::Method::GET, "/v3/discovery").send().await;
    assert!(plain.is_err(), "nothing is said in the clear");
    // In two steps, as certificates are renewed: between them the files do not go together.
    std::fs::copy(&second.certificate, &served.certificate).unwrap();
    eventually("it is noticed", seconds(15), async || gateway.worker.log().contains("the old one stays")).await;
    assert_eq!(trusting(&served, &gateway.address).await, Some(200), "the old one stays");
    std::fs::copy(&second.key, &served.key).unwrap();
    eventually("the new one is served", seconds(15), async || trusting(&second, &gateway.address).await == Some(200))
        .await;
    assert_eq!(trusting(&served, &gateway.address).await, None);
    std::fs::write(&served.certificate, "no certificate").unwrap();
    eventually("it is noticed", seconds(15), async || gateway.worker.log().matches("the old one stays").count() == 2)
        .await;
    assert_eq!(trusting(&second, &gateway.address).await, Some(200));
    std::fs::copy(&third.key, &served.key).unwrap();
    std::fs::copy(&third.certificate, &served.certificate).unwrap();
    eventually("what is whole again is served", seconds(15), async || {
        trusting(&third, &gateway.address).await == Some(200)
    })
    .await;
    gateway.worker.stop().await;
}

async fn run(arguments: &[&str], settings: &[(&str, String)]) -> Output {
    let mut command = bare("gateway");
    command.args(arguments).envs(settings.iter().map(|(name, value)| (name, value)));
    tokio::time::timeout(patiently(seconds(10)), command.output()).await.expect("it ends").unwrap()
}

#[tokio::test]
async fn bad_configuration_is_said_before_anything_connects() {
    let world = World::new().await;
    let help = run(&["--help"], &[]).await;
    let text = String::from_utf8(help.stdout).unwrap();
    assert_eq!(help.status.code(), Some(0));
    for expected in
        ["[env: LETHE_HTTP_LISTEN=", "127.0.0.1:8080", "LETHE_TLS_CERT_FILE", "LETHE_HTTP_TIMEOUT", "Exit codes"]
    {
        let expected = expected.trim_end_matches('=');
        assert!(text.contains(expected), "--help lacks {expected}: {text}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut good = environment(&world);
    for (name, value) in &mut good {
        if matches!(*name, "DATABASE_URL") {
            *value = "postgres://nobody@127.0.0.1:1/none".to_owned();
        }
    }
    let cases = [
        ("LETHE_HTTP_LISTEN", taken.local_addr().unwrap().to_string(), "LETHE_HTTP_LISTEN"),
        ("LETHE_HTTP_LISTEN", "localhost".to_owned(), "LETHE_HTTP_LISTEN"),
        ("LETHE_TLS_CERT_FILE", world.files.certificate.display().to_string(), "LETHE_TLS"),
        ("LETHE_HTTP_TIMEOUT", "0s".to_owned(), "LETHE_HTTP_TIMEOUT"),
        ("LETHE_HTTP_CONNECTIONS", "0".to_owned(), "LETHE_HTTP_CONNECTIONS"),
        ("LETHE_RATE_PER_CONTROLLER", "0".to_owned(), "LETHE_RATE_PER_CONTROLLER"),
        ("LETHE_TRUSTED_PROXIES", "everybody".to_owned(), "LETHE_TRUSTED_PROXIES"),
        ("LETHE_SIGNING_SWITCH_AT", "2026-01-01T00:00:00Z".to_owned(), "LETHE_SIGNING_PREVIOUS_KEY_FILE"),
    ];
    for (variable, value, expected) in cases {
        let mut settings: Vec<_> = good.iter().filter(|(name, _)| *name != variable).cloned().collect();
        settings.push((variable, value.clone()));
        let ended = run(&[], &settings).await;
        let text = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(64), "{variable}={value}: {text}");
        assert!(text.contains(expected), "{variable}={value}: {text}");
    }
}

#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out_for_long() {
    let world = World::new().await;
    world.controller("acme").await;
    let settings = [("LETHE_HTTP_CONNECTIONS", "4"), ("LETHE_HTTP_TIMEOUT", "500ms")];
    let gateway = Gateway::start(&world, &settings).await;
    let mut idle = Vec::new();
    for _ in 0..40 {
        idle.push(gateway.connect().await);
    }
    // Forty before us, four at a time: a place comes free, be it that we have to connect once more.
    eventually("a call is answered", seconds(15), async || {
        let answer = gateway.call(reqwest::Method::GET, "/v3/discovery").send().await;
        answer.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    for mut raw in idle {
        assert_eq!(raw.rest().await, b"", "each is closed");
    }
}

/// A result that is larger than what lies between a server and a client that does not read: 32 MiB.
async fn large(world: &World, gateway: &Gateway) -> (String, usize) {
    let acme = world.controller("acme").await;
    world.profile(&acme, 1, &[("email", "ada@example.com")]).await;
    world
        .run(
            "INSERT INTO subject_data.event_batches (controller_id, mpid, body)
              SELECT 'acme', 1, json_build_object('mpid', 1, 'x', repeat('x', 65536)) FROM generate_series(1, 512)",
        )
        .await;
    let _compiler = Worker::start(world, "access-compiler", SECONDS).await;
    let caller = gateway.caller(world, "acme");
    let request = Request::access("ada@example.com");
    caller.request(&request).await;
    let path = caller.result_path(&request.id).await;
    let size = lethe_testing::results::record(world, &request.id).await.get::<_, i64>("size_bytes");
    (path, usize::try_from(size).unwrap())
}

/// Begins a download and reads no further than the first bytes; the kernel takes little more.
async fn begin(gateway: &Gateway, path: &str) -> Raw {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    let mut raw = Raw(socket.connect(gateway.address.parse().unwrap()).await.unwrap());
    raw.say(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
    raw.0.peek(&mut [0; 16]).await.unwrap();
    raw
}

/// Takes what comes; returns how much of the body it was.
async fn finish(raw: &mut Raw) -> usize {
    let mut bytes = Vec::new();
    // The end may be a reset.
    let _ = raw.0.read_to_end(&mut bytes).await;
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    bytes.len() - head
}

#[tokio::test]
async fn a_stop_lets_a_download_end_and_takes_no_new_call() {
    let world = World::new().await;
    let (_scheduler, mut gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let (path, size) = large(&world, &gateway).await;
    let mut download = begin(&gateway, &path).await;
    let idle = gateway.connect().await;
    gateway.worker.signal("TERM").await;
    eventually("it stops", seconds(10), async || gateway.worker.log().contains("stopping")).await;
    eventually("it takes no new connection", seconds(10), async || {
        tokio::net::TcpStream::connect(&gateway.address).await.is_err()
    })
    .await;
    assert!(gateway.worker.is_running());
    assert_eq!(finish(&mut download).await, size, "whole");
    drop(idle);
    assert_eq!(gateway.worker.exit(seconds(10)).await.code(), Some(0));
}

#[tokio::test]
async fn a_download_that_outlasts_the_drain_is_cut_off() {
    let world = World::new().await;
    let settings = seconds_with(&[("LETHE_DRAIN_TIMEOUT", "2s")]);
    let (_scheduler, mut gateway) = Gateway::with_scheduler(&world, &settings).await;
    let (path, size) = large(&world, &gateway).await;
    let mut download = begin(&gateway, &path).await;
    gateway.worker.signal("TERM").await;
    assert_eq!(gateway.worker.exit(seconds(10)).await.code(), Some(0), "{}", gateway.worker.log());
    assert!(finish(&mut download).await < size);
}

#[tokio::test]
async fn a_client_that_takes_nothing_loses_its_place_to_others() {
    let world = World::new().await;
    let settings = seconds_with(&[("LETHE_HTTP_TIMEOUT", "1500ms"), ("LETHE_HTTP_DOWNLOADS", "1")]);
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, &settings).await;
    let (path, size) = large(&world, &gateway).await;
    let mut stalled = begin(&gateway, &path).await;
    let busy = gateway.get(&path).await;
    assert_eq!((busy.status, busy.reason()), (503, "unavailable".to_owned()));
    assert!(busy.header("retry-after").parse::<u32>().unwrap() > 0);
    eventually("the place is free", seconds(15), async || gateway.get(&path).await.status == 200).await;
    assert!(finish(&mut stalled).await < size, "it was cut off");
}
