"""Every operation of the native API's document can be reached through the clients, and they ask for nothing else there."""

import inspect
import re

import httpx2
import pytest

from preftune.app.context import Context
from preftune.app.jobs.platform import Platform
from preftune.sdk import Client, Retries
from preftune.sdk.errors import ApiError
from preftune.sdk.methods import Part
from preftune.server.app import create_app
from preftune.server.native.document import document_of
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore

NOT_REACHED = {}  # "METHOD /api/v1/path": why the clients have no method for it
GIVEN = {"low": 0.0, "high": 1.0, "passes_from": 0.5, "priority": 1, "labels": ["a", "b"], "passing": ["a"], "rating": 1.0}


@pytest.fixture
def operations(tmp_path):
    """(method, template) of everything in the document."""
    platform = Platform(MemoryStore(), Artifacts(str(tmp_path / "artifacts")), tmp_path, Context(tmp_path / "cache", tmp_path))
    paths = document_of(create_app(platform, ServerSettings()))["paths"]
    return {(method.upper(), path) for path, found in paths.items() for method in found}


def asked_by_the_client(tmp_path):
    """Every method of every noun is called once (``events`` in both ways); what is sent, all of it answered with 404."""
    sent = []

    def answer(request):
        sent.append((request.method, request.url.path))
        return httpx2.Response(404, json={"error": {"message": "nothing here", "type": "invalid_request_error"}})

    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    paths = {"path": file, "to": tmp_path / "out"}
    with Client("http://127.0.0.1:9", "k", retries=Retries(times=0), transport=httpx2.MockTransport(answer)) as client:
        for noun in (one for one in vars(client).values() if isinstance(one, Part)):
            for word in (word for word in dir(noun) if not word.startswith("_")):
                method = getattr(noun, word)
                needed = [one for one in inspect.signature(method).parameters.values() if one.default is one.empty]
                given = {one.name: {**GIVEN, **paths}.get(one.name, "x") for one in needed if one.kind is not one.VAR_KEYWORD}
                for more in ({}, {"follow": False}) if word == "events" else ({},):
                    before = len(sent)
                    with pytest.raises(ApiError):
                        next(method(**given, **more))  # what is no iterator raises before
                    assert len(sent) > before, f"{type(noun).__name__}.{word} sent nothing"
    return sent


def template_of(operations, method, path):
    """The operation that answers a request: of those that fit, the one with most words of its own."""
    fits = [one for asks, one in operations if asks == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", one), path)]
    return max(fits, key=lambda one: sum("{" not in part for part in one.split("/")), default=None)


def test_every_operation_has_a_method(operations, tmp_path):
    sent = [(method, path) for method, path in asked_by_the_client(tmp_path) if path.startswith("/api/v1")]
    reached = {(method, template_of(operations, method, path)) for method, path in sent}
    unknown = sorted(f"{method} {path}" for method, path in sent if template_of(operations, method, path) is None)
    assert not unknown, f"the clients ask for what the document does not have: {unknown}"
    missing = {f"{method} {path}" for method, path in operations - reached}
    assert missing == set(NOT_REACHED), "a route without a method in sdk/nouns.py (or a reason in NOT_REACHED)"
    assert len(reached) > 45


def test_a_route_without_a_method_is_found(operations, tmp_path):
    operations |= {("POST", "/api/v1/new"), ("GET", "/api/v1/jobs/{job_id}/new")}
    sent = asked_by_the_client(tmp_path)
    assert {("POST", "/api/v1/new"), ("GET", "/api/v1/jobs/{job_id}/new")} == operations - {
        (method, template_of(operations, method, path)) for method, path in sent
    }
