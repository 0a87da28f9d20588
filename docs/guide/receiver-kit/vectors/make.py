"""Makes the test vectors afresh, with new keys that are thrown away. Needs `cryptography` 42 or later.

    python3 make.py

Every certificate of a valid case holds for a hundred years, so that the vectors do not rot.
"""

import base64
import datetime
import json
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

HERE = Path(__file__).parent
DOMAIN = "privacy.processor.example"
SHA256 = hashes.SHA256()
LONG = (datetime.datetime(2026, 1, 1), datetime.datetime(2126, 1, 1))
PAST = (datetime.datetime(2020, 1, 1), datetime.datetime(2021, 1, 1))


def callback(**fields):
    """A body exactly as Lethe sends it: compact, all fields, in this order."""
    body = {
        "controller_id": "acme",
        "expected_completion_time": "2026-12-09T12:30:00Z",
        "status_callback_url": "https://controller.example.com/dsr/callbacks",
        "subject_request_id": "3f0c7d52-8a41-4e6b-9d27-5b1e0c94a7f1",
        "group_id": None,
        "request_status": "completed",
        "api_version": "3.0",
        "results_url": None,
        "results_count": None,
        "extensions": None,
    }
    return json.dumps(body | fields, separators=(",", ":"), ensure_ascii=False).encode()


def new_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def name(common_name):
    attributes = [x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Processor (test vectors)")]
    if common_name:
        attributes.append(x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name))
    return x509.Name(attributes)


def certify(key, cn=None, san=(), issuer=None, ca=False, period=LONG):
    """A certificate for `key`; `issuer` is a certificate and its key, itself if there is none."""
    parent, parent_key = issuer or (None, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(cn))
        .issuer_name(parent.subject if parent else name(cn))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(period[0])
        .not_valid_after(period[1])
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in san]), critical=False)
    return builder.sign(parent_key, SHA256)


