"""A controller: makes one request of Lethe, receives its callbacks, and downloads the result.

The key and the secret of the controller are in LETHE_API_KEY and LETHE_API_SECRET. Needs Python 3.9 or later and
`cryptography` 42 or later.
"""

import argparse
import base64
import datetime
import http.server
import json
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs/guide/receiver-kit"))
import verify  # noqa: E402 - the receiver kit: copy its function `verify` into your own code

# A body has a few kilobytes at most.
LONGEST_BODY = 64 * 1024


def receiver(listen, certificate, domain, request_id):
    """Starts the server that Lethe calls; the queue of verified callbacks, each of them once."""
    callbacks, seen = queue.Queue(), set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            if length > LONGEST_BODY:
                return self.answer(413)
            # The signature is over these bytes: parse them only afterwards.
            body = self.rfile.read(length)
            try:
                verify.verify(certificate, domain, dict(self.headers), body)
            except verify.Refused as refusal:
                print(f"refused a callback: {refusal}", flush=True)
                return self.answer(401)
            callback = json.loads(body)
            # The processor signs for all its controllers with one key.
            if callback["subject_request_id"] != request_id:
                return self.answer(404)
            # At least once: what came before is answered again, and not worked on again. A program that goes on for
            # longer keeps the ids where they outlive it.
            callback_id = self.headers["X-Lethe-Callback-Id"]
            if callback_id not in seen:
                seen.add(callback_id)
                callbacks.put(callback)
            self.answer(202)

        def answer(self, status):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(listen, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on {server.server_address[0]}:{server.server_address[1]}", flush=True)
    return callbacks, server.server_address


def call(method, url, credentials=None, body=None):
    """Calls Lethe; the status and the body. A refusal ends the program, with what Lethe says about it."""
    request = urllib.request.Request(url, method=method, data=body and json.dumps(body).encode())
    if body:
        request.add_header("Content-Type", "application/json")
    if credentials:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(credentials).encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        sys.exit(f"{method} was answered {refusal.code}: {refusal.read().decode(errors='replace')}")
    except urllib.error.URLError as error:
        sys.exit(f"Lethe cannot be reached: {error.reason}")


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gateway", required=True, metavar="URL", help="where the gateway serves, as LETHE_PUBLIC_URL")
    parser.add_argument("--domain", required=True, help="the processor to trust, as LETHE_PROCESSOR_DOMAIN")
    parser.add_argument("--certificate", required=True, type=Path, help="a copy of https://DOMAIN/opendsr_cert.pem")
    parser.add_argument("--email", required=True, help="whom the request is about")
    parser.add_argument("--type", default="access", choices=["access", "portability", "erasure"])
    parser.add_argument("--cancel", action="store_true", help="withdraw the request again")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where callbacks are received")
    parser.add_argument("--callback-url", metavar="URL", help="how Lethe reaches that, if not by http at the same address")
    parser.add_argument("--timeout", default=600, type=float, metavar="SECONDS", help="how long to wait for each callback")
    return parser.parse_args()


def main():
    given = options()
    try:
        credentials = (os.environ["LETHE_API_KEY"], os.environ["LETHE_API_SECRET"])
    except KeyError as missing:
        sys.exit(f"set {missing.args[0]}: `lethe controller add` prints it")
    request_id = str(uuid.uuid4())
    host, _, port = given.listen.rpartition(":")
    callbacks, address = receiver((host, int(port)), given.certificate.read_bytes(), given.domain, request_id)
    requests = given.gateway.rstrip("/") + "/v3/requests"
    call("POST", requests, credentials, {
        "api_version": "3.0",
        "regulation": "gdpr",
        "subject_request_id": request_id,
        "subject_request_type": given.type,
        "submitted_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "subject_identities": {"email": {"value": given.email, "encoding": "raw"}},
        "status_callback_urls": [given.callback_url or f"http://{address[0]}:{address[1]}/callbacks"],
    })
    print(f"requested {given.type} as {request_id}", flush=True)
    if given.cancel:
        call("DELETE", f"{requests}/{request_id}", credentials)
    status = None
    while status not in ("completed", "cancelled"):
        try:
            callback = callbacks.get(timeout=given.timeout)
        except queue.Empty:
            sys.exit(f"no callback for {given.timeout:g} s; the request goes on, ask GET {requests}/{request_id}")
        status = callback["request_status"]
        print(f"{status}, expected by {callback['expected_completion_time']}", flush=True)
    # Nothing matched, or it was not about data: then there is no link.
    if callback["results_url"]:
        # Whoever has the link can read the file: it is neither shown nor logged.
        _, result = call("GET", callback["results_url"])
        Path(f"{request_id}.result").write_bytes(result)
        print(f"downloaded {callback['results_count']} lines, {len(result)} bytes, into {request_id}.result")


if __name__ == "__main__":
    main()
