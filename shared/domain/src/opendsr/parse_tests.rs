use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::opendsr::{Identity, IdentityFormat, IdentityType};
use crate::request::Mpid;

const ID: &str = "a7551968-d5d6-44b2-9831-815ac9017798";

fn parser() -> Parser {
    Parser {
        extension_domains: vec!["opendsr.mparticle.com".to_owned(), "lethe.example".to_owned()],
        denied: DeniedValues::default(),
        addresses: AddressPolicy::default(),
    }
}

fn v2() -> Value {
    json!({
        "regulation": "gdpr", "subject_request_id": ID, "subject_request_type": "erasure",
        "submitted_time": "2026-11-22T09:00:00Z", "api_version": "2.0",
        "subject_identities": [{"identity_type": "email", "identity_value": "Ada@Example.com", "identity_format": "raw"}]
    })
}

fn v3() -> Value {
    json!({
        "regulation": "ccpa", "subject_request_id": ID, "subject_request_type": "access",
        "submitted_time": "2026-11-22T09:00:00Z", "api_version": "3.0",
        "subject_identities": {"email": {"value": "ada@example.com", "encoding": "raw"}}
    })
}

fn parse(value: &Value) -> Result<SubjectRequest, ApiError> {
    parser().request(value.to_string().as_bytes(), None)
}

fn with(mut value: Value, field: &str, to: Value) -> Value {
    value[field] = to;
    value
}

fn without(mut value: Value, field: &str) -> Value {
    value.as_object_mut().unwrap().remove(field);
    value
}

fn reasons(value: &Value) -> Vec<(String, &'static str)> {
    parse(value).unwrap_err().errors.into_iter().map(|error| (error.field, error.reason)).collect()
}

#[test]
fn the_version_is_told_by_api_version_or_by_shape() {
    assert_eq!(parse(&v2()).unwrap().api_version, ApiVersion::V2);
    assert_eq!(parse(&without(v3(), "api_version")).unwrap().api_version, ApiVersion::V3);
    assert_eq!(parse(&without(v2(), "api_version")).unwrap().api_version, ApiVersion::V2);
    let v1 = without(without(v2(), "api_version"), "regulation");
    let request = parse(&v1).unwrap();
    assert_eq!((request.api_version, request.regulation), (ApiVersion::V1, None));
    assert_eq!(reasons(&with(v2(), "api_version", json!("9.0"))), [("api_version".into(), "invalid")]);
}

#[test]
fn a_version_that_contradicts_the_path_is_refused() {
    let body = v2().to_string();
    let error = parser().request(body.as_bytes(), Some(ApiVersion::V1)).unwrap_err();
    assert_eq!((error.code, error.errors[0].reason), (400, "contradiction"));
    assert!(parser().request(body.as_bytes(), Some(ApiVersion::V2)).is_ok());
}

#[test]
fn each_missing_field_is_named() {
    for field in ["subject_request_id", "subject_request_type", "submitted_time", "regulation"] {
        assert_eq!(reasons(&without(v2(), field)), [(field.to_owned(), "required")]);
    }
    assert_eq!(reasons(&without(v2(), "subject_identities")), [("subject_identities".to_owned(), "required")]);
}

#[test]
fn what_real_clients_send_is_understood() {
    let mut body = v2();
    body["subject_request_id"] = json!(ID.to_uppercase());
    body["submitted_time"] = json!("2026-3-2");
    body["extensions"] = json!({"opendsr.mparticle.com": {
        "mpids": [9_007_199_254_740_993_i64, "-3718039598335680576"], "skip_waiting_period": "True",
        "identities": [{"identity_type": "other", "identity_value": 42}]}, "else.example": 7});
    let request = parse(&body).unwrap();
    assert_eq!(request.subject_request_id.to_string(), ID);
    assert_eq!(request.submitted_time.to_string(), "2026-03-02T00:00:00Z");
    assert_eq!(request.mpids, [Mpid(-3_718_039_598_335_680_576), Mpid(9_007_199_254_740_993)]);
    assert!(request.skip_waiting_period);
    assert_eq!(request.identities[0].value, "ada@example.com");
    assert_eq!(request.identities[1].value, "42");
}

#[test]
fn an_mpid_of_v3_stands_alone() {
    let ext = json!({"lethe.example": {"subject_identities": {"mpid": {"value": "123", "encoding": "raw"}}}});
    let alone = with(without(v3(), "subject_identities"), "extensions", ext.clone());
    assert_eq!(parse(&alone).unwrap().mpids, [Mpid(123)]);
    assert_eq!(reasons(&with(v3(), "extensions", ext)), [("extensions".to_owned(), "mpid_not_alone")]);
}

