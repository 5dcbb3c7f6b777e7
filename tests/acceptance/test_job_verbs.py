"""The verbs of jobs on the installation of this machine."""

import json

import pytest
from click.testing import CliRunner

from preftune.app.jobs.platform import Platform, event
from preftune.cli.main import cli
from preftune.store.records import Job

STAGE = {"method": "dpo", "loss": {"beta": 0.2}, "adapter": "lora", "epochs": 1, "max_steps": None}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("PREFTUNE_DATABASE", "PREFTUNE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    with Platform.open() as platform:
        project = platform.project("default").id
        job = Job(
            id="ft-1", project=project, work="train", status="queued", model="starter", name="mine", recipe={"stages": [STAGE]}
        )
        platform.store.insert(job, [event("ft-1", project, "created", "made\x1b[31m here")])
        folder = platform.job_folder("ft-1")
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("the process spoke\n")

    def call(*arguments):
        done = CliRunner().invoke(cli, arguments, standalone_mode=False)
        return done.stdout, done.exception

    return call


def test_a_job_is_seen_paused_resumed_and_cancelled(run):
    assert "ft-1  queued  train  starter  mine" in run("ls", "jobs")[0]
    assert "beta 0.2" in run("show", "ft-1")[0]
    assert json.loads(run("show", "ft-1", "--json")[0])["name"] == "mine"
    assert "paused" in run("pause", "ft-1")[0]
    assert "queued" in run("resume", "ft-1")[0]
    assert json.loads(run("cancel", "ft-1", "--json")[0])["status"] == "cancelled"
    said = run("logs", "ft-1", "--follow")[0]
    assert "the job was cancelled" in said
    assert "\x1b" not in said
    assert run("logs", "ft-1", "--process")[0] == "the process spoke\n"
    assert "nothing to cancel" in str(run("cancel", "ft-1")[1])
    assert "ls jobs" in str(run("show", "ft-none")[1])
