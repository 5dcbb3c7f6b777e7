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
from preftune.store.records import File, Job, ModelVersion, Resource, Upload

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
ROW = {"item": {"q": "a", "n": 1}, "sample": {"output_text": "b"}}
GRADERS = [
    {"type": "string_check", "name": "eq", "operation": "ilike", "input": "{{sample.output_text}}", "reference": "{{item.q}}"},
    {"type": "text_similarity", "name": "near", "evaluation_metric": "rouge_l", "input": "{{item.q}}", "reference": "a b",
     "pass_threshold": 0.5},
    {"type": "label_model", "name": "good", "model": "starter", "labels": ["good", "bad"], "passing_labels": ["good"],
     "input": [{"role": "user", "content": "Q: {{item.q}}"}]},
    {"type": "score_model", "name": "score", "model": "starter", "range": [0, 10], "pass_threshold": 5,
     "input": [{"role": "user", "content": {"type": "input_text", "text": "{{item.q}}"}}]},
    {"type": "multi", "name": "both", "calculate_output": "(a + b) / 2", "graders": {
        "a": {"type": "string_check", "name": "a", "operation": "eq", "input": "x", "reference": "x"},
        "b": {"type": "text_similarity", "name": "b", "evaluation_metric": "fuzzy_match", "input": "x", "reference": "y"}}},
]  # fmt: skip
EXTRA = {"loss": {"beta": 0.1, "rpo_alpha": 0.2}, "lora": {"rank": 4, "alpha": 8.0}, "early_stopping": {"patience": 2}}
WRITER = {"model": "starter", "model_source": "serverless", "system_template": "Be {{ q }}.", "input_template": "{{ q }}"}
JUDGE = {"model": "judge", "model_source": "external", "external_base_url": "http://localhost:1/v1", "external_api_token": "t"}
# whole bodies of the routes whose schemas say no more than "an object" somewhere inside
FULL = {
    "/v1/evals": {"name": "e", "testing_criteria": GRADERS, "metadata": {"a": "b"}, "data_source_config": {
        "type": "custom", "item_schema": {"type": "object"}, "include_sample_schema": True}},
    "/v1/evals/{eval_id}/runs": {"name": "r", "data_source": {
        "type": "completions", "model": "starter", "sampling_params": {"temperature": 0.5, "seed": 1, "max_completion_tokens": 4},
        "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
        "source": {"type": "file_content", "content": [ROW, ROW]}}},
    "/v1/fine_tuning/alpha/graders/run": {"grader": GRADERS[0], "model_sample": "b", "item": {"q": "a"}},
    "/v1/fine_tuning/jobs": {"model": "starter", "training_file": "file-1", "seed": 1, "suffix": "s", "metadata": {"a": "b"},
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1, "learning_rate_multiplier": 2}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}], "preftune": EXTRA},
    "/v1/fine-tunes": {"model": "starter", "training_file": "file-1", "validation_file": "file-1", "n_evals": 2,
        "lr_scheduler": {"lr_scheduler_type": "cosine", "lr_scheduler_args": {"min_lr_ratio": 0.1, "num_cycles": 0.5}},
        "training_method": {"method": "dpo", "dpo_beta": 0.1, "rpo_alpha": 0.5, "simpo_gamma": 0.5}, "max_grad_norm": 1.0,
        "training_type": {"type": "Lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_trainable_modules": "q_proj"},
        "early_stopping_enabled": True, "early_stopping_min_delta": 0.1, "weight_decay": 0.1, "warmup_ratio": 0.1,
        "preftune": EXTRA},
    "/v1/flow/fine-tunes": {"project_id": 1, "infrastructure_config": {"accel_type": "H100", "n_accel": 1, "n_node": 1},
        "training_config": {"training_files": ["file-1"], "model": "starter", "n_epochs": 1, "fine_tune_type": "PREFERENCE",
            "beta": 0.1, "lora_config": {"r": 4, "alpha": 8, "extras": {"use_rslora": True, "target_modules": ["q_proj"]}},
            "experiment_name": "an experiment", "preftune": EXTRA}},
    "/v1/evaluation": {"type": "compare", "parameters": {
        "input_data_file_path": "file-1", "judge": JUDGE, "model_a": "a", "model_b": WRITER}},
}  # fmt: skip
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
# a parameter of a path to what is there, so that spoilt bodies reach what lies behind the look-up
KNOWN = {
    "eval_id": "eval_1", "run_id": "evalrun_1", "evaluation_id": "eval-1", "deployment_id": "dep_1", "endpoint_id": "ep_1",
    "upload_id": "upload_1", "number": "1", "project_id": "proj_default", "part": "1", "name": "tuned", "model_id": "ml_1",
    "item_id": "outputitem_1_0",
}  # fmt: skip


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
        body = FULL[path] if path in FULL and self.random.random() < 0.7 else self.good(schema, 0)
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            body = self.spoil(body)
        if "chat" in path or "completions" in path:  # no model is started for a request that happens to be right
            body = {**body, "model": self.random.choice(TEXTS) + "?"} if isinstance(body, dict) else body
        return json.dumps(body, ensure_ascii=self.random.random() < 0.8).encode("utf-8", "surrogatepass")

    def pick_id(self, path: str, name: str) -> str:
        """Something in the place of an id; often one that leads somewhere."""
        if self.random.random() < 0.5:
            known = "ft-1" if "job" in name or "fine-tune" in path else "file-1" if "file" in name else KNOWN.get(name, "ml_1")
            if name == "deployment_id" and "/flow/" in path:
                known = "deployment-1"
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
    seed_dialects(platform, project)
    return add_key(platform, project, "fuzz", "admin")[1]


