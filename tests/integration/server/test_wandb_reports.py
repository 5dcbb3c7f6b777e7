"""A job's W&B fields: the real package in the job's process, a W&B server on loopback, and a key that is nowhere else."""

import base64
import json
import os
import subprocess
import sys
import time
from datetime import datetime

import pytest

from wandb_server import WandbServer, package_path, silent_server, untrusted_server

KEY = "abcdef0123456789abcdef0123456789abcdef01"
AUTHORIZATION = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()


@pytest.fixture(scope="module")
def wandb():
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def reporting(start, tmp_path_factory, wandb):
    """A server whose jobs have the real wandb package, and which lets users' URLs reach that W&B server's port alone."""
    place = tmp_path_factory.mktemp("wandb")
    packages = package_path(place / "packages")
    if packages is None:
        pytest.skip("the trackers' environment is not there: `make trackers` makes it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages))
        patch.setenv("HOME", str(place))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(place / "netrc"))
        started = start("reporting", "--allow-url", wandb.url.removeprefix("http://"))
    yield started
    assert holding(place, KEY) == []


@pytest.mark.slow
def test_a_w_and_b_server_that_hangs_or_is_not_to_be_trusted_costs_a_job_a_bounded_time(
    start, tmp_path, starter_rows, monkeypatch
):
    packages = package_path(tmp_path / "packages")
    if packages is None:
        pytest.skip("the trackers' environment is not there: `make trackers` makes it")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    server = start("hanging", "--allow-url", "127.0.0.1", "--slots", "3")
    with silent_server() as silent, untrusted_server(tmp_path) as untrusted, WandbServer(silent_at="file_stream") as later:
        file = upload(server, starter_rows)
        urls = [f"http://127.0.0.1:{silent}", f"https://127.0.0.1:{untrusted}", later.url]
        jobs = [
            server.ask("/v1/fine-tunes", "POST", together(file, wandb_key=KEY, wandb_base_url=url, wandb_project_name="p"))[1]
            for url in urls
        ]
        done = [ended(server, job["id"], seconds=900) for job in jobs]
        assert [job["status"] for job in done] == ["succeeded"] * 3
        assert later.of("file_stream"), "it did not hang where it should"
    causes = ("did not end within 30 s", "certificate", "wandb")
    for job, cause in zip(done, causes, strict=True):
        events = events_of(server, job["id"])
        told = [one for one in events if one["type"] == "sink_failed"]
        assert [one["level"] for one in told] == ["warn"]
        assert cause in told[0]["message"]
        assert KEY not in told[0]["message"]
        steps = [one for one in events if one["type"] == "metrics" and "loss" in one["data"]["metrics"]]
        assert len(steps) == 4
        last = max(datetime.fromisoformat(one["created_at"]) for one in steps)
        waited = (datetime.fromisoformat(job["finished_at"]) - last).total_seconds()
        assert waited < 75, f"{cause}: {waited:.0f} s from the last step to the end of the job"


def upload(server, starter_rows):
    rows = starter_rows("pairs.jsonl", 16).read_bytes()
    _, file, _ = server.send("/api/v1/files?filename=pairs.jsonl&purpose=fine-tune", "POST", rows)
    return file["id"]


def together(file, **more):
    return {
        "training_file": file, "model": "starter", "training_method": {"method": "dpo"}, "batch_size": 4, "n_epochs": 1,
        "training_type": {"type": "Lora", "lora_r": 4}, "learning_rate": 1e-4, **more,
    }  # fmt: skip


def ended(server, job_id, seconds=180):
    until = time.monotonic() + seconds
    while True:
        _, job, _ = server.ask(f"/api/v1/jobs/{job_id}")
        if job["status"] in {"succeeded", "failed", "cancelled"}:
            return job
        assert time.monotonic() < until, job
        time.sleep(0.3)


def events_of(server, job_id):
    return server.ask(f"/api/v1/jobs/{job_id}/events?limit=200")[1]["data"]


def holding(home, secret):
    """Files below a folder that hold a text, its base64 form included."""
    forms = [secret.encode(), AUTHORIZATION.removeprefix("Basic ").encode()]
    return [
        path for path in home.rglob("*")
        if path.is_file() and not path.is_symlink() and any(form in path.read_bytes() for form in forms)
    ]  # fmt: skip


def test_a_job_reports_to_the_users_server_and_the_key_is_nowhere(reporting, wandb, starter_rows, tmp_path):
    file = upload(reporting, starter_rows)
    body = together(
        file, wandb_key=KEY, wandb_base_url=wandb.url, wandb_project_name="mine", wandb_name="first try", wandb_entity="team"
    )
    status, made, _ = reporting.ask("/v1/fine-tunes", "POST", body)
    assert status == 200, made
    job = ended(reporting, made["id"])
    events = events_of(reporting, made["id"])
    assert job["status"] == "succeeded", job
    assert [one for one in events if one["level"] == "warn"] == []
    losses = [one["data"]["metrics"]["loss"] for one in events if one["type"] == "metrics" and "loss" in one["data"]["metrics"]]
    told = [row["train/loss"] for row in wandb.history() if "train/loss" in row]
    assert len(told) == 4
    assert sorted(told) == pytest.approx(sorted(losses))
    opened = wandb.of("UpsertBucket")[0]["variables"]
    assert (opened["name"], opened["displayName"], opened["project"], opened["entity"]) == (
        made["id"], "first try", "mine", "team"
    )  # fmt: skip
    signed = {authorization for name, _, authorization in wandb.calls if "/sdk/otel" not in name and "/put/" not in name}
    assert signed == {AUTHORIZATION}
    # what W&B is told names no folder and no host of this machine; what this server keeps and shows holds no key
    sent = json.dumps([str(body) for _, body, _ in wandb.calls])
    assert str(reporting.home) not in sent
    assert os.uname().nodename not in sent
    assert holding(reporting.home, KEY) == []
    _, echo, _ = reporting.ask(f"/v1/fine-tunes/{made['id']}")
    assert echo["wandb_project_name"] == "mine"
    assert KEY not in json.dumps([made, job, echo, events])
    saved = tmp_path / "saved.tar"
    environment = {**os.environ, "PREFTUNE_HOME": str(reporting.home / "state"), "PREFTUNE_CACHE": str(reporting.home / "cache")}
    subprocess.run([sys.executable, "-m", "preftune", "backup", str(saved)], env=environment, check=True, capture_output=True)
    assert holding(tmp_path, KEY) == []
    assert saved.stat().st_size > 10_000


