"""doctor: every fact of the machine, and a problem where something would stop a run."""

from types import SimpleNamespace

import pytest

from preftune.app import doctor
from preftune.app.context import Context


@pytest.fixture
def look(tmp_path):
    place = Context(tmp_path / "cache", tmp_path / "state")

    def go(output=None, **options):
        return {one.name: one for one in doctor.diagnose(output or tmp_path / "runs", place, **options).checks}

    return go


def test_this_machine_can_train(look, tmp_path):
    found = look()
    assert {"python", "packages", "processor", "allocator", "gpu", "memory", "system", "starter", "runs", "cache"} <= set(found)
    assert not [one for one in found.values() if one.level == "problem"]
    assert "hub" not in found, "nothing leaves the machine unasked"
    assert not (tmp_path / "runs").exists(), "looking makes no folders"


def test_a_folder_that_cannot_be_written(look, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = look(blocked / "runs")
    assert found["runs"].level == "problem"


def test_a_full_disk(look, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    assert look()["cache"].level == "problem"


def test_a_missing_package(look, monkeypatch):
    real = doctor.version

    def without_peft(name):
        if name == "peft":
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", without_peft)
    assert (look()["peft"].level, look()["peft"].way_out != "") == ("problem", True)


def test_an_old_python(look, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_PYTHON", (99, 0))
    assert look()["python"].level == "problem"


def test_what_is_unsupported_elsewhere_is_a_note(look, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert (look()["system"].level, "Linux only" in look()["system"].detail) == ("note", True)


def test_the_hub_is_asked_only_where_wanted(look, monkeypatch):
    import http.server
    import threading

    from huggingface_hub import constants

    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert look(asks_hub=True)["hub"].level == "ok"
        assert asked
    finally:
        server.shutdown()
        server.server_close()
    assert look(asks_hub=True)["hub"].level == "note", "nobody answers there any more"
