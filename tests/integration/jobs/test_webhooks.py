"""Webhooks against a real receiver on loopback; signatures are checked by the vendor's own package."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from preftune.app.jobs import vault, webhooks
from preftune.app.jobs.platform import event
from preftune.core.errors import UsageError
from preftune.store.base import Query
from preftune.store.records import Event, Job, Secret, Webhook, new_id

CLIENTS = Path(__file__).resolve().parents[3] / ".venv-clients" / "bin" / "python"


@pytest.fixture
def receiver(monkeypatch):
    """A server that answers with the statuses it is given, 200 behind them; what it got, in order."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            server.got.append(({key.lower(): value for key, value in self.headers.items()}, body))
            status = server.statuses.pop(0) if server.statuses else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{server.server_address[1]}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.statuses = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PREFTUNE_ALLOW_URLS", f"127.0.0.1:{server.server_address[1]}")
    server.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def end_job(platform, project, state="succeeded"):
    job = Job(id=new_id("ft-"), project=project, work="train", status=state)
    platform.store.insert(job, [event(job.id, project, state, "done")])
    return job


def test_the_vendors_package_accepts_what_is_delivered(platform, project, receiver):
    if not CLIENTS.is_file():
        pytest.skip("the vendors' environment is absent: make clients")
    end_job(platform, project)  # before the webhook: not told
    _, secret = webhooks.add(platform, project, receiver.url)
    jobs = [end_job(platform, project, state) for state in ("succeeded", "failed", "cancelled")]
    assert webhooks.Deliverer(platform).tick() == 3
    code = (
        "import json, sys, openai\n"
        "secret, got = json.load(sys.stdin)\n"
        "client = openai.OpenAI(api_key='none')\n"
        "for headers, body in got:\n"
        "    event = client.webhooks.unwrap(body, headers, secret=secret)\n"
        "    print(event.type, event.data.id)\n"
        "bad = dict(got[0][0], **{'webhook-id': 'evt_other'})\n"
        "try:\n"
        "    client.webhooks.unwrap(got[0][1], bad, secret=secret)\n"
        "except openai.InvalidWebhookSignatureError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run(
        [CLIENTS, "-c", code], input=json.dumps([secret, receiver.got]), capture_output=True, text=True, check=False
    )
    expected = [f"fine_tuning.job.{job.status} {job.id}" for job in jobs]
    assert done.stdout.splitlines() == [*expected, "refused"], done.stderr


def test_a_failed_delivery_is_tried_again_in_order_under_the_same_id(platform, project, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "WAITS_S", (0.0, 0.0, 0.0))
    webhooks.add(platform, project, receiver.url)
    first, second = end_job(platform, project), end_job(platform, project)
    receiver.statuses = [500, 302]
    teller = webhooks.Deliverer(platform)
    assert [teller.tick(), teller.tick()] == [0, 0]
    assert webhooks.Deliverer(platform).tick() == 2  # a new process goes on at the same place
    told = [json.loads(body)["data"]["id"] for _, body in receiver.got]
    assert told == [first.id] * 3 + [second.id]
    assert len({headers["webhook-id"] for headers, _ in receiver.got[:3]}) == 1


def test_an_event_that_nobody_takes_is_given_up_with_a_word(platform, project, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "WAITS_S", (0.0,))
    hook, _ = webhooks.add(platform, project, receiver.url)
    end_job(platform, project)
    receiver.statuses = [503, 503]
    teller = webhooks.Deliverer(platform)
    teller.tick()
    teller.tick()
    said = platform.store.page(Event, Query(project, {"subject": hook.id})).items
    assert [one.type for one in said] == ["webhook_given_up"]
    assert "503" in said[0].message


def test_gone_ends_a_webhook_and_a_removed_one_is_told_nothing(platform, project, receiver):
    hook, _ = webhooks.add(platform, project, receiver.url)
    end_job(platform, project)
    receiver.statuses = [410]
    teller = webhooks.Deliverer(platform)
    teller.tick()
    assert platform.store.get(Webhook, hook.id) is None
    end_job(platform, project)
    teller.tick()
    assert len(receiver.got) == 1
    with pytest.raises(UsageError, match="there is no webhook"):
        webhooks.remove(platform, project, hook.id)


def test_an_address_off_the_list_is_never_reached(platform, project, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "WAITS_S", (0.0, 0.0))
    webhooks.add(platform, project, receiver.url)
    end_job(platform, project)
    monkeypatch.setenv("PREFTUNE_ALLOW_URLS", "public")
    webhooks.Deliverer(platform).tick()
    assert receiver.got == []


@pytest.mark.parametrize("url", ["ftp://x/y", "file:///etc/passwd", "http://", "http://user:word@host/", "nonsense"])
def test_no_url_is_refused(platform, project, url):
    with pytest.raises(UsageError, match="url: write"):
        webhooks.add(platform, project, url)
    with pytest.raises(UsageError, match="events: there is no"):
        webhooks.add(platform, project, "http://host/x", ["job.exploded"])


def test_a_secret_stands_nowhere_in_the_clear(platform, project, monkeypatch):
    kept = vault.keep(platform, project, "wandb", "very-secret-value")
    assert vault.read(platform, kept.id, project) == "very-secret-value"
    for path in platform.home.rglob("*"):
        if path.is_file():
            assert b"very-secret-value" not in path.read_bytes(), path
    assert (platform.home / "secret.key").stat().st_mode & 0o077 == 0
    again = vault.keep(platform, project, "wandb", "another")
    assert again.id == kept.id
    assert platform.store.count(Secret, Query(project)) == 1
    with pytest.raises(vault.SecretUnreadable):
        vault.read(platform, kept.id, "proj_other")
    monkeypatch.setenv("PREFTUNE_SECRET_KEY", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
    with pytest.raises(vault.SecretUnreadable, match="another key"):
        vault.read(platform, kept.id, project)
