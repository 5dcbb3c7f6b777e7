"""Bad requests over every route of every dialect: python tests/soak/fuzz_api.py --requests 5000 [--seed 0] [--seconds 600]

Each request begins as what the route's own schema allows and is then spoilt: wrong types, huge numbers, deep nesting, NaN,
control characters, lone surrogates,
CRLF in headers, wrong multipart, paths and fsspec chains as names, oversized fields. Whatever comes,
the answer is no 500 and its body the one envelope with a message that is a sentence. Exit 1 where one is not.
"""

import argparse
import collections
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform, event
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore
from preftune.store.records import File, Job, ModelVersion

TEXTS = (
    "", " ", "x", "x" * 300, "y" * 70_000, "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc", "file:///etc/passwd",
    "simplecache::s3://bucket/x", "zip://a::file:///etc/x", "a\x00b", "a\r\nSet-Cookie: a=b", "\x1b[31m", "\ud800",
    "\udfff\ud800", "\u202eabc", "{{ ''.__class__ }}", "{% for a in range(9999999) %}x{% endfor %}", "NaN", "1e999", "null",
    "9" * 400, "-1",
    "ft-00000000-0000-0000-0000-000000000000", "starter", "file-1", "ft-1", "ml_1", "\U0001f600", "Ω", "a/b:c", "%00", "%ff%fe",
    "(a+)+$", "'; DROP TABLE jobs; --", "__proto__", "http://169.254.169.254/latest", "javascript:alert(1)",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**70, 10**300, 0.1, -0.0, 1e308, 5e-324, float("nan"), float("inf"))
RAW = (
    b"", b"{", b"[]", b"null", b"true", b"1", b'"x"', b"\xff\xfe\x00", b"[" * 20_000, b'{"a":' * 5000, b'{"model": NaN}',
    b"{}{}", b'{"seed": 1e999}', b'{"a": "\\ud800"}', b'{"\\ud800": 1}', b"\x1f\x8b\x08\x00", b"%PDF-1.7",
    b'{"model": 1' + b"0" * 5000 + b"}",
)  # fmt: skip
PART = b'--x\r\nContent-Disposition: form-data; name="file"'
FORMS = (
    b"", b"--x", b"--x--\r\n", b"--x\r\n\r\n\r\n--x--\r\n", PART + b"\r\n\r\nabc\r\n--x--\r\n",
    PART + b'; filename="a.jsonl"\r\n\r\n{}\r\n',
    PART + b'; filename="../../a.jsonl"\r\n\r\n{}\n\r\n--x--\r\n', PART + b'; filename="a\x00.jsonl"\r\n\r\n{}\n\r\n--x--\r\n',
    PART + b"; filename*=utf-8''%ff.jsonl\r\nContent-Type: \x00\r\n\r\n{}\n\r\n--x--\r\n",
    (PART + b"\r\n\r\nx\r\n") * 200 + b"--x--\r\n",
    PART + b"; filename=" + b"n" * 5000 + b".jsonl\r\n\r\n{}\n\r\n--x--\r\n",
)  # fmt: skip
KINDS = (
    "multipart/form-data; boundary=x", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 400, "text/plain", "",
    "application/x-www-form-urlencoded", "application/json; charset=utf-7", "application/octet-stream", "\xff",
)  # fmt: skip
HEADERS = (
    "Idempotency-Key",
    "Last-Event-ID",
    "Range",
    "X-Request-Id",
    "Accept",
    "X-Forwarded-Host",
    "Content-Encoding",
    "Cookie",
    "User-Agent",
)
RANGES = ("bytes=0-", "bytes=-1", "bytes=9-1", "bytes=a-b", "bytes=0-1,3-4", "bytes=99999999999999999999-", "lines=1-2")
CHECKED_APART = ("/v1/flow/files", "/v1/flow/bulk_files")  # a process for each, so few are sent
IDS = ("file-1", "ft-1", "ml_1", "starter", "tuned", "alias", "nothing", "1")


