"""Every route of the dialects with what no client sends: never a 500, always the one envelope."""

import itertools
import json
import re

import pytest
from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore

IDS = ("nothing", "ft-00000000-0000-0000-0000-000000000000", "file-x", "%2e%2e%2fetc", "1", "-1", "x" * 300, "%00", "projects")
PATHS = ("../../etc/passwd", "s3://bucket/x", "simplecache::file:///etc/passwd", "{{ ''.__class__ }}")
SCALARS = (None, True, -1, 1e308, "", "x", "\ud800", "a\x00b", "9" * 5000, *PATHS)
VALUES = (*SCALARS, [], [[]], {}, {"type": None}, {"type": []}, [{"type": "python"}], {"a": {"b": {"c": []}}})
WORDS = """
    model training_file method hyperparameters preftune training_method training_type lr_scheduler n_epochs from_checkpoint
    training_config infrastructure_config project_id parameters type data_source_config data_source testing_criteria grader name
    filename bytes purpose part_ids file_size num_parts file_name metadata autoscaling trafficSplit messages prompt
    upload_id parts seed integrations item new_filename
"""
RAW = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000, b'{"model": NaN}',
    b"{}" * 3, b'{"project_id": 1e999}',
)  # fmt: skip
CHECK = {"type": "string_check", "operation": "eq", "input": "x", "reference": "y"}
GOOD = {
    "model": "starter", "training_file": "file-x", "project_id": 1, "file_name": "a.jsonl", "file_size": 5, "num_parts": 1,
    "purpose": "fine-tune", "filename": "a.jsonl", "bytes": 5, "name": "a-name", "type": "compare", "description": "described",
    "training_config": {"training_files": ["file-x"], "model": "starter", "n_epochs": 1}, "data_source": {"type": "jsonl"},
    "data_source_config": {"type": "custom"}, "testing_criteria": [CHECK], "grader": CHECK, "part_ids": ["x"], "file_id": "x",
    "parameters": {"input_data_file_path": "file-x", "judge": {"model": "starter"}, "model_a": "a", "model_b": "b"},
    "messages": [{"role": "user", "content": "x"}], "upload_id": "x", "parts": [{"part_number": 1, "etag": "x"}],
    "new_filename": "b.jsonl", "model_type": "Base Model", "model_id": "starter", "n_instances": 1, "suffix": "x", "size": 1,
}  # fmt: skip
FILE = b'--x\r\nContent-Disposition: form-data; name="file"'
FORMS = (
    b"", b"--x\r\n", b"--x\r\n\r\n\r\n--x--\r\n", FILE + b"\r\n\r\nabc\r\n--x--\r\n",
    FILE + b'; filename="../../a"\r\n\r\nabc\r\n--x--\r\n',
)  # fmt: skip
KINDS = ("multipart/form-data; boundary=x", "multipart/form-data", "application/x-www-form-urlencoded", "text/plain")
UPLOADS = (("POST", "/v1/files"), ("PUT", "/v1/flow/files"), ("PUT", "/v1/flow/bulk_files"), ("POST", "/v1/uploads/x/parts"))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    home = tmp_path_factory.mktemp("bad")
    platform = Platform(MemoryStore(), Artifacts(str(home / "artifacts")), home, Context(home / "cache", home))
    project = platform.project(DEFAULT_PROJECT)
    add_base_model(platform, "starter", "starter")
    _, key = add_key(platform, project.id, "test", "admin")
    with TestClient(create_app(platform, ServerSettings()), base_url="http://localhost", raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def routes(app):
    """(method, path, names of its parameters) of every route of the dialects."""
    for path, methods in app.app.openapi()["paths"].items():
        if path.startswith(("/v1", "/v2", "/v3", "/uploads")):
            for method in sorted(methods):
                yield method.upper(), path, re.findall(r"{(\w+)}", path)


def bodies():
    yield from RAW
    yield json.dumps(GOOD).encode()
    for value in (
        {"method": []},
        {"lora": 1},
        {"loss": []},
        {"early_stopping": "x"},
        {"seed": "x"},
        {"adapter": []},
        {"probe": 7},
    ):
        yield json.dumps({**GOOD, "preftune": value}).encode()
    for key, value in itertools.product(WORDS.split(), VALUES):
        yield json.dumps({**GOOD, key: value}).encode()


def check(answer, path):
    assert answer.status_code < 500 or answer.status_code == 503, (path, answer.status_code, answer.text[:300])
    if answer.status_code >= 400:
        told = answer.json()
        assert set(told["error"]) == {"message", "type", "param", "code"}, (path, told)
        assert told["error"]["message"], path
        assert "Traceback" not in answer.text
        assert "site-packages" not in answer.text


def test_ids_that_are_none(app):
    count = 0
    for method, path, names in routes(app):
        for one in IDS if names else ("",):
            filled = path
            for name in names:
                filled = filled.replace(f"{{{name}}}", one)
            if method in {"GET", "DELETE"}:
                check(app.request(method, filled, follow_redirects=False), f"{method} {filled}")
                count += 1
    assert count > 200


def test_bodies_that_are_none(app):
    sent, given = 0, list(bodies())
    targets = [
        one for one in routes(app) if one[0] in {"POST", "PUT", "PATCH"} and "chat" not in one[1] and "completions" not in one[1]
    ]
    for place, (method, path, names) in enumerate(targets):
        filled = path
        for name in names:
            filled = filled.replace(
                f"{{{name}}}", "proj_default" if name == "project_id" else "cancel" if name == "action" else "x"
            )
        some = given[:20] + given[20 + place % 7 :: 7]
        for body in some:
            answer = app.request(
                method, filled, content=body, headers={"Content-Type": "application/json"}, follow_redirects=False
            )
            check(answer, f"{method} {filled} {body[:200]!r}")
            sent += 1
    assert sent > 2500, sent


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "after=%00", "limit=99999999999999999999", "order=sideways", "offset=-5", "skip=x"]
)
def test_queries_that_are_none(app, query):
    for method, path, names in routes(app):
        if method == "GET" and not names:
            check(app.get(f"{path}?{query}"), f"{path}?{query}")


def test_forms_that_are_none(app):
    for (method, path), body, kind in itertools.product(UPLOADS, FORMS, KINDS):
        check(app.request(method, path, content=body, headers={"Content-Type": kind}), f"{method} {path} {kind} {body!r}")