def seed_dialects(platform: Platform, project: str) -> None:
    """What only one dialect has: an eval with a run, an evaluation, a project, deployments, an endpoint, an open upload."""
    check = {"type": "string_check", "name": "eq", "operation": "eq", "input": "{{item.q}}", "reference": "x"}
    bodies = {
        "eval_1": ("openai.eval", "mine", {
            "name": "mine", "metadata": {}, "testing_criteria": [check],
            "data_source_config": {"type": "custom", "item_schema": {"type": "object"}, "include_sample_schema": True},
        }),
        "flow_1": ("seekr.project", "1", {"name": "a project", "description": "of a fuzz"}),
        "deployment-1": ("seekr.deployment", "mine-too", {
            "name": "mine-too", "description": "of a fuzz", "model_type": "Fine-tuned Run", "model_id": "tuned", "n_instances": 1,
            "model": "ml_1", "is_active": False, "updated_at": None, "deployed_at": None,
        }),
        "ep_1": ("together.endpoint", "default/ep", {"split": [], "updated_at": "2026-01-02T03:04:05+00:00"}),
        "dep_1": ("together.deployment", "default/ep", {
            "name": "dep", "endpoint": "ep_1", "model": "ml_1", "replicas": {"minReplicas": 1, "maxReplicas": 1},
            "is_active": True, "updated_at": "2026-01-02T03:04:05+00:00",
        }),
    }  # fmt: skip
    for made, (kind, name, body) in bodies.items():
        platform.store.insert(Resource(id=made, project=project, type=kind, name=name, body=body))
    common = {"project": project, "work": "evaluate", "status": "cancelled", "files": ("file-1",)}
    source = {"type": "jsonl", "source": {"type": "file_id", "id": "file-1"}}
    task = {"kind": "graders", "graders": [check], "sample": None, "models": []}
    run = Job(id="evalrun_1", name="eval_1", dialect="openai", request={"data_source": source}, recipe=task, **common)
    judged = Job(
        id="eval-1", name="evaluation:compare", dialect="together", request={"type": "compare", "parameters": {}},
        recipe={"kind": "compare", "judge": {"model": "starter"}, "model_a": "a", "model_b": "b"}, **common,
    )  # fmt: skip
    for job in (run, judged):
        platform.store.insert(job)
    platform.store.insert(Upload(id="upload_1", project=project, filename="b.jsonl", purpose="fine-tune", bytes=100))


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
