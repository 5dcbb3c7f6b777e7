"""The native API in this process: every route, its roles, its projects, its pages."""

import json

import pytest
from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs import files, states
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform, event
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store.records import File, Job, ModelVersion, new_id

ROWS = b'{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}\n' * 3


@pytest.fixture
def platform(tmp_path):
    opened = Platform.open(Context(tmp_path / "cache", tmp_path / "home"), database="memory:")
    add_base_model(opened, "starter", "starter")
    yield opened
    opened.store.close()


@pytest.fixture
def project(platform):
    return platform.project(DEFAULT_PROJECT).id


@pytest.fixture
def client(platform, project):
    """Asks with an admin's key; ``client.keys`` has one of every role, and one of another project."""
    ids = {"other": platform.project("other").id}
    roles = {"admin": "admin", "developer": "developer", "annotator": "annotator", "other": "admin"}
    values = {name: add_key(platform, ids.get(name, project), name, role)[1] for name, role in roles.items()}
    with TestClient(create_app(platform, ServerSettings()), base_url="http://localhost/api/v1/") as made:
        made.headers["Authorization"] = f"Bearer {values['admin']}"
        made.values = {name: {"Authorization": f"Bearer {value}"} for name, value in values.items()}
        yield made


@pytest.fixture
def file_id(client):
    made = client.post("files", params={"filename": "pairs.jsonl"}, content=ROWS)
    assert made.status_code == 201, made.text
    return made.json()["id"]


def make_job(client, file_id, **fields):
    return client.post("jobs", json={"model": "starter", "files": [file_id], "options": {"max_steps": 2}, **fields})


def message(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def test_a_file_from_upload_to_deletion(client, platform, file_id):
    form = client.post("files", files={"file": ("b.jsonl", ROWS)}, data={"purpose": "eval"})
    assert (form.status_code, form.json()["status"], form.json()["purpose"]) == (201, "processed", "eval")
    assert client.get(f"files/{file_id}/report").json()["valid"] is None, "no worker has looked yet"
    files.apply_report(platform, file_id, files.inspect(str(_path(platform, file_id)), "pairs.jsonl"))
    report = client.get(f"files/{file_id}/report").json()
    assert (report["valid"], report["num_rows"], report["kinds"]) == (True, 1, {"preference": 1})
    assert {row["reason"] for row in report["bad_rows"]} == {"duplicate"}
    assert client.get(f"files/{file_id}/content", headers={"Range": "bytes=2-7"}).content == ROWS[2:8]
    assert [one["id"] for one in client.get("files", params={"purpose": "eval"}).json()["data"]] == [form.json()["id"]]
    assert client.delete(f"files/{file_id}").json() == {"id": file_id, "deleted": True}
    assert client.get(f"files/{file_id}").status_code == 404
    assert "filename" in message(client.post("files", content=ROWS))
    assert "ending" in message(client.post("files", params={"filename": "a.exe"}, content=ROWS))


def _path(platform, file_id):
    return platform.artifacts.local(platform.store.get(File, file_id).artifact, platform.context.cache)


def test_pages_go_through_a_whole_list_and_end(client, platform, project):
    for number in range(5):
        platform.store.insert(
            Job(id=f"ft-{number}", project=project, work="train", recipe={"stages": [{"method": "sft", "epochs": 1}]})
        )
    seen, after = [], None
    while True:
        page = client.get("jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        after = page["next"]
        assert page["has_more"] == (after is not None)
        if after is None:
            break
    assert seen == ["ft-4", "ft-3", "ft-2", "ft-1", "ft-0"]
    assert "limit" in message(client.get("jobs", params={"limit": 1001}))
    assert "after" in message(client.get("jobs", params={"after": "ft-9"}))


def test_a_job_of_any_loss_from_fields_or_a_recipe(client, platform, file_id):
    made = make_job(client, file_id, method="ipo", loss={"tau": 0.2}, suffix="mine", metadata={"team": "a"}, priority=3)
    assert made.status_code == 201, made.text
    job = made.json()
    stage = job["recipe"]["stages"][0]
    assert (stage["method"], stage["loss"], stage["data"]["train"]) == ("ipo", {"tau": 0.2}, [file_id])
    assert (job["status"], job["priority"], job["dialect"]) == ("validating", 3, "native")
    assert job["name"].startswith("starter-mine-")
    recipe = {
        "model": "starter", "seed": 4, "data": file_id,
        "stages": [{"method": "sft", "epochs": 2}, {"method": "dpo", "beta": 0.3, "adapter": "full"}],
    }  # fmt: skip
    both = client.post("jobs", json={"recipe": recipe, "suffix": "two"}).json()
    assert [(one["method"], one["data"]["train"]) for one in both["recipe"]["stages"]] == [("sft", [file_id]), ("dpo", [file_id])]
    assert both["recipe"]["seed"] == 4
    assert [one["id"] for one in client.get("jobs", params={"metadata[team]": "a"}).json()["data"]] == [job["id"]]
    assert [one["id"] for one in client.get("jobs", params={"status": "validating", "limit": 1}).json()["data"]] == [both["id"]]
    assert client.get("jobs", params={"status": "failed"}).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"files": []}, "upload a file"),
        ({"files": ["/etc/passwd"]}, "no file"),
        ({"model": "../../etc"}, "there is no model"),
        ({"model": "file:///etc::zip://x"}, "there is no model"),
        ({"method": "nothing"}, "no loss"),
        ({"loss": {"gamma": 1}}, "no option"),
        ({"options": {"lr": "fast"}}, "lr"),
        ({"options": {"output": "x"}}, "output"),
        ({"options": {"reference": {"model": "/etc"}}}, "reference"),
        ({"options": {"data": {"select": "/etc/passwd"}}}, "no file"),
        ({"from_checkpoint": "/etc"}, "there is no model"),
        ({"recipe": {"model": "starter"}}, "belongs into recipe"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_bad_job_says_what_to_do(client, file_id, body, word):
    answer = make_job(client, file_id, **body)
    assert answer.status_code == 400
    assert word in message(answer)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({"model": "starter"}, "data"),
        ({"model": {"name": "starter", "chat_template": "/etc/passwd"}, "data": "FILE"}, "chat_template"),
        ({"model": "starter", "data": "FILE", "evaluation": {}}, "evaluation"),
        ({"model": "starter", "data": "FILE", "method": "generate", "prompts": "/etc/passwd", "judge": "x"}, "generate"),
        ({"model": "starter", "data": {"train": ["/etc/passwd"]}}, "no file"),
        ({"stages": "x"}, "model"),
        ({"data": "FILE"}, "model"),
    ],
)
def test_a_bad_recipe_says_what_to_do(client, file_id, recipe, word):
    answer = client.post("jobs", json={"recipe": json.loads(json.dumps(recipe).replace("FILE", file_id))})
    assert answer.status_code == 400
    assert word in message(answer)


