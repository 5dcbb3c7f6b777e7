"""A call of the command line that is forked from a loaded process is to its caller what the installed script is."""

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from preftune.app.runs import RUN_FILE

pytestmark = pytest.mark.skipif(
    os.environ.get("OMP_NUM_THREADS") != "1" or Path("/dev/nvidiactl").exists(),
    reason="every start is an ordinary one where libraries run several threads (OMP_NUM_THREADS is not 1) or a GPU is there",
)


def forking():
    """The process that this one's calls are forked from."""
    (process,) = [one for one in psutil.Process().children() if any("warm_start.py" in word for word in one.cmdline())]
    return process


@pytest.fixture
def forked(preftune):
    """Runs a verb twice: the first time may be an ordinary start."""

    def call(*arguments, **options):
        preftune(*arguments, **options)
        before = sum(forking().cpu_times()[2:4])
        done = preftune(*arguments, **options)
        assert sum(forking().cpu_times()[2:4]) > before, "it was no child of the process that forks"
        return done

    return call


@pytest.mark.parametrize(
    ("words", "code"), [("ls losses --json", 0), ("plan gone.yaml", 1), ("plan gone.yaml --json", 1), ("plan", 2), ("chekc", 2)]
)
def test_exit_code_and_output_are_those_of_the_installed_script(forked, cold_preftune, words, code):
    warm, cold = forked(*words.split()), cold_preftune(*words.split())
    assert cold.returncode == code
    assert cold.stdout + cold.stderr
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)


def test_folder_and_umask_arrive(preftune, tmp_path):
    preftune("init", "first")
    assert preftune("init", "mine", preexec_fn=lambda: os.umask(0o027)).returncode == 0
    made = [path for path in (tmp_path / "mine").iterdir() if path.is_file()]
    assert made
    assert {path.stat().st_mode & 0o777 for path in made} == {0o640}


def test_the_environment_arrives(forked, environment):
    def allocator():
        return next(one for one in json.loads(forked("doctor", "--json").stdout)["checks"] if one["name"] == "allocator")["level"]

    assert allocator() == "ok"
    environment["PREFTUNE_ALLOCATOR"] = "off"
    assert allocator() == "note"


def test_input_arrives(forked):
    done = forked("chat", "starter", "--max-new-tokens", 5, input="/nonsense\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "no command '/nonsense'" in done.stderr


def test_what_an_interpreter_reads_or_a_limit_needs_an_ordinary_start(forked, preftune, environment, pairs):
    assert "import time:" not in forked("ls", "losses").stderr
    environment["PYTHONPROFILEIMPORTTIME"] = "1"
    assert "import time:" in preftune("ls", "losses").stderr
    del environment["PYTHONPROFILEIMPORTTIME"]
    convert = ("convert", pairs, "--to", "openai-preference", "--out", "out.jsonl")
    assert forked(*convert).returncode == 0
    done = preftune(*convert, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
    assert done.returncode != 0


@pytest.fixture
def training(forked, warm_command, environment, recipe, tmp_path):
    """A forked run that trains, and its process."""
    forked("train", "gone.yaml")
    command = [warm_command, "train", recipe, "max_steps=200", "checkpoints=0", "--no-probe"]
    asking = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/small-*/stages/1-dpo/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert asking.poll() is None, asking.communicate()
        time.sleep(0.05)
    (run,) = forking().children()
    yield asking, run
    asking.kill()
    asking.communicate()


@pytest.mark.slow
def test_a_signal_arrives(training, tmp_path):
    asking, run = training
    asking.send_signal(signal.SIGINT)
    _, told = asking.communicate(timeout=120)
    assert asking.returncode == 130, told
    assert not run.is_running()
    (folder,) = [path.parent for path in tmp_path.glob(f"runs/small-*/{RUN_FILE}")]
    assert list(folder.glob("stages/1-dpo/checkpoints/step-*/manifest.json"))


@pytest.mark.slow
def test_the_signal_that_ends_it_ends_the_call(training):
    asking, run = training
    run.kill()
    assert asking.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_a_call_that_is_killed_takes_its_process_with_it(training):
    asking, run = training
    asking.kill()
    asking.wait()
    run.wait(60)
    assert not run.is_running()
