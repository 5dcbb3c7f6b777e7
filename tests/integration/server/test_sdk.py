"""``preftune.Client`` and ``AsyncClient`` against a server as a user starts it, and ``preftune --server``."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import preftune
from preftune.core.errors import InputError, UsageError
from preftune.sdk import AsyncClient, BadRequest, Client, ConnectionFailed, NotFound, RateLimited, Retries
from preftune.sdk.methods import AsyncPart, Part

KEY = "test-key-0123456789abcdef"
STEPS = {"max_steps": 2, "pairs_per_step": 4, "checkpoints": 0, "probe": "off"}


@pytest.mark.slow
def test_a_model_from_upload_to_answer(served, starter_rows, tmp_path):
    told = []
    with preftune.Client(served.url + "/v1/", KEY) as client:
        assert client.access.me().role == "admin"
        file = client.files.upload(starter_rows("pairs.jsonl", 16), progress=lambda sent, size: told.append((sent, size)))
        assert told[-1] == (file.bytes, file.bytes)
        assert b"".join(client.files.content(file.id)) == (tmp_path / "pairs.jsonl").read_bytes()
        job = client.jobs.create(model="starter", files=file.id, method="dpo", beta=0.3, suffix="sdk", **STEPS)
        assert job.recipe["stages"][0]["loss"] == {"beta": 0.3}
        events = []
        done = client.jobs.wait(job.id, on_event=events.append)
        assert done.is_ended
        assert (done.status, done.progress.step) == ("succeeded", 2)
        assert [event.type for event in events][:2] == ["created", "queued"]
        assert events[-1].type == "succeeded"
        assert [row.step for row in client.jobs.metrics(job.id) if row.kind == "step"] == [1, 2]
        assert [event.id for event in client.jobs.events(job.id, follow=False)] == [event.id for event in events]
        assert client.files.report(file.id).num_rows == 16
        model = client.models.get(job.name)
        assert (model.form, model.job) == ("adapter", job.id)
        assert [parent.name for parent in client.models.lineage(job.name).parents] == ["starter"]
        client.aliases.set("sdk-best", job.name)
        answer = client.chat("sdk-best", "Tell me a story.", max_tokens=8, temperature=0)
        assert answer.text
        pieces = list(client.chat_stream(job.name, "Tell me a story.", max_tokens=8, temperature=0))
        assert "".join(pieces) == answer.text
        packed = client.models.download(job.name, tmp_path / "adapter.tar.gz", form="adapter")
        with tarfile.open(packed) as tar:
            assert "adapter_model.safetensors" in tar.getnames()
        assert [one.id for one in client.jobs.list(name=job.name)] == [job.id]


@pytest.mark.slow
def test_the_same_awaited(served, starter_rows):
    async def flow():
        async with preftune.AsyncClient(served.url, KEY) as client:
            file = await client.files.upload(starter_rows("pairs.jsonl", 12))
            job = await client.jobs.create(model="starter", files=[file.id], method="sft", **STEPS)
            types = [event.type async for event in client.jobs.events(job.id)]
            done = await client.jobs.wait(job.id)
            answer = await client.chat(job.name, "Hi", max_tokens=4, temperature=0)
            pieces = [piece async for piece in client.chat_stream(job.name, "Hi", max_tokens=4, temperature=0)]
            models = [model.name async for model in client.models.list(limit=1)]
            return types, done, answer, pieces, models, job.name

    types, done, answer, pieces, models, name = asyncio.run(flow())
    assert (types[-1], done.status) == ("succeeded", "succeeded")
    assert "".join(pieces) == answer.text
    assert name in models


@pytest.mark.slow
def test_the_command_line_on_a_server(served, starter_rows, tmp_path):
    starter_rows("pairs.jsonl", 12)
    (tmp_path / "mine.yaml").write_text("model: starter\ndata: pairs.jsonl\nmethod: ipo\nmax_steps: 2\nprobe: off\n")
    environment = {**os.environ, "PREFTUNE_SERVER": served.url, "PREFTUNE_API_KEY": KEY, "PREFTUNE_HOME": str(tmp_path / "none")}

    def run(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "preftune", *arguments], env=environment, capture_output=True, text=True, cwd=tmp_path,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    job = json.loads(run("train", "mine.yaml", "pairs_per_step=4", "--json"))
    assert (job["status"], job["recipe"]["stages"][0]["pairs_per_step"]) == ("succeeded", 4)
    assert job["name"].startswith("starter-mine-")
    assert job["id"] in run("ls", "jobs")
    assert job["name"] in run("ls", "models")
    assert "pairs.jsonl" in run("ls", "files")
    assert "ipo" in run("show", job["id"])
    assert "is ready" in run("logs", job["id"], "--follow")
    assert "nothing to cancel" in run("cancel", job["id"], code=1)
    assert "works on this machine" in run("--server", served.url, "doctor", code=2)
    assert not (tmp_path / "none").exists(), "nothing was done on this machine"


def test_both_clients_have_the_same_words():
    with Client("http://127.0.0.1:9", KEY) as waits:
        awaited = AsyncClient("http://127.0.0.1:9", KEY)
        nouns = [name for name, one in vars(waits).items() if isinstance(one, Part)]
        assert nouns == [name for name, one in vars(awaited).items() if isinstance(one, AsyncPart)]
        assert len(nouns) == 11
        for name in nouns:
            ours, theirs = getattr(waits, name), getattr(awaited, name)
            words = {word for word in dir(ours) if not word.startswith("_")}
            assert words == {word for word in dir(theirs) if not word.startswith("_")}
            for word in words:
                one, other = getattr(ours, word), getattr(theirs, word)
                assert inspect.signature(one).parameters == inspect.signature(other).parameters, f"{name}.{word}"
                assert one.__doc__ == other.__doc__
                assert one.__doc__
    assert {one for one in vars(Client) if not one.startswith("_")} == {
        one for one in vars(AsyncClient) if not one.startswith("_")
    }


def test_the_clients_are_imported_only_when_named():
    code = (
        "import sys, preftune; print([one for one in ('torch', 'httpx2', 'preftune.sdk') if one in sys.modules]); preftune.Client"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def flaky():
    """A server that answers as it is told, one answer a request, the last one for ever; and what it was asked."""
    script, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(dict(self.headers))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = script.pop(0) if len(script) > 1 else script[0]
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_DELETE = do_POST

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with Client(f"http://127.0.0.1:{server.server_port}", KEY, retries=Retries(times=2, first_s=0.01)) as client:
        yield client, script, asked
    server.shutdown()
    thread.join()
    server.server_close()


ME = (200, {}, {"key": "k", "role": "admin", "project": "p", "project_name": "default"})
JOB = {"id": "ft-1", "work": "train", "status": "queued", "dialect": "native", "model": "m", "name": "n", "files": [],
       "metadata": {}, "priority": 0, "attempts": 0, "asked": "", "progress": {}, "error": None, "result": {}, "recipe": {},
       "created_at": "2026-01-01T00:00:00Z", "started_at": None, "finished_at": None, "new_field": 1}  # fmt: skip
BUSY = (429, {"Retry-After": "0.01"}, {"error": {"message": "later", "type": "rate_limit_error", "param": None, "code": None}})
DOWN = (500, {}, {"error": {"message": "broken", "type": "server_error", "param": None, "code": None}})


def test_a_question_is_asked_again_and_then_given_up(flaky):
    client, script, asked = flaky
    script += [BUSY, DOWN, ME]
    assert client.access.me().key == "k"
    assert len(asked) == 3
    script[:] = [BUSY]
    with pytest.raises(RateLimited, match="later"):
        client.access.me()
    assert len(asked) == 6


def test_a_job_is_created_again_under_the_same_key(flaky):
    client, script, asked = flaky
    script += [DOWN, (201, {}, JOB)]
    assert client.jobs.create(model="m", files="f").id == "ft-1"
    keys = [one["Idempotency-Key"] for one in asked]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_what_may_have_been_done_is_not_done_twice(flaky):
    client, script, asked = flaky
    script += [DOWN]
    with pytest.raises(preftune.sdk.ServerFailed):
        client.keys.add("x")
    assert len(asked) == 1


def test_the_server_may_forbid_a_retry(flaky):
    client, script, asked = flaky
    script += [(503, {"x-should-retry": "false"}, DOWN[2])]
    with pytest.raises(preftune.sdk.ServerFailed):
        client.access.me()
    assert len(asked) == 1


def test_an_answer_of_something_else_says_so(flaky):
    client, script, _ = flaky
    script += [(200, {}, {"hello": "world"})]
    with pytest.raises(preftune.sdk.ApiError, match="did not answer as a preftune server"):
        client.access.me()
    script[:] = [(404, {}, "not here")]
    with pytest.raises(NotFound, match="check that the address"):
        client.access.me()


def test_clear_errors_before_anything_is_sent(monkeypatch, tmp_path):
    monkeypatch.delenv("PREFTUNE_API_KEY", raising=False)
    with pytest.raises(UsageError, match="PREFTUNE_API_KEY"):
        Client("http://localhost")
    with pytest.raises(UsageError, match="http://HOST"):
        Client("ftp://x", KEY)
    with Client("http://127.0.0.1:9", KEY, retries=Retries(times=0)) as client:
        with pytest.raises(ConnectionFailed, match="is the server running"):
            client.access.me()
        with pytest.raises(InputError, match="no such file"):
            client.files.upload(tmp_path / "none.jsonl")
    assert issubclass(BadRequest, preftune.sdk.ApiError)
