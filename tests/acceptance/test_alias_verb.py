"""``preftune alias`` on the installation of this machine; on a server: tests/integration/server/test_remote_verbs.py."""

import json

import pytest
from click.testing import CliRunner

from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import Platform
from preftune.cli.main import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("PREFTUNE_DATABASE", "PREFTUNE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    with Platform.open() as platform:
        add_base_model(platform, "first", "/models/first")
        add_base_model(platform, "second", "/models/second")

    def call(*arguments):
        done = CliRunner().invoke(cli, ["alias", *arguments], standalone_mode=False)
        return done.stdout, str(done.exception or "")

    return call


def test_an_alias_is_moved_and_remembers(run):
    assert run("list")[0] == ""
    assert run("set", "production", "first")[0] == "production  first\n"
    assert json.loads(run("set", "production", "second", "--reason", "won", "--json")[0])["model_name"] == "second"
    assert "production  second" in run("list")[0]
    assert [one["data"]["reason"] for one in json.loads(run("history", "production", "--json")[0])] == ["won", ""]
    assert "(won)" in run("history", "production")[0]
    run("delete", "production")
    assert json.loads(run("list", "--json")[0]) == []
    assert "was taken away" in run("history", "production")[0]


def test_what_cannot_be_is_one_line(run):
    assert "did you mean 'first'" in run("set", "production", "frist")[1]
    assert "at most 64 letters" in run("set", "a b", "first")[1]
    assert "a model is named 'first'" in run("set", "first", "second")[1]
    assert "there is no alias 'x'" in run("delete", "x")[1]
    assert "there is no alias 'x'" in run("history", "x")[1]
