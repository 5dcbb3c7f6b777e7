"""The command line starts fast, helps, and its verbs work together."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAX_HELP_SECONDS = 0.3  # of the processor, so that a busy machine fails nobody; it takes about .06


def test_help_is_fast_and_imports_no_torch(cold_preftune):
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = cold_preftune("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(times) < MAX_HELP_SECONDS, times
    heavy = "{'torch', 'transformers', 'numpy', 'pyarrow', 'rich'}"
    code = f"import sys, preftune, preftune.cli.main\nsys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("cli.main", "training.loop")], check=False).returncode == 1


@pytest.mark.parametrize("verb", ["demo", "check", "generate", "plan", "train", "run", "eval", "ls", "show"])
def test_every_verb_helps_with_examples(preftune, verb):
    done = preftune(verb, "--help")
    assert done.returncode == 0
    assert f"preftune {verb}" in done.stdout
    assert "--json" in done.stdout
    assert "Example" in done.stdout


@pytest.mark.parametrize("kind", ["runs", "losses", "formats", "sources", "judges"])
def test_ls_lists_every_kind(preftune, kind):
    rows = json.loads(preftune("ls", kind, "--json").stdout)
    expected = {
        "runs": set(),
        "losses": {"dpo", "sft"},
        "formats": {"trl-preference"},
        "sources": {"jsonl"},
        "judges": {"rules"},
    }[kind]
    assert expected <= {row["name"] for row in rows}


@pytest.mark.slow
def test_train_show_and_start_from_a_run(preftune, recipe, tmp_path):
    trained = preftune("train", recipe, "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    run = Path(result["run"])
    assert (Path(result["model"]) / "model.safetensors").is_file()
    shown = json.loads(preftune("show", run.name, "--json").stdout)
    assert shown["run"]["status"] == "succeeded"
    assert shown["last_metrics"]["dpo"]["step"] == 4
    assert preftune("ls", "runs").stdout.split()[0] == run.name
    for start in (run.name, f"{run.name}@3", run / "stages" / "1-dpo" / "final"):
        again = preftune("train", recipe, f"from_checkpoint={start}", "max_steps=2", "--json")
        assert again.returncode == 0, again.stderr
        assert str(run) in json.loads(again.stdout)["stages"][0]["start"]
    wrong = preftune("train", recipe, f"from_checkpoint={run.name}@2")
    assert wrong.returncode == 1
    assert "there is" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_resume_goes_on(preftune, recipe, tmp_path, environment, number):
    command = [str(Path(sys.executable).with_name("preftune")), "train", str(recipe), "max_steps=60", "checkpoints=0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = next(tmp_path.glob("runs/small-*/stages/1-dpo/metrics.jsonl"), None)
        if metrics is not None and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    run = metrics.parents[2]
    assert list(run.glob("stages/1-dpo/checkpoints/step-*/manifest.json"))
    again = preftune("train", "--resume", run, "--json")
    assert again.returncode == 0, again.stderr
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line and "eval_loss" not in line
    ]
    assert steps == list(range(1, 61))


def test_interrupted_early_leaves_no_traceback(tmp_path, environment):
    command = [str(Path(sys.executable).with_name("preftune")), "ls", "losses"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert process.returncode in {0, 130, -signal.SIGINT}, (out, told)
