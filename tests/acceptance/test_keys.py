"""``preftune keys`` as a user calls it."""

import json

import pytest
from click.testing import CliRunner

from preftune.cli.main import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFTUNE_DATABASE", raising=False)

    def call(*arguments):
        done = CliRunner().invoke(cli, ["keys", *arguments], standalone_mode=False)
        return done, done.stdout

    return call


def test_a_key_is_made_listed_and_revoked(run, tmp_path):
    _, value = run("add", "alice", "--role", "admin", "--project", "team")
    assert value.strip().startswith("pt-")
    database = (tmp_path / "home" / "preftune.db").read_bytes()
    assert value.strip().encode() not in database, "only its hash is kept"
    row = json.loads(run("list", "--json")[1])[0]
    assert (row["name"], row["role"], row["project"], row["revoked_at"]) == ("alice", "admin", "team", None)
    assert value.strip() not in run("list")[1]
    run("revoke", row["id"])
    assert json.loads(run("list", "--json")[1])[0]["revoked_at"] is not None


def test_a_wrong_key_or_project_is_one_clear_line(run):
    assert "keys list" in str(run("revoke", "key_none")[0].exception)
    assert "letters, digits" in str(run("add", "x", "--project", "../a")[0].exception)
    assert "printable" in str(run("add", "a\nb")[0].exception)