def test_an_idempotency_key_makes_one_job(client, file_id):
    headers = {"Idempotency-Key": "k-1"}
    body = {"model": "starter", "files": [file_id]}
    first = client.post("jobs", json=body, headers=headers).json()["id"]
    assert client.post("jobs", json=body, headers=headers).json()["id"] == first
    other = client.post("jobs", json={**body, "seed": 3}, headers=headers)
    assert other.status_code == 400
    assert "k-1" in message(other)


def test_what_may_be_done_to_a_job(client, platform, file_id):
    job_id = make_job(client, file_id).json()["id"]
    assert client.post(f"jobs/{job_id}/priority", json={"priority": 7}).json()["priority"] == 7
    assert client.post(f"jobs/{job_id}/pause").json()["status"] == "paused"
    assert client.post(f"jobs/{job_id}/resume").json()["status"] == "validating"
    refused = client.delete(f"jobs/{job_id}")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    assert (refused.json()["error"]["code"], refused.json()["error"]["type"]) == ("wrong_state", "conflict_error")
    assert client.post(f"jobs/{job_id}/cancel").json()["status"] == "cancelled"
    for action in ("cancel", "pause", "resume"):
        assert client.post(f"jobs/{job_id}/{action}").status_code == 409
    # each vendor's own dialect keeps its vendor's 400
    for path in (
        f"/v1/fine_tuning/jobs/{job_id}/cancel",
        f"/v1/fine-tunes/{job_id}/cancel",
        f"/v1/flow/fine-tunes/{job_id}/cancel",
    ):
        answer = client.post(f"http://localhost{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_state")
    assert "nothing to cancel" in message(client.post(f"jobs/{job_id}/cancel"))
    assert "no longer waits" in message(client.post(f"jobs/{job_id}/priority", json={"priority": 1}))
    assert client.post(f"jobs/{job_id}/retry", json={"reason": "try\r\nagain"}).json()["status"] == "validating"
    assert client.post(f"jobs/{job_id}/retry", json={"reason": "it waits already"}).status_code == 409
    said = [one["message"] for one in client.get(f"jobs/{job_id}/events", params={"order": "asc"}).json()["data"]]
    assert said[0] == "the job was created"
    assert said[-1] == "the job was queued again: try again"
    assert client.post(f"jobs/{job_id}/cancel").status_code == 200
    assert client.delete(f"jobs/{job_id}").json()["deleted"]
    assert client.get(f"jobs/{job_id}").status_code == 404


