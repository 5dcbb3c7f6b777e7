"""A W&B server on loopback: as much of its API as the real package asks for in one run, and everything that it was sent."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parents[1] / ".venv-tracking"
PACKAGES = ("wandb", "cwevals", "coreweave_evaluations", "opentelemetry", "platformdirs", "protobuf", "google", "googleapis",
            "xxhash")  # fmt: skip


def package_path(folder):
    """A folder for PYTHONPATH that holds the real wandb package and what only it needs; None where it is not installed."""
    sites = list(SITE.glob("lib/python*/site-packages"))
    if not sites or not (sites[0] / "wandb").is_dir():
        return None
    folder.mkdir(parents=True)
    for place in sites[0].iterdir():
        if place.name.lower().startswith(PACKAGES) and not place.name.startswith("google_auth"):
            (folder / place.name).symlink_to(place)
    return folder


@contextmanager
def silent_server():
    """The port of a server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as kept:

        def take():
            with suppress(OSError):
                while True:
                    kept.enter_context(listener.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield listener.getsockname()[1]


@contextmanager
def untrusted_server(folder):
    """The port of an https server whose certificate nobody signed but itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda request, address: None  # who refuses the certificate hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class WandbServer:
    """Listens while it is entered. calls: (operation or path, body, Authorization) of every request, in order.

    silent_at: requests whose path ends so are taken and never answered.
    """

    def __init__(self, silent_at=None):
        self.calls, self._silent_at, self._is_over = [], silent_at, threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def of(self, name):
        """Bodies of the calls of an operation, or of a path that ends so."""
        return [body for called, body, _ in self.calls if called == name or called.endswith(name)]

    def history(self):
        """The rows that were logged."""
        rows = [sent["files"].get("wandb-history.jsonl", {}) for sent in self.of("/file_stream") if "files" in sent]
        return [json.loads(line) for one in rows for line in one.get("content", ())]

    def answer(self, name, variables):
        """What a query of that name gives."""
        if name == "UpsertBucket":
            entity = {"id": "e", "name": variables.get("entity") or "me"}
            bucket = {
                "id": "b", "name": variables["name"], "displayName": variables.get("displayName"), "config": "{}",
                "project": {"id": "p", "name": variables["project"], "entity": entity}, "historyLineCount": 0,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": one, "uploadUrl": f"{self.url}/put/{one}"} for one in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "RunResumeStatus":
            return {"model": None}
        return {}

    def _handler(outer):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                name, given, said = self.path, body, {}
                if self.path.endswith((".jsonl", "graphql", "file_stream")):
                    given = json.loads(body)
                if self.path == "/graphql":
                    name = given.get("operationName", "")
                    said = {"data": outer.answer(name, given.get("variables") or {})}
                outer.calls.append((name, given, self.headers.get("Authorization", "")))
                if outer._silent_at and self.path.endswith(outer._silent_at):
                    outer._is_over.wait()
                content = json.dumps(said).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *given):
                """Nothing."""

        return Handler
