"""What an operator sees of a server: metrics, and a log whose lines nothing that a client sends can break."""

import json
import logging
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.server.app import create_app
from preftune.server.observe import JsonLines
from preftune.server.settings import ServerSettings
from preftune.store.records import Job, new_id

KEY = "observer-key-0123456789"


@pytest.fixture
def client(tmp_path):
    from fastapi.testclient import TestClient

    platform = Platform.open(Context(tmp_path / "cache", tmp_path / "home"))
    project = platform.project(DEFAULT_PROJECT).id
    add_key(platform, project, "k", "developer", KEY)
    platform.store.insert(Job(id=new_id("ft-"), project="proj_other", work="train", status="queued"))
    with TestClient(create_app(platform, ServerSettings()), base_url="http://127.0.0.1") as made:
        made.headers["Authorization"] = f"Bearer {KEY}"
        yield made
    platform.store.close()


def test_metrics_count_requests_by_route_and_jobs_by_state(client):
    for _ in range(3):
        assert client.get("/v1/files/file-none").status_code == 404
    assert client.get("/v1/fine_tuning/jobs").status_code == 200
    assert client.get("/metrics", headers={"Authorization": ""}).status_code == 401
    text = client.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["preftune_http_requests_total", "/v1/files/{file_id}", "404", "GET"] == 3
    assert found["preftune_http_request_seconds_count", "/v1/fine_tuning/jobs", "GET"] == 1
    assert found["preftune_jobs", "queued", "train"] == 1
    assert found["preftune_jobs", "export", "queued"] == 0
    assert "file-none" not in text, "an id became a label"


def test_a_line_of_the_log_is_one_request_whatever_it_holds(client, caplog):
    handler_lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            handler_lines.append(JsonLines().format(record))

    logger = logging.getLogger("preftune.access")
    keep = Keep()
    logger.addHandler(keep)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        answer = client.get("/v1/files/%0A%22level%22:%22error%22", headers={"x-request-id": "abc-1"})
        client.get("/v1/models", headers={"x-request-id": 'x" , "status": 200'})
    finally:
        logger.removeHandler(keep)
        logger.setLevel(before)
    assert answer.status_code == 404
    first, second = (json.loads(line) for line in handler_lines)
    assert (first["request_id"], first["status"], first["route"]) == ("abc-1", 404, "/v1/files/{file_id}")
    assert second["request_id"].startswith("req_")
    assert KEY not in "".join(handler_lines)
    assert all("\n" not in line for line in handler_lines)


def test_the_serve_verb_knows_its_log(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "serve", "--log", "xml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "'plain', 'json'" in done.stderr