def test_events_are_streamed_from_where_one_left_off(client, platform, project, file_id):
    job_id = make_job(client, file_id).json()["id"]
    for step in (1, 2):
        platform.store.insert(event(job_id, project, "metrics", "m", step=step, stage="1-dpo", metrics={"loss": 0.5 / step}))
    states.cancel(platform, platform.store.get(Job, job_id))
    lines = client.get(f"jobs/{job_id}/stream").text.split("\n")
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [one.get("type") for one in told] == ["created", "metrics", "metrics", "cancelled", None]
    assert told[-1] == {"status": "cancelled"}
    assert [line for line in lines if line][-1] == "data: [DONE]"
    later = client.get(f"jobs/{job_id}/stream", params={"type": "metrics"}, headers={"Last-Event-ID": told[1]["id"]}).text
    assert [json.loads(line[6:])["step"] for line in later.split("\n") if line.startswith('data: {"id"')] == [2]
    rows = client.get(f"jobs/{job_id}/metrics", params={"order": "asc"}).json()["data"]
    assert [(row["step"], row["kind"], row["stage"], row["metrics"]["loss"]) for row in rows] == [
        (1, "step", "dpo", 0.5), (2, "step", "dpo", 0.25),
    ]  # fmt: skip
    assert "after" in message(client.get(f"jobs/{job_id}/stream", params={"after": "no"}))


def test_logs_come_in_parts_without_control_characters_or_paths(client, platform, file_id):
    job_id = make_job(client, file_id).json()["id"]
    assert client.get(f"jobs/{job_id}/logs").json() == {"text": "", "next": 0, "has_more": False}
    folder = platform.job_folder(job_id)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(f"\x1b[31mred\x1b[0m {folder}/run\n" + "x" * 2000 + "\nend\n")
    first = client.get(f"jobs/{job_id}/logs", params={"limit": 1024}).json()
    assert first["text"] == f"red {job_id}/run\n"
    rest = client.get(f"jobs/{job_id}/logs", params={"after": first["next"]}).json()
    assert (rest["text"], rest["has_more"]) == ("x" * 2000 + "\nend\n", False)


@pytest.fixture
def tuned(client, platform, project, file_id):
    """A model of a job, without training: its folder is made by the test that needs one."""
    job = make_job(client, file_id).json()
    platform.store.change(File, file_id, {"report": {"annotators": ["ann", "bo"]}})
    base = platform.store.page(ModelVersion, _query(form="base")).items[0]
    record = ModelVersion(
        id=new_id("ml_"), project=project, name="tuned/one", version=1, form="adapter", base=base.id, parent=base.id,
        job=job["id"], datasets=(file_id,), run="/somewhere/else",
    )  # fmt: skip
    return platform.store.insert(record)


def _query(**where):
    from preftune.store.base import Query

    return Query(None, where)


def test_models_and_where_they_come_from(client, tuned, file_id):
    assert [one["name"] for one in client.get("models/base").json()["data"]] == ["starter"]
    assert [one["id"] for one in client.get("models").json()["data"]] == [tuned.id]
    by_name = client.get("models/tuned%2Fone").json()
    assert by_name == client.get(f"models/{tuned.id}").json()
    assert "somewhere" not in json.dumps(by_name)
    assert [one["version"] for one in client.get("models/tuned%2Fone/versions").json()["data"]] == [1]
    found = client.get(f"models/{tuned.id}/lineage").json()
    assert [one["name"] for one in found["parents"]] == ["starter"]
    assert [one["id"] for one in found["jobs"]] == [tuned.job]
    assert [(one["id"], one["annotators"]) for one in found["files"]] == [(file_id, ["ann", "bo"])]
    assert client.get("models/starter/download").status_code == 403
    waiting = client.get(f"models/{tuned.id}/download", params={"wait": 0, "form": "adapter"})
    assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "2")
    assert client.delete("models/starter").status_code == 403
    assert client.delete(f"models/{tuned.id}").json()["deleted"]


def test_an_alias_keeps_its_history(client, tuned):
    assert "a model is named" in message(client.put("aliases/starter", json={"model": tuned.id}))
    client.put("aliases/production", json={"model": "starter", "reason": "first"})
    moved = client.put("aliases/production", json={"model": tuned.id, "reason": "better"}).json()
    assert (moved["model"], moved["model_name"]) == (tuned.id, "tuned/one")
    client.put("aliases/production", json={"model": tuned.id, "reason": "again"})
    assert client.delete("aliases/production").status_code == 200
    assert client.get("aliases/production").status_code == 404
    history = client.get("aliases/production/history", params={"order": "asc"}).json()["data"]
    assert [one["data"]["reason"] for one in history] == ["first", "better", ""]
    assert history[1]["data"]["to"] == tuned.id


