"""Verifies a callback of Lethe. Needs Python 3.9 or later and `cryptography` 42 or later.

    python3 verify.py CERT.pem TRUSTED_DOMAIN HEADERS.json BODY [--at TIME] [--roots ROOTS.pem]
"""

import argparse
import base64
import datetime
import json
import sys
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256


class Refused(Exception):
    """The callback must not be believed; the message says why."""


def verify(certificate, domain, headers, body, at=None, roots=None):
    """Returns if `body` (the raw bytes) was signed by `domain`, raises Refused if not.

    `certificate`: what is at https://<domain>/opendsr_cert.pem, the signing certificate first.
    `at`: the time to judge the certificate by, if not now. `roots`: PEM of the authorities to trust.
    """
    headers = {name.lower(): value for name, value in headers.items()}
    sender = headers.get("x-opendsr-processor-domain") or headers.get("x-opengdpr-processor-domain")
    signature = headers.get("x-opendsr-signature") or headers.get("x-opengdpr-signature")
    if not sender:
        raise Refused("processor domain header missing")
    if sender.lower() != domain.lower():
        raise Refused("processor domain not trusted")
    if not signature:
        raise Refused("signature header missing")
    try:
        signature = base64.b64decode(signature, validate=True)
    except ValueError:
        raise Refused("signature is not base64") from None
    key = signing_key(certificate, domain, at or datetime.datetime.now(datetime.timezone.utc), roots)
    try:
        key.verify(signature, body, padding.PKCS1v15(), SHA256())
    except InvalidSignature:
        raise Refused("signature does not match") from None


def signing_key(certificate, domain, at, roots):
    """The public key in the certificate, once the certificate has been checked."""
    try:
        chain = x509.load_pem_x509_certificates(certificate)
        names = names_in(chain[0])
        anchors = x509.load_pem_x509_certificates(roots) if roots else chain[-1:]
    except ValueError:
        raise Refused("certificate cannot be read") from None
    if not all(one.not_valid_before_utc <= at <= one.not_valid_after_utc for one in chain):
        raise Refused("certificate expired or not yet valid")
    wildcard = "*." + domain.lower().partition(".")[2]
    if not {domain.lower(), wildcard} & names:
        raise Refused("certificate names another domain")
    if not trusted(chain, anchors):
        raise Refused("certificate chain not trusted")
    key = chain[0].public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise Refused("certificate key is not RSA")
    return key


def names_in(certificate):
    """The common name and the DNS names, in lower case."""
    names = [name.value for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names += extension.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        pass
    return {name.lower() for name in names}


def trusted(chain, anchors):
    """Whether each certificate was issued by the next one, up to an anchor."""
    for certificate, issuer in zip(chain, chain[1:] + [None]):
        if certificate in anchors or any(issued(certificate, anchor) for anchor in anchors):
            return True
        if issuer is None or not issued(certificate, issuer):
            return False
    return False


def issued(certificate, issuer):
    """Whether `issuer` is an authority and signed `certificate`."""
    try:
        authority = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        certificate.verify_directly_issued_by(issuer)
        return authority
    except (x509.ExtensionNotFound, InvalidSignature, TypeError, ValueError):
        return False


def main():
    parser = argparse.ArgumentParser(prog="verify")
    parser.add_argument("certificate", type=Path, metavar="CERT.pem")
    parser.add_argument("domain", metavar="TRUSTED_DOMAIN")
    parser.add_argument("headers", type=Path, metavar="HEADERS.json")
    parser.add_argument("body", type=Path, metavar="BODY")
    parser.add_argument("--at", metavar="TIME")
    parser.add_argument("--roots", type=Path, metavar="ROOTS.pem")
    given = parser.parse_args()
    # Python before 3.11 does not read the "Z".
    at = datetime.datetime.fromisoformat(given.at.replace("Z", "+00:00")) if given.at else None
    roots = given.roots.read_bytes() if given.roots else None
    headers = json.loads(given.headers.read_text(encoding="utf-8"))
    try:
        verify(given.certificate.read_bytes(), given.domain, headers, given.body.read_bytes(), at, roots)
    except Refused as refusal:
        sys.exit(str(refusal))
    print("valid")


if __name__ == "__main__":
    main()