def test_a_native_job_reports_with_tags(reporting, wandb, starter_rows):
    file = upload(reporting, starter_rows)
    before = len(wandb.of("UpsertBucket"))
    body = {
        "model": "starter", "files": [file], "method": "dpo", "options": {"adapter": "lora", "max_steps": 2, "pairs_per_step": 4},
        "wandb": {"project": "native", "tags": ["a", "b"], "api_key": KEY, "base_url": wandb.url},
    }  # fmt: skip
    status, made, _ = reporting.ask("/api/v1/jobs", "POST", body)
    assert status == 201, made
    assert made["recipe"]["tracking"][0]["options"]["tags"] == ["a", "b"]
    job = ended(reporting, made["id"])
    assert job["status"] == "succeeded", job["error"]
    opened = wandb.of("UpsertBucket")[before]["variables"]
    assert (opened["project"], opened["tags"]) == ("native", ["a", "b"])
    assert holding(reporting.home, KEY) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"wandb_base_url": "http://127.0.0.1:9"}, "is not on this server's list of allowed addresses"),
        ({"wandb_base_url": "http://169.254.169.254/latest"}, "is not on this server's list of allowed addresses"),
        ({"wandb_base_url": "file:///etc/passwd"}, "write https://HOST"),
        ({"wandb_base_url": "http://me:pass@127.0.0.1:1/"}, "without a user name"),
        ({"wandb_base_url": "https://api.wandb.ai", "wandb_key": ""}, "needs the key that belongs to it"),
        ({"wandb_key": "two words"}, "the W&B key holds blanks"),
        ({"wandb_project_name": "a/b"}, "the W&B project needs"),
    ],
)
def test_what_is_refused_names_no_key_and_leaves_no_job(reporting, starter_rows, fields, words):
    file = upload(reporting, starter_rows)
    before = reporting.ask("/v1/fine-tunes")[1]["data"]
    given = together(file, **{"wandb_key": KEY, "wandb_project_name": "mine", **fields})
    status, answer, _ = reporting.ask("/v1/fine-tunes", "POST", given)
    assert status == 400
    assert words in answer["error"]["message"]
    assert KEY not in json.dumps(answer)
    assert "two words" not in json.dumps(answer)
    assert reporting.ask("/v1/fine-tunes")[1]["data"] == before


def test_without_a_key_the_job_says_that_it_reports_nowhere(reporting, starter_rows):
    file = upload(reporting, starter_rows)
    body = {
        "model": "starter", "training_file": file, "integrations": [{"type": "wandb", "wandb": {"project": "mine"}}],
        "preftune": {"max_steps": 2}, "method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 4}}},
    }  # fmt: skip
    status, made, _ = reporting.ask("/v1/fine_tuning/jobs", "POST", body)
    assert status == 200, made
    first = [one["message"] for one in events_of(reporting, made["id"]) if one["type"] == "warning"]
    assert len(first) == 1
    assert "no W&B key was sent, and the server has none of its own" in first[0]
    job = ended(reporting, made["id"])
    assert job["status"] == "succeeded", job["error"]
    assert "tracking_unavailable" in {one["type"] for one in events_of(reporting, made["id"])}


def test_without_the_package_the_job_trains_and_says_so_at_once(served, starter_rows):
    file = upload(served, starter_rows)
    body = together(file, wandb_key=KEY, wandb_project_name="mine", preftune={"max_steps": 2})
    status, made, _ = served.ask("/v1/fine-tunes", "POST", body)
    assert status == 200, made
    first = [one["message"] for one in events_of(served, made["id"]) if one["type"] == "warning"]
    assert len(first) == 1
    assert "the package wandb is not installed on this server" in first[0]
    job = ended(served, made["id"])
    assert job["status"] == "succeeded", job["error"]
    assert "tracking_unavailable" in {one["type"] for one in events_of(served, made["id"])}
    assert holding(served.home, KEY) == []


def test_a_w_and_b_server_that_answers_with_other_addresses_reaches_none_of_them(reporting, wandb, starter_rows, monkeypatch):
    with WandbServer() as inner:  # on this machine, but on a port that the operator did not allow
        real = wandb.answer

        def answer(name, variables):
            said = real(name, variables)
            for one in said.get("createRunFiles", {}).get("files", ()):
                one["uploadUrl"] = f"{inner.url}/secret-place"
            return said

        monkeypatch.setattr(wandb, "answer", answer)
        file = upload(reporting, starter_rows)
        asked = len(wandb.of("CreateRunFiles"))
        body = together(file, wandb_key=KEY, wandb_base_url=wandb.url, wandb_project_name="mine", preftune={"max_steps": 2})
        status, made, _ = reporting.ask("/v1/fine-tunes", "POST", body)
        assert status == 200, made
        job = ended(reporting, made["id"])
        assert job["status"] == "succeeded", job["error"]
        assert len(wandb.of("CreateRunFiles")) > asked, "the upload was asked for"
        assert inner.calls == []