def test_webhooks(client):
    made = client.post("webhooks", json={"url": "https://example.org/x", "events": ["fine_tuning.job.failed"]}).json()
    assert made["secret"].startswith("whsec_")
    listed = client.get("webhooks").json()["data"]
    assert [one["id"] for one in listed] == [made["id"]]
    assert "secret" not in listed[0]
    assert "write http" in message(client.post("webhooks", json={"url": "file:///etc/passwd"}))
    assert client.delete(f"webhooks/{made['id']}").json()["deleted"]
    assert client.delete(f"webhooks/{made['id']}").status_code == 404


def test_keys_and_projects(client):
    assert client.post("projects", json={"name": "team"}).status_code == 201
    assert client.post("projects", json={"name": "team"}).status_code == 409
    made = client.post("keys", json={"name": "bot", "project": "team"}).json()
    theirs = {"Authorization": f"Bearer {made['value']}"}
    assert client.get("me", headers=theirs).json()["project_name"] == "team"
    assert [one["name"] for one in client.get("projects", headers=theirs).json()["data"]] == ["team"]
    assert {one["name"] for one in client.get("projects").json()["data"]} == {"default", "other", "team"}
    own = client.post("keys", json={"name": "here", "role": "annotator"}).json()
    listed = client.get("keys").json()["data"]
    assert own["id"] in [one["id"] for one in listed]
    assert made["id"] not in [one["id"] for one in listed], "another project's keys are its own"
    assert own["value"] not in json.dumps(listed)
    assert client.delete(f"keys/{own['id']}").json()["revoked_at"]
    assert client.get("me", headers={"Authorization": f"Bearer {own['value']}"}).status_code == 401
    mine = client.get("me").json()["key"]
    assert client.delete(f"keys/{mine}").status_code == 409
    assert client.post("projects", json={"name": "x"}, headers=client.values["other"]).status_code == 403
    assert client.post("keys", json={"name": "x", "project": "default"}, headers=client.values["other"]).status_code == 403
    actions = [one["action"] for one in client.get("audit").json()["data"]]
    assert actions == ["key.revoke", "key.create", "key.create", "project.create"]


WRITES = [
    ("POST", "files?filename=a.jsonl", None), ("POST", "jobs", {"model": "starter", "files": ["FILE"]}),
    ("POST", "jobs/JOB/cancel", None), ("POST", "jobs/JOB/retry", {"reason": "x"}),
    ("POST", "jobs/JOB/priority", {"priority": 1}),
    ("DELETE", "jobs/JOB", None), ("DELETE", "files/FILE", None), ("DELETE", "models/MODEL", None),
    ("GET", "models/MODEL/download", None), ("PUT", "aliases/a", {"model": "starter"}), ("DELETE", "aliases/a", None),
    ("POST", "webhooks", {"url": "https://e.org"}), ("DELETE", "webhooks/we_1", None), ("POST", "keys", {"name": "a"}),
    ("DELETE", "keys/key_1", None), ("POST", "projects", {"name": "a"}), ("GET", "keys", None), ("GET", "audit", None),
    ("GET", "jobs/JOB/logs", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), WRITES, ids=lambda one: one if isinstance(one, str) else "")
def test_an_annotator_changes_nothing(client, tuned, file_id, method, path, body):
    path = path.replace("FILE", file_id).replace("JOB", tuned.job).replace("MODEL", tuned.id)
    body = None if body is None else json.loads(json.dumps(body).replace("FILE", file_id))
    content = ROWS if "filename" in path else None
    answer = client.request(method, path, json=body, content=content, headers=client.values["annotator"])
    assert answer.status_code == 403, answer.text
    assert "role" in message(answer)


READS = ["files/FILE", "files/FILE/content", "files/FILE/report", "jobs/JOB", "jobs/JOB/events", "jobs/JOB/metrics",
         "jobs/JOB/stream", "jobs/JOB/logs", "models/MODEL", "models/MODEL/lineage", "models/MODEL/versions",
         "aliases/mine", "aliases/mine/history"]  # fmt: skip


@pytest.mark.parametrize("path", READS)
def test_another_project_sees_nothing(client, tuned, file_id, path):
    client.put("aliases/mine", json={"model": tuned.id})
    path = path.replace("FILE", file_id).replace("JOB", tuned.job).replace("MODEL", tuned.id)
    answer = client.get(path, headers=client.values["other"])
    assert answer.status_code == 404, answer.text
    assert "check the id" in message(answer)


def test_another_project_lists_nothing(client, tuned):
    for kind in ("files", "jobs", "models", "aliases", "webhooks", "audit"):
        assert client.get(kind, headers=client.values["other"]).json()["data"] == [], kind


def test_health_and_the_document(client):
    assert client.get("health").json()["status"] == "ok"
    document = client.get("openapi.json").json()
    assert {"/api/v1/files", "/api/v1/jobs/{job_id}/stream", "/api/v1/models/{name}/lineage"} <= set(document["paths"])
    assert all("422" not in operation["responses"] for path in document["paths"].values() for operation in path.values())
