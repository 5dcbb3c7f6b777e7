"""A server as a user starts it: a process of its own on a free port, with its worker, a key and the starter model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "src" / "preftune" / "starter"
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
KEY = "test-key-0123456789abcdef"


class Served:
    """Where a server listens and who may ask it."""

    def __init__(self, url, home):
        self.url, self.home, self.key = url, home, KEY

    def send(self, path, method, data, headers=None):
        """(status, JSON, headers) of a request with a body of bytes."""
        request = urllib.request.Request(self.url + path, data, method=method)
        for name, value in {"Authorization": f"Bearer {self.key}", **(headers or {})}.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)

    def ask(self, path, method="GET", body=None, key=KEY, headers=None):
        """(status, JSON, headers) of a request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read()), dict(error.headers)

    def ended(self, job_id, seconds=180):
        """A job once it has succeeded or failed, as the native API shows it."""
        until = time.monotonic() + seconds
        while True:
            _, job, _ = self.ask(f"/api/v1/jobs/{job_id}")
            if job["status"] in {"succeeded", "failed"}:
                return job
            assert time.monotonic() < until, job
            time.sleep(0.3)


def serve(home, *options, database=None):
    """A server until the generator goes on. database: its URL; None: SQLite in ``home``."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PREFTUNE_")}
    environment = {
        **keep, "PREFTUNE_HOME": str(home / "state"), "PREFTUNE_CACHE": str(home / "cache"), "PREFTUNE_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1", **({} if database is None else {"PREFTUNE_DATABASE": database}),
    }  # fmt: skip
    with (home / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "preftune", "serve", "--port", "0", *options],
            env=environment,
            cwd=home,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"listening on (http://\S+)", (home / "log.txt").read_text())):
            assert process.poll() is None, (home / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Served(found.group(1), home)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in {0, -signal.SIGTERM}, (home / "log.txt").read_text()


@pytest.fixture(scope="module")
def database():
    """The URL of the server's database; None: SQLite in its own folder. A module may say another."""
    return


@pytest.fixture(scope="module")
def served(tmp_path_factory, database):
    yield from serve(tmp_path_factory.mktemp("served"), database=database)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts further servers, with options of their own."""
    with ExitStack() as running:

        def call(name, *options):
            return running.enter_context(contextmanager(serve)(tmp_path_factory.mktemp(name), *options))

        yield call


@pytest.fixture
def reaching(tmp_path_factory):
    """A server whose operator lets users' URLs reach this machine."""
    yield from serve(tmp_path_factory.mktemp("reaching"), "--allow-url", "127.0.0.1")


@pytest.fixture
def starter_rows(tmp_path):
    """Some rows of one of the starter's files, as a file of their own."""

    def call(name, count, skip=0):
        path = tmp_path / (f"more-{name}" if skip else name)
        path.write_bytes(b"".join((STARTER / name).read_bytes().splitlines(keepends=True)[skip : skip + count]))
        return path

    return call


@pytest.fixture
def other_key(served):
    """A key of another project of the same server."""
    code = (
        "from preftune.app.jobs.platform import Platform; from preftune.app.jobs.keys import add_key; "
        "platform = Platform.open(); print(add_key(platform, platform.project('other').id, 'other')[1])"
    )
    environment = {**os.environ, "PREFTUNE_HOME": str(served.home / "state"), "PREFTUNE_CACHE": str(served.home / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment_of(served):
    """What the vendors' packages read."""
    environment = {
        **os.environ, "OPENAI_API_KEY": served.key, "OPENAI_BASE_URL": served.url + "/v1", "TOGETHER_API_KEY": served.key,
        "TOGETHER_BASE_URL": served.url, "SEEKR_API_KEY": served.key, "SEEKR_BASE_URL": served.url,
        "TOGETHER_TELEMETRY_DISABLED": "1", "TOGETHER_DISABLE_VERSION_CHECK": "1", "HOME": str(served.home), "COLUMNS": "200",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    return environment


@pytest.fixture
def command(served):
    """Runs Together's command line."""
    if not CLIENTS.exists():
        pytest.skip("the clients' environment is not there (bench/environments/make.sh clients)")

    def call(*arguments):
        done = subprocess.run(
            [CLIENTS.with_name("together"), *map(str, arguments)], env=environment_of(served), capture_output=True, text=True,
            timeout=200, check=False, stdin=subprocess.DEVNULL, cwd=served.home,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    return call


@pytest.fixture
def client(served):
    """Runs a script with the vendors' own packages, which live in an environment of their own."""
    if not CLIENTS.exists():
        pytest.skip("the clients' environment is not there (bench/environments/make.sh clients)")

    def call(name, *arguments):
        environment = environment_of(served)
        script = Path(__file__).with_name("clients") / name
        done = subprocess.run(
            [CLIENTS, script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=1000, check=False
        )
        assert done.returncode == 0, (
            f"{done.stdout[-3000:]}\n{done.stderr[-4000:]}\n{(served.home / 'log.txt').read_text()[-2000:]}"
        )
        return json.loads(done.stdout.splitlines()[-1])

    return call
