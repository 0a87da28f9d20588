//! Proof of erasure: signed, verified offline, and no byte of it can change.

use std::sync::Arc;

use lethe_audit::certificate::{self, Document, NoCertificate, Refused, Statement};
use lethe_audit::{Signatory, Trust};
use lethe_db::requests::Target;
use lethe_domain::signature_algorithm::SignatureAlgorithm;
use lethe_signing::Processor;
use lethe_signing::signature::Signer;
use lethe_signing::signing_keys::SigningKeys;
use lethe_testing::cli::{lethe, write};
use lethe_testing::gateway::Gateway;
use lethe_testing::signing::DOMAIN;
use lethe_testing::wait::{eventually_some, seconds};
use lethe_testing::worker::bare;
use lethe_testing::{Publisher, Request, SECONDS, Worker, World};

fn signatory(world: &World) -> Arc<Signatory> {
    let keys = SigningKeys::load(&world.files.key, &world.files.certificate).unwrap();
    let processor = Processor {
        domain: DOMAIN.to_owned(),
        public_url: format!("http://{DOMAIN}:8080").parse().unwrap(),
        signer: Arc::new(Signer::new(keys)),
    };
    Arc::new(Signatory::new(processor, &[]).unwrap())
}

fn target(id: &str) -> Target {
    ("acme".parse().unwrap(), id.parse().unwrap())
}

/// The certificate of an erasure, once its completion is sealed.
async fn certificate_of(world: &World, id: &str) -> String {
    let signatory = signatory(world);
    eventually_some("there is a certificate", seconds(20), async || {
        certificate::issue(&world.db, &signatory, &target(id)).await.unwrap().ok()
    })
    .await
}

#[tokio::test]
async fn a_completed_erasure_is_certified_and_every_flipped_byte_is_noticed() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 3).await;
    world.person(&acme, 2, "ada@example.com", 0).await;
    let _fleet =
        Worker::several(&world, &["scheduler", "identity-matcher", "erasure-executor", "access-compiler"], SECONDS)
            .await;
    let publisher = Publisher::connect(&world).await;
    let (erasure, access) = (Request::erasure("ada@example.com"), Request::access("eve@example.com"));
    let neighbour = Request::erasure("eve@example.com");
    // In one group, for one tick: they share a slice.
    let _ = tokio::join!(publisher.request("acme", &erasure), publisher.request("acme", &neighbour));
    publisher.request("acme", &access).await;
    for request in [&erasure, &neighbour, &access] {
        world.reaches(&request.id, "completed").await;
    }
    let file = certificate_of(&world, &erasure.id).await;
    assert!(!file.contains("ada@example.com"));
    let again = certificate_of(&world, &erasure.id).await;
    assert_eq!(file, again, "the same facts make the same certificate");

    let trust = Trust::read([&world.files.certificate]).unwrap();
    let verified = certificate::verify(file.as_bytes(), Some(&trust)).unwrap();
    let statement: &Statement = &verified.statement;
    assert_eq!(
        (statement.subject_request_id.as_str(), statement.controller_id.as_str()),
        (erasure.id.as_str(), "acme")
    );
    assert_eq!((statement.execution.profiles, statement.stores.len()), (2, 1));
    let store = &statement.stores[0];
    assert_eq!((store.store.as_str(), store.rows_deleted, store.rows_remaining), ("postgres", 7, 0));
    assert!(store.as_of <= store.verified_at && store.verified_at <= statement.execution.completed_at);
    let digest: Vec<u8> = world
        .one(
            "SELECT digest FROM lethe.audit_seals WHERE chain = 'acme' AND position = $1",
            &[&statement.audit.position],
        )
        .await;
    assert_eq!(statement.audit.digest, ::lethe_domain::crypto::hex(&digest));

    // The other erasure of the same slice is not told.
    assert_eq!((statement.audit.inclusion.size, statement.audit.inclusion.path.len()), (2, 1), "{statement:?}");
    assert!(!file.contains(&neighbour.id));
    no_lie_fits_the_trail(&world, &file);

    // Every byte flipped in two ways (the second turns letters into their other case), and every byte missing.
    let bytes = file.as_bytes();
    for index in 0..bytes.len() {
        for bits in [0x01, 0x20] {
            let mut changed = bytes.to_vec();
            changed[index] ^= bits;
            assert!(certificate::verify(&changed, None).is_err(), "byte {index} ^ {bits} of {file}");
        }
        let shorter = [&bytes[..index], &bytes[index + 1..]].concat();
        assert!(certificate::verify(&shorter, None).is_err(), "without byte {index}");
    }
    assert!(certificate::verify(&[bytes, b" "].concat(), None).is_err());
    assert!(certificate::verify(b"{}", None).is_err());

    // Another processor's signature proves nothing to whoever trusts ours.
    let other = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let stranger = rcgen::CertificateParams::new([DOMAIN.to_owned()]).unwrap().self_signed(&other).unwrap().pem();
    let path = write(&world, "stranger.pem", stranger);
    let trust = Trust::read([&path.into()]).unwrap();
    assert!(certificate::verify(bytes, Some(&trust)).is_err());

    for (id, why) in
        [(access.id.as_str(), NoCertificate::NoErasure), (&Request::erasure("x").id, NoCertificate::Unknown)]
    {
        let none = certificate::issue(&world.db, &signatory(&world), &target(id)).await.unwrap();
        assert_eq!(none, Err(why));
    }
}