def main():
    for folder in ("bodies", "certificates", "headers"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()

    def pem(file, *chain):
        (HERE / "certificates" / file).write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in chain))

    key, stranger, root_key, middle_key, ec_key = *(new_key() for _ in range(4)), ec.generate_private_key(ec.SECP256R1())
    root = certify(root_key, "Test Root", ca=True)
    middle = certify(middle_key, "Test Issuing Authority", issuer=(root, root_key), ca=True)
    leaf = certify(key, DOMAIN, [DOMAIN], issuer=(middle, middle_key))
    own = certify(key, DOMAIN, [DOMAIN])
    no_authority = certify(middle_key, "other.example", ["other.example"], issuer=(root, root_key))
    pem("root.pem", root)
    pem("chain.pem", leaf, middle)
    pem("chain-without-issuer.pem", leaf)
    pem("chain-of-strangers.pem", leaf, certify(stranger, "Test Issuing Authority", ca=True))
    pem("chain-no-authority.pem", certify(key, DOMAIN, [DOMAIN], issuer=(no_authority, middle_key)), no_authority)
    pem("self-signed.pem", own)
    pem("san-only.pem", certify(key, None, ["www.processor.example", DOMAIN]))
    pem("cn-only.pem", certify(key, DOMAIN))
    pem("wildcard.pem", certify(key, None, ["*.processor.example"]))
    pem("other-key.pem", certify(stranger, DOMAIN, [DOMAIN]))
    pem("expired.pem", certify(key, DOMAIN, [DOMAIN], period=PAST))
    pem("other-domain.pem", certify(key, "privacy.other.example", ["privacy.other.example"]))
    pem("ec.pem", certify(ec_key, DOMAIN, [DOMAIN]))
    (HERE / "certificates" / "unreadable.pem").write_text("<html>502 Bad Gateway</html>\n")

    v3 = callback()
    v1 = callback(
        request_status="in_progress",
        api_version="1.0",
        group_id="Grüße – Köln, 東京",
        results_url=f"https://{DOMAIN}/v1/results/c2FtcGxlLXRva2Vu",
        results_count=3,
    )
    bodies = {
        "v3.json": v3,
        "v1.json": v1,
        "tampered.json": v3.replace(b'"completed"', b'"cancelled"'),
        "reserialised.json": json.dumps(json.loads(v3)).encode(),
    }
    for file, body in bodies.items():
        (HERE / "bodies" / file).write_bytes(body)

    def headers(file, signature, prefix="X-OpenDSR", drop=None, lower=False):
        fields = {
            "Content-Type": "application/json",
            f"{prefix}-Processor-Domain": DOMAIN,
            f"{prefix}-Signature": signature if isinstance(signature, str) else base64.b64encode(signature).decode(),
            "X-Lethe-Callback-Id": "0e7e1c1c-5d0b-4a55-8f3a-6f2b9d1c7a44",
            "X-Lethe-Attempt": "1",
        }
        fields = {(one.lower() if lower else one): value for one, value in fields.items() if one != drop}
        (HERE / "headers" / file).write_text(json.dumps(fields, indent=2) + "\n")

    good = key.sign(v3, padding.PKCS1v15(), SHA256)
    headers("v3.json", good)
    headers("v3-lower-case.json", good, lower=True)
    headers("v1.json", key.sign(v1, padding.PKCS1v15(), SHA256), prefix="X-OpenGDPR")
    headers("without-signature.json", good, drop="X-OpenDSR-Signature")
    headers("without-domain.json", good, drop="X-OpenDSR-Processor-Domain")
    headers("not-base64.json", "*" + base64.b64encode(good).decode()[1:])
    headers("cut-off.json", good[:-1])
    headers("pss.json", key.sign(v3, padding.PSS(padding.MGF1(SHA256), SHA256.digest_size), SHA256))
    headers("ec.json", ec_key.sign(v3, ec.ECDSA(SHA256)))

    cases = []

    def case(title, reason=None, certificate="self-signed", headers="v3", body="v3", domain=DOMAIN, **options):
        files = {"certificate": f"certificates/{certificate}.pem", "domain": domain}
        files |= {"headers": f"headers/{headers}.json", "body": f"bodies/{body}.json"}
        cases.append({"name": title, "reason": reason} | files | options)

    trust = {"roots": "certificates/root.pem"}
    case("valid")
    case("valid, v1 headers", headers="v1", body="v1")
    case("valid, header names in lower case", headers="v3-lower-case")
    case("valid, domain in capitals", domain=DOMAIN.upper())
    case("valid, name in SAN only", certificate="san-only")
    case("valid, name in CN only", certificate="cn-only")
    case("valid, wildcard", certificate="wildcard")
    case("valid, chain to a trusted root", certificate="chain", **trust)
    case("valid, chain without a given root", certificate="chain")
    case("valid, certificate that had not expired then", certificate="expired", at="2020-06-01T00:00:00Z")
    case("tampered body", "signature does not match", body="tampered")
    case("body parsed and written again", "signature does not match", body="reserialised")
    case("certificate of another key", "signature does not match", certificate="other-key")
    case("signature cut off", "signature does not match", headers="cut-off")
    case("PSS signature", "signature does not match", headers="pss")
    case("EC certificate and signature", "certificate key is not RSA", certificate="ec", headers="ec")
    case("expired certificate", "certificate expired or not yet valid", certificate="expired")
    case("certificate not yet valid", "certificate expired or not yet valid", at="2025-12-31T23:59:59Z")
    case("certificate for another domain", "certificate names another domain", certificate="other-domain")
    case("untrusted domain in the header", "processor domain not trusted", domain="privacy.other.example")
    case("trusted domain is a suffix", "processor domain not trusted", domain="processor.example")
    case("no signature header", "signature header missing", headers="without-signature")
    case("no domain header", "processor domain header missing", headers="without-domain")
    case("signature not base64", "signature is not base64", headers="not-base64")
    case("no certificate", "certificate cannot be read", certificate="unreadable")
    case("self-signed, not a trusted root", "certificate chain not trusted", **trust)
    case("issuer left out", "certificate chain not trusted", certificate="chain-without-issuer", **trust)
    case("issuer's name, another key", "certificate chain not trusted", certificate="chain-of-strangers")
    case("issuer is no authority", "certificate chain not trusted", certificate="chain-no-authority", **trust)
    (HERE / "cases.json").write_text(json.dumps(cases, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
