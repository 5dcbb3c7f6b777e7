"""A list that nobody pages is given whole, however long it is, and written while it is read."""

import pytest
from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store import base, memory
from preftune.store.records import File, new_id

COUNT = 2300


@pytest.fixture
def platform(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MAX_PAGE", 1000)  # of 10,000, so that a list is longer than any page of the store
    opened = Platform.open(Context(tmp_path / "cache", tmp_path / "home"), database="memory:")
    project = opened.project(DEFAULT_PROJECT).id
    for number in range(COUNT):
        purpose = "batch" if number % 23 == 0 else "fine-tune"
        opened.store.insert(File(id=new_id("file"), project=project, filename=f"{number}.jsonl", purpose=purpose))
    yield opened
    opened.store.close()


@pytest.fixture
def client(platform):
    project = platform.project(DEFAULT_PROJECT).id
    with TestClient(create_app(platform, ServerSettings()), base_url="http://localhost") as made:
        made.headers["Authorization"] = f"Bearer {add_key(platform, project, 'admin', 'admin')[1]}"
        yield made


def names(answer):
    return [row["filename"] for row in answer.json()["data"]]


def test_files_without_a_limit_are_all_of_them(client):
    answer = client.get("/v1/files")
    found = answer.json()
    assert names(answer) == [f"{number}.jsonl" for number in reversed(range(COUNT))]
    assert (found["object"], found["has_more"]) == ("list", False)
    assert (found["first_id"], found["last_id"]) == (found["data"][0]["id"], found["data"][-1]["id"])
    assert "content-length" not in answer.headers, "written while it is read"


def test_what_narrows_or_orders_the_list_does_so_for_the_whole(client):
    assert names(client.get("/v1/files?purpose=batch&order=asc")) == [f"{number}.jsonl" for number in range(0, COUNT, 23)]
    tenth = client.get("/v1/files?order=asc&limit=10").json()
    assert tenth["has_more"]
    rest = client.get("/v1/files", params={"order": "asc", "after": tenth["last_id"]})
    assert names(rest) == [f"{number}.jsonl" for number in range(10, COUNT)]
    nothing = client.get("/v1/files?purpose=assistants").json()
    assert nothing == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_a_limit_is_held(client):
    found = client.get("/v1/files?limit=100").json()
    assert (len(found["data"]), found["has_more"]) == (100, True)
    assert base.MAX_PAGE == 10_000
    assert client.get("/v1/files?limit=10001").status_code == 400