#[test]
fn unknown_types_and_people_who_are_nobody_are_refused_without_their_value() {
    let unknown = with(v3(), "subject_identities", json!({"ada@example.com": {"value": "secret"}}));
    let error = parse(&unknown).unwrap_err();
    assert_eq!(error.errors[0].reason, "identity_type");
    assert!(!format!("{error:?}").contains("ada@") && !format!("{error:?}").contains("secret"));
    let in_extension_only = with(v3(), "subject_identities", json!({"other": {"value": "x"}}));
    assert_eq!(reasons(&in_extension_only)[0].1, "identity_type");
    for nobody in ["", " ", "null", "00000000-0000-0000-0000-000000000000"] {
        let body = with(v3(), "subject_identities", json!({"ios_advertising_id": {"value": nobody}}));
        assert_eq!(reasons(&body)[0].1, "identity_value", "{nobody}");
    }
}

#[test]
fn unknown_types_are_answered_with_the_known_ones() {
    let standard = parse(&with(v3(), "subject_identities", json!({"shoe_size": {"value": "44"}}))).unwrap_err();
    assert!(standard.message.contains("controller_customer_id") && !standard.message.contains("mobile_number"));
    let extended = json!({"lethe.example": {"identities": [{"identity_type": "shoe_size", "identity_value": "44"}]}});
    let extended = parse(&with(v2(), "extensions", extended)).unwrap_err();
    assert!(extended.message.contains("mobile_number") && !extended.message.contains("44"), "{}", extended.message);
    let own = parse(&with(v3(), "subject_identities", json!({"customer_id": {"value": 7}}))).unwrap();
    assert_eq!(own.identities[0].identity_type, IdentityType::ControllerCustomerId);
}

#[test]
fn nothing_is_nothing_in_whatever_form() {
    let with_mpid = json!({"lethe.example": {"subject_identities": {"mpid": {"value": "123"}}}});
    let by_mpid = with(with(v3(), "subject_identities", json!([])), "extensions", with_mpid);
    assert_eq!(parse(&by_mpid).unwrap().mpids, [Mpid(123)]);
    for nothing in [json!(null), json!([])] {
        for base in [v2(), v3()] {
            let plain = parse(&base).unwrap();
            assert_eq!(parse(&with(base.clone(), "extensions", nothing.clone())).unwrap(), plain);
            let ours = json!({"lethe.example": nothing, "opendsr.mparticle.com": nothing});
            assert_eq!(parse(&with(base.clone(), "extensions", ours)).unwrap(), plain);
            let members = json!({"lethe.example": {"subject_identities": nothing, "identities": nothing, "mpids": nothing,
                "skip_waiting_period": null}});
            assert_eq!(parse(&with(base.clone(), "extensions", members)).unwrap(), plain);
        }
    }
    for something in [json!([1]), json!("x"), json!(false)] {
        assert_eq!(reasons(&with(v3(), "extensions", something.clone()))[0], ("extensions".to_owned(), "invalid"));
        let ours = json!({ "lethe.example": something });
        assert_eq!(reasons(&with(v3(), "extensions", ours))[0], ("extensions.lethe.example".to_owned(), "invalid"));
    }
}

#[test]
fn a_version_may_be_left_blank_and_an_error_names_the_right_one() {
    let under = |value: &Value, path| parser().request(value.to_string().as_bytes(), Some(path));
    let v1 = without(v2(), "regulation");
    for blank in [json!(null), json!(""), json!(" ")] {
        assert_eq!(
            under(&with(v3(), "api_version", blank.clone()), ApiVersion::V3).unwrap().api_version,
            ApiVersion::V3
        );
        assert_eq!(parse(&with(v2(), "api_version", blank.clone())).unwrap().api_version, ApiVersion::V2);
        assert_eq!(under(&with(v1.clone(), "api_version", blank), ApiVersion::V1).unwrap().api_version, ApiVersion::V1);
    }
    for draft in [json!("0.1"), json!(0.1)] {
        assert_eq!(
            under(&with(v1.clone(), "api_version", draft.clone()), ApiVersion::V1).unwrap().api_version,
            ApiVersion::V1
        );
        assert_eq!(under(&with(v3(), "api_version", draft), ApiVersion::V3).unwrap_err().code, 400);
    }
    let wrong = |path| under(&with(v1.clone(), "api_version", json!("9.0")), path).unwrap_err();
    assert!(!wrong(ApiVersion::V1).message.contains("2.0") && wrong(ApiVersion::V1).message.contains("1.0"));
    assert!(wrong(ApiVersion::V3).errors.iter().any(|error| error.message.contains("must be 3.0")));
    assert_eq!(parse(&with(v2(), "api_version", json!("9.0"))).unwrap_err().message, "api_version must be 2.0");
}