class Fuzz:
    """A server in this process, and requests to it by a seed."""

    def __init__(self, home: Path, seed: int) -> None:
        self.random = random.Random(seed)
        platform = Platform(MemoryStore(), Artifacts(str(home / "artifacts")), home, Context(home / "cache", home))
        key = seeded(platform)
        self.app = create_app(platform, ServerSettings(max_body=1 << 20, max_upload=1 << 20))
        self.client = TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False, follow_redirects=False)
        self.client.headers["Authorization"] = f"Bearer {key}"
        self.document = self.app.openapi()
        paths = self.document["paths"]
        self.targets = [
            (method.upper(), path, one) for path, methods in sorted(paths.items()) for method, one in sorted(methods.items())
        ]
        self.counts: collections.Counter[int] = collections.Counter()
        self.bad: list[str] = []

    def run(self, requests: int, seconds: float) -> int:
        """Send so many requests, or as many as the time allows; how many were sent."""
        end, sent = time.monotonic() + seconds, 0
        with self.client:
            while sent < requests and time.monotonic() < end:
                method, path, operation = self.targets[sent % len(self.targets)]
                if method == "GET" or path not in CHECKED_APART or self.random.random() < 0.1:
                    self.send(method, path, operation)
                sent += 1
        return sent

    def send(self, method: str, path: str, operation: dict) -> None:
        """One spoilt request, and what is wrong with its answer."""
        filled = re.sub(r"{(\w+)}", lambda found: quote(self.pick_id(path, found[1]), safe=""), path)
        params, headers = {}, {}
        for one in operation.get("parameters", ()):
            if one["in"] == "query" and self.random.random() < 0.5:
                params[one["name"]] = self.text(self.value(one["schema"]))
        if path.endswith("/download"):
            params["wait"] = "0"
        for name in self.random.sample(HEADERS, self.random.choice((0, 0, 1, 2))):
            headers[name] = self.random.choice(RANGES) if name == "Range" else latin(self.random.choice(TEXTS)[:2000])
        content = self.content(method, path, operation, headers)
        query = "&".join(f"{quote(name)}={quote(value, safe='', errors='surrogatepass')}" for name, value in params.items())
        told = f"{method} {filled[:80]} {query[:80]} {headers} {(content or b'')[:160]!r}".replace("\n", " ")
        raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        try:
            answer = self.client.request(method, filled + (f"?{query}" if query else ""), content=content, headers=raw)
        except Exception as error:  # noqa: BLE001 -- whatever leaves the server is what is looked for
            self.bad.append(f"{type(error).__name__}: {error} | {told}")
            return
        self.counts[answer.status_code] += 1
        self.check(answer, told)

    def check(self, answer, told: str) -> None:
        """Note an answer that is a 500, or no envelope, or tells nothing."""
        if answer.status_code >= 500 and answer.status_code != 503:
            self.bad.append(f"{answer.status_code} {answer.text[:200]} | {told}")
        elif any("\r" in value or "\n" in value for value in answer.headers.values()):
            self.bad.append(f"a header was injected: {answer.headers} | {told}")
        elif answer.status_code >= 400:
            try:
                error = answer.json()["error"]
                is_told = set(error) == {"message", "type", "param", "code"} and len(error["message"].split()) >= 3
            except (ValueError, KeyError, TypeError):
                is_told = False
            if not is_told or "Traceback" in answer.text or "site-packages" in answer.text:
                self.bad.append(f"{answer.status_code} {answer.text[:300]} | {told}")

    def content(self, method: str, path: str, operation: dict, headers: dict) -> bytes | None:
        """A body: the schema's with something spoilt, or raw bytes, or a form."""
        if method in {"GET", "DELETE"} and "requestBody" not in operation:
            return None
        roll = self.random.random()
        if roll < 0.12 or "requestBody" not in operation:
            headers["Content-Type"] = latin(self.random.choice(KINDS))
            return self.random.choice(FORMS)
        headers["Content-Type"] = "application/json"
        if roll < 0.25:
            return self.random.choice(RAW)
        schema = operation["requestBody"]["content"].get("application/json", {}).get("schema", {})
        body = self.good(schema, 0)
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            body = self.spoil(body)
        if "chat" in path or "completions" in path:  # no model is started for a request that happens to be right
            body = {**body, "model": self.random.choice(TEXTS) + "?"} if isinstance(body, dict) else body
        return json.dumps(body, ensure_ascii=self.random.random() < 0.8).encode("utf-8", "surrogatepass")

    def pick_id(self, path: str, name: str) -> str:
        """Something in the place of an id; often one that leads somewhere."""
        if self.random.random() < 0.5:
            known = "ft-1" if "job" in name or "fine-tune" in path else "file-1" if "file" in name else "ml_1"
            return self.random.choice(("cancel", "pause", "resume")) if name == "action" else known
        text = self.random.choice(IDS) if self.random.random() < 0.5 else self.random.choice(TEXTS)
        return text.encode("utf-8", "replace").decode()[:400] or "-"

    def text(self, value) -> str:
        """A value of a query."""
        return (value if isinstance(value, str) else json.dumps(value))[:5000]

    def value(self, schema: dict):
        """Something good or bad for a schema."""
        return self.good(schema, 0) if self.random.random() < 0.4 else self.nasty()

    def nasty(self):
        """Something that nobody asked for."""
        choice = self.random.random()
        if choice < 0.5:
            return self.random.choice(TEXTS)
        if choice < 0.75:
            return self.random.choice(NUMBERS)
        deep: object = {}
        for _ in range(self.random.choice((1, 30, 300))):
            deep = {"a": deep} if self.random.random() < 0.5 else [deep]
        return self.random.choice(
            (None, True, [], {}, [[]], {"": None}, {"\ud800": 1}, [None] * 500, deep, {"name": {"name": {}}})
        )

    def good(self, schema: dict, depth: int):
        """What a schema allows, more or less."""
        if "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        for key in ("anyOf", "oneOf", "allOf"):
            if schema.get(key):
                return self.good(self.random.choice(schema[key]), depth + 1)
        if "const" in schema or "enum" in schema:
            return schema.get("const", self.random.choice(schema.get("enum", [None])))
        kind = schema.get("type")
        if kind == "object" or "properties" in schema:
            needed = set(schema.get("required", ()))
            names = [
                name for name in schema.get("properties", {}) if name in needed or (depth < 4 and self.random.random() < 0.4)
            ]
            return {name: self.good(schema["properties"][name], depth + 1) for name in names}
        if kind == "array":
            return [self.good(schema.get("items", {}), depth + 1) for _ in range(self.random.choice((1, 1, 2)))]
        if kind in {"integer", "number"}:
            return self.random.choice((schema.get("minimum", 1), 1, 2))
        if kind == "boolean":
            return self.random.random() < 0.5
        return (
            self.random.choice(("starter", "file-1", "dpo", "a.jsonl", "fine-tune", "ft-1", "a-name-here"))
            if kind == "string"
            else self.nasty()
        )

    def spoil(self, body):
        """The same with one value, somewhere, that is something else."""
        if isinstance(body, dict) and body and self.random.random() < 0.85:
            key = self.random.choice(sorted(body, key=repr))
            roll = self.random.random()
            if roll < 0.1:
                return {name: value for name, value in body.items() if name != key}
            if roll < 0.2:
                return {**body, self.random.choice(TEXTS)[:100]: self.nasty()}
            return {**body, key: self.spoil(body[key])}
        if isinstance(body, list) and body and self.random.random() < 0.6:
            return [*body[1:], self.spoil(body[0])]
        return self.nasty()