/// The processor itself cannot certify what its trail does not say.
fn no_lie_fits_the_trail(world: &World, file: &str) {
    let document: Document = serde_json::from_str(file).unwrap();
    let signed = |change: fn(&mut Statement)| {
        let mut statement: Statement = serde_json::from_str(&document.payload).unwrap();
        change(&mut statement);
        let payload = serde_json::to_string(&statement).unwrap();
        let signer = &signatory(world).processor.signer;
        let signature = signer.sign(SignatureAlgorithm::RsaPkcs1v15, payload.as_bytes()).unwrap();
        certificate::verify(Document { payload, signature, ..document.clone() }.write().as_bytes(), None).map(drop)
    };
    assert_eq!(signed(|_| ()), Ok(()));
    let other_line: [fn(&mut Statement); 14] = [
        |one| one.subject_request_id = uuid::Uuid::nil().to_string(),
        |one| one.controller_id = String::from("zeta"),
        |one| one.request.content_digest = "00".repeat(32),
        |one| one.request.subject_request_type = String::from("access"),
        |one| one.request.regulation = Some("ccpa".to_owned()),
        |one| one.request.api_version = String::from("1.0"),
        |one| one.request.submitted_time = jiff::Timestamp::UNIX_EPOCH,
        |one| one.execution.lane = String::from("expedited"),
        |one| one.execution.batch_id = None,
        |one| one.execution.began_at = None,
        |one| one.execution.completed_at = jiff::Timestamp::UNIX_EPOCH,
        |one| one.execution.profiles += 1,
        |one| one.stores[0].rows_deleted += 1,
        |one| one.stores.clear(),
    ];
    for (number, lie) in other_line.into_iter().enumerate() {
        assert_eq!(signed(lie), Err(Refused::OtherLine), "{number}");
    }
    let not_included: [fn(&mut Statement); 9] = [
        |one| one.audit.digest = "00".repeat(32),
        |one| one.audit.position += 1,
        |one| one.audit.entry.previous = "00".repeat(32),
        |one| one.audit.entry.entry_id += 1,
        |one| one.audit.entry.event = String::from("requests.cancelled"),
        |one| one.audit.inclusion.line = one.audit.inclusion.line.replace("erasure", "access"),
        |one| one.audit.inclusion.index ^= 1,
        |one| one.audit.inclusion.size += 1,
        |one| one.audit.inclusion.path.clear(),
    ];
    for (number, lie) in not_included.into_iter().enumerate() {
        assert_eq!(signed(lie), Err(Refused::NotIncluded), "{number}");
    }
}

#[tokio::test]
async fn an_operator_prints_it_and_anybody_verifies_it_offline() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.person(&acme, 1, "ada@example.com", 1).await;
    let _scheduler = Worker::start(&world, "scheduler", SECONDS).await;
    let _matcher = Worker::start(&world, "identity-matcher", SECONDS).await;
    let publisher = Publisher::connect(&world).await;
    let erasure = Request::erasure("ada@example.com");
    publisher.request("acme", &erasure).await;
    let early = lethe(&world, &["request", "certificate", &erasure.id, "--controller", "acme"]).await;
    assert_eq!(early.code, Some(1));
    assert!(early.err.contains("once it is completed"), "{}", early.err);
    let _executor = Worker::start(&world, "erasure-executor", SECONDS).await;
    world.reaches(&erasure.id, "completed").await;
    certificate_of(&world, &erasure.id).await;
    let printed = lethe(&world, &["request", "certificate", &erasure.id, "--controller", "acme"]).await;
    assert_eq!(printed.code, Some(0), "{}", printed.err);
    let file = write(&world, "certificate.json", &printed.out);
    // No database, no broker, no keys.
    let verify = async |file: &str| {
        let output = bare("lethe").args(["certificate", "verify", file]).output().await.unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, shown) = verify(&file).await;
    assert!(code == Some(0) && shown.contains(&erasure.id) && shown.contains("3 rows deleted"), "{shown}");
    let forged = write(&world, "forged.json", printed.out.replace("rows_deleted\\\":3", "rows_deleted\\\":9"));
    assert_eq!(verify(&forged).await.0, Some(1));
}

#[tokio::test]
async fn the_gateway_gives_a_controller_the_certificates_of_its_own_erasures() {
    let world = World::new().await;
    let acme = world.controller("acme").await;
    world.controller("other").await;
    world.person(&acme, 1, "ada@example.com", 3).await;
    let (_scheduler, gateway) = Gateway::with_scheduler(&world, SECONDS).await;
    let caller = gateway.caller(&world, "acme");
    let (erasure, access) = (Request::erasure("ada@example.com"), Request::access("eve@example.com"));
    caller.request(&erasure).await;
    caller.request(&access).await;
    let path = |id: &str| format!("/v3/requests/{id}/certificate");
    let early = caller.get(&path(&erasure.id)).await;
    assert_eq!((early.status, early.is_signed(), early.reason().as_str()), (409, true, "conflict"));
    let _workers = Worker::several(&world, &["erasure-executor"], SECONDS).await;
    let given = eventually_some("there is a certificate", seconds(20), async || {
        Some(caller.get(&path(&erasure.id)).await).filter(|answer| answer.status == 200)
    })
    .await;
    assert!(given.is_signed());
    assert_eq!(given.text(), certificate_of(&world, &erasure.id).await);
    let trust = Trust::read([&world.files.certificate]).unwrap();
    let verified = certificate::verify(given.text().as_bytes(), Some(&trust)).unwrap();
    assert_eq!(verified.statement.subject_request_id, erasure.id);
    assert_eq!(caller.get(&format!("/v1/opengdpr_requests/{}/certificate/", erasure.id)).await.text(), given.text());
    assert_eq!(caller.get(&path(&access.id)).await.status, 404, "an access is no erasure");
    assert_eq!(caller.get(&path("x")).await.status, 400);
    assert_eq!(gateway.caller(&world, "other").get(&path(&erasure.id)).await.status, 404);
    assert_eq!(gateway.get(&path(&erasure.id)).await.status, 401);
}