#[test]
fn submitted_times_that_occur() {
    let of = |text: &str| {
        parse(&with(v2(), "submitted_time", json!(text))).map(|request| request.submitted_time.to_string())
    };
    for (text, expected) in [
        ("2026-11-22T09:00:00", "2026-11-22T09:00:00Z"),
        ("2026-11-22 09:00:00.5", "2026-11-22T09:00:00.5Z"),
        ("2026-11-22T09:00", "2026-11-22T09:00:00Z"),
        ("2026-11-22 09:00:00+0100", "2026-11-22T08:00:00Z"),
        ("2026-11-22t09:00:00z", "2026-11-22T09:00:00Z"),
        ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("9999-12-30T00:00:00Z", "9999-12-30T00:00:00Z"),
    ] {
        assert_eq!(of(text).as_deref(), Ok(expected), "{text}");
    }
    for refused in [
        "-005000-06-01T00:00:00Z",
        "-009999-06-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+05:00",
        "0000-06-01",
        "9999-12-31T23:59:59.9999999Z",
        "2026-12-0",
        "2026-0-7",
        "2026-2-30",
        "2026-11-22T09:00:00+00:00Z",
        "2026-11-22T09:00:00.1234567891Z",
        "2026-11-22T24:00:00Z",
        "2026-11-22T24:00:00",
        "1795338000",
        "2026-11-22T09:00:00+25:00",
        "Sun, 22 Nov 2026 09:00:00 GMT",
        "11/22/2026",
        "2026-11-22T09:00:00[Nowhere/None]",
    ] {
        assert_eq!(of(refused).unwrap_err().errors[0].field, "submitted_time", "{refused}");
    }
}

#[test]
fn the_waiting_period_is_skipped_where_version_3_says_so() {
    assert!(parse(&with(v3(), "skip_waiting_period", json!("true"))).unwrap().skip_waiting_period);
    assert!(!parse(&with(v3(), "skip_waiting_period", json!(null))).unwrap().skip_waiting_period);
    assert_eq!(reasons(&with(v3(), "skip_waiting_period", json!(7))), [("skip_waiting_period".to_owned(), "invalid")]);
    assert!(
        !parse(&with(v2(), "skip_waiting_period", json!(true))).unwrap().skip_waiting_period,
        "v2 has the extension"
    );
}