def seeded(platform: Platform) -> str:
    """A file, an ended job and a model, so that ids lead somewhere; the key of an admin."""
    project = platform.project(DEFAULT_PROJECT).id
    add_base_model(platform, "starter", "starter")
    stored = platform.artifacts.put("files/file-1.jsonl", [b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'])
    platform.store.insert(
        File(id="file-1", project=project, filename="a.jsonl", purpose="fine-tune", bytes=stored.bytes, sha256=stored.sha256,
             status="processed", artifact=stored.key, num_rows=1)
    )  # fmt: skip
    from preftune.app.recipes import check_recipe

    recipe = check_recipe({"model": "starter", "data": "file-1"}).model_dump(mode="json")
    job = Job(
        id="ft-1",
        project=project,
        work="train",
        status="cancelled",
        model="starter",
        name="tuned",
        recipe=recipe,
        files=("file-1",),
    )
    platform.store.insert(job, [event("ft-1", project, "metrics", "step", step=1, stage="1-dpo", metrics={"loss": float("nan")})])
    platform.store.insert(
        ModelVersion(id="ml_1", project=project, name="tuned", version=1, form="adapter", job="ft-1", run="nowhere")
    )
    return add_key(platform, project, "fuzz", "admin")[1]


def latin(text: str) -> str:
    """What a header can carry at all."""
    return text.encode("latin-1", "ignore").decode("latin-1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), given.seed)
        sent = fuzz.run(given.requests, given.seconds)
    print(f"{sent} requests over {len(fuzz.targets)} routes: {dict(sorted(fuzz.counts.items()))}; {len(fuzz.bad)} bad")
    for line in fuzz.bad[:60]:
        print(line[:700])
    return 1 if fuzz.bad else 0


if __name__ == "__main__":
    sys.exit(main())