#[test]
fn what_nobody_reads_decides_nothing() {
    let put = |body: &Value, field: &str, raw: &str| {
        let text = body.to_string().replacen('{', &format!("{{\"{field}\":{raw},"), 1);
        parser().request(text.as_bytes(), None)
    };
    let plain = parse(&v2()).unwrap();
    for odd in ["1e400", r#"{"else.example":{"score":-1e999}}"#, r#""cut \ud83d""#] {
        let field = if odd.starts_with('{') { "extensions" } else { "note" };
        assert_eq!(put(&v2(), field, odd).unwrap(), plain, "{odd}");
    }
    // In what is read they are refused.
    for (field, raw) in [
        ("group_id", "1e400"),
        ("group_id", r#""a\ud83d""#),
        ("status_callback_urls", r#"["https://example.com/\ud83d"]"#),
    ] {
        let error = put(&v2(), field, raw).unwrap_err();
        assert!(error.errors[0].field.starts_with(field), "{raw}: {error}");
    }
    let body = without(v2(), "subject_identities");
    let named = r#"[{"identity_type":"email","identity_value":"ada\ud83d@example.com"}]"#;
    assert_eq!(put(&body, "subject_identities", named).unwrap_err().errors[0].reason, "identity_value");
}

#[test]
fn a_byte_order_mark_changes_nothing() {
    let body = [b"\xef\xbb\xbf", v3().to_string().as_bytes()].concat();
    assert_eq!(parser().request(&body, None).unwrap(), parse(&v3()).unwrap());
}

#[test]
fn an_identity_without_a_format_is_raw() {
    for format in [json!(null), json!("raw")] {
        let identity =
            json!([{"identity_type": "email", "identity_value": "Ada@Example.com", "identity_format": format}]);
        assert_eq!(parse(&with(v2(), "subject_identities", identity)).unwrap(), parse(&v2()).unwrap());
    }
    let identity = json!([{"identity_type": "email", "identity_value": "Ada@Example.com"}]);
    assert_eq!(parse(&with(v2(), "subject_identities", identity)).unwrap(), parse(&v2()).unwrap());
}

#[test]
fn limits() {
    let many: Vec<_> =
        (0..5_001).map(|n| json!({"identity_type": "email", "identity_value": format!("{n}@example.com")})).collect();
    assert_eq!(parse(&with(v2(), "subject_identities", json!(many[..5_000]))).unwrap().identities.len(), 5_000);
    assert_eq!(parse(&with(v2(), "subject_identities", json!(many))).unwrap_err().code, 413);
    assert_eq!(parser().request(&vec![b' '; MAX_BODY + 1], None).unwrap_err().code, 413);
    assert_eq!(parse(&json!(vec![0; 400_000])).unwrap_err().code, 400);
    let urls: Vec<_> = (0..17).map(|n| format!("https://example.com/{n}")).collect();
    assert!(parse(&with(v2(), "status_callback_urls", json!(urls[..16]))).is_ok());
    assert_eq!(reasons(&with(v2(), "status_callback_urls", json!(urls)))[0].1, "invalid");
    assert!(parse(&with(v2(), "group_id", json!("g".repeat(256)))).is_ok());
    assert_eq!(reasons(&with(v2(), "group_id", json!("g".repeat(257))))[0].0, "group_id");
}

#[test]
fn callback_urls_obey_the_rules_of_callbacks() {
    for refused in ["http://example.com/x", "https://user@example.com/", "https://127.0.0.1/", "https://[::1]/", "/x"] {
        assert_eq!(reasons(&with(v2(), "status_callback_urls", json!([refused])))[0].1, "callback_url", "{refused}");
    }
}

fn identities() -> impl Strategy<Value = Vec<Identity>> {
    let one = (0..IdentityType::ALL.len(), 0..4_usize, "[a-z0-9]{3,20}").prop_map(|(kind, format, text)| {
        let (kind, format) = (IdentityType::ALL[kind], IdentityFormat::ALL[format]);
        Identity { identity_type: kind, format, value: format.encode(&format!("x{text}")) }
    });
    prop::collection::vec(one, 1..8)
}

fn requests() -> impl Strategy<Value = SubjectRequest> {
    let version = prop::sample::select(ApiVersion::ALL);
    let kind = prop::sample::select(RequestType::ALL);
    let regulation = prop::sample::select(Regulation::ALL);
    (
        version,
        kind,
        regulation,
        identities(),
        prop::collection::vec(any::<i64>(), 0..4),
        any::<bool>(),
        any::<bool>(),
        0_i64..4_000_000_000_000_000,
        "\\PC{0,40}",
    )
        .prop_map(|(version, kind, regulation, mut identities, mpids, mpid_instead, skip, micros, group)| {
            let mut mpids: Vec<_> = mpids.into_iter().map(Mpid).collect();
            if version == ApiVersion::V3 {
                // One identity of each type; an mpid excludes the others.
                identities.sort();
                identities.dedup_by_key(|identity| identity.identity_type);
                mpids.truncate(1);
                if mpid_instead && !mpids.is_empty() { identities.clear() } else { mpids.clear() }
            }
            identities.sort();
            identities.dedup();
            mpids.sort();
            mpids.dedup();
            SubjectRequest {
                api_version: version,
                regulation: (version != ApiVersion::V1).then_some(regulation),
                subject_request_id: SubjectRequestId::random(),
                subject_request_type: kind,
                submitted_time: Timestamp::from_microsecond(micros).unwrap(),
                identities,
                mpids,
                skip_waiting_period: skip,
                status_callback_urls: vec!["https://example.com/callback?x=1".to_owned()],
                group_id: Some(group),
            }
        })
}

proptest! {
    #[test]
    fn what_is_accepted_round_trips(request in requests()) {
        let wire = request.to_wire("lethe.example").to_string();
        prop_assert_eq!(&parser().request(wire.as_bytes(), Some(request.api_version)).unwrap(), &request);
        let sealed = serde_json::to_vec(&request).unwrap();
        prop_assert_eq!(serde_json::from_slice::<SubjectRequest>(&sealed).unwrap(), request);
    }

    #[test]
    fn no_input_panics(text in "\\PC{0,300}", field in 0..9_usize, depth in 0..4_u8) {
        let fields = ["regulation", "subject_request_id", "subject_request_type", "submitted_time", "api_version",
            "subject_identities", "extensions", "status_callback_urls", "group_id"];
        let mut odd = json!(text);
        for _ in 0..depth { odd = json!([{"identity_type": odd, "email": {"value": text}, "lethe.example": {"mpids": [1.5]}}]); }
        for base in [v2(), v3()] {
            let _ = parse(&with(base, fields[field], odd.clone()));
        }
        let _ = parser().request(text.as_bytes(), None);
    }
}
