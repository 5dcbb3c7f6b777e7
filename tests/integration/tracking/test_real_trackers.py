"""Every sink against its real package on a local store: a real run's events, read back with the tool's own reader."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from preftune.app.recipes import make_recipe
from preftune.app.runs import RunFolder
from preftune.app.tracking import run_facts
from preftune.app.train import train
from preftune.core.events import Progress
from preftune.core.files import read_jsonl

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-tracking" / "bin" / "python"
SCRIPT = Path(__file__).parent / "clients" / "track.py"
KEY = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="the trackers' environment is not there: `make trackers` makes it")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, starter_model):
    """A real run, its events as JSON, and what a sink is told of it; the second half is another session."""
    folder = tmp_path_factory.mktemp("tracked")
    recipe = make_recipe(
        {
            "model": "starter", "method": "dpo", "beta": 0.1, "adapter": "full", "lr": 1e-4, "max_steps": 4, "evals": 2,
            "pairs_per_step": 4, "checkpoints": 1, "output": str(folder),
            "probe": {"prompts": 2, "max_new_tokens": 4, "evals": 1},
            "data": {"train": str(starter_model.parent / "pairs.jsonl"), "limit": 20, "select": 0.2},
        }
    )  # fmt: skip
    events = []
    done = train(recipe, events.append, probe="off")
    rows = [{"kind": type(one).__name__, "fields": dataclasses.asdict(one)} for one in events if not isinstance(one, Progress)]
    rows.insert(-1, {"kind": "Noted", "fields": {"level": "warning", "code": "collapse", "message": "entropy fell"}})
    metrics = read_jsonl(done.run / "stages" / "1-dpo" / "metrics.jsonl")
    return recipe, done, rows, metrics


def replay(trained, name, options, tmp_path, **environment):
    recipe, done, rows, _ = trained
    facts = dataclasses.asdict(run_facts(recipe, RunFolder(done.run), [Used(20)]))
    facts["folder"] = str(tmp_path / done.run.name)
    middle = next(at for at, row in enumerate(rows) if row["kind"] == "StepDone" and row["fields"]["step"] == 3)
    sessions = [["interrupted", rows[:middle]], ["finished", rows[middle:]]]
    file = tmp_path / "given.json"
    file.write_text(json.dumps({"options": options, "facts": {**facts}, "sessions": sessions}))
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    done = subprocess.run(
        [PYTHON, SCRIPT, name, file], capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path,
        env={**keep, "PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["told"] == []
    return found, done


@dataclasses.dataclass
class Used:
    """What a stage was trained on, as far as the facts need it."""

    rows: int
    select: tuple = ()

    @property
    def train(self):
        return [dataclasses.make_dataclass("Row", ["example_id"])(f"row-{at}") for at in range(self.rows)]


def expected(metrics, name, prefix="train/"):
    """Step and value of a metric of the run's own file."""
    plain = name.removeprefix(prefix)
    return [[row["step"], row[plain]] for row in metrics if plain in row]


def close(found, wanted):
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-5)


def test_tensorboard(trained, tmp_path):
    found, _ = replay(trained, "tensorboard", {}, tmp_path)
    metrics = trained[3]
    assert len(found["dpo"]["train/loss"]) == 4
    close(found["dpo"]["train/loss"], expected(metrics, "train/loss"))
    close(found["dpo"]["train/rewards/margins"], expected(metrics, "train/rewards/margins"))
    close(found["dpo"]["eval/loss"], expected(metrics, "eval_loss"))
    close(found["dpo"]["probe/entropy"], expected(metrics, "probe/entropy"))
    assert found["dpo texts"]["alerts/collapse"] == "entropy fell"
    assert '"lr": 0.0001' in found["dpo texts"]["recipe"]


@pytest.mark.slow
def test_mlflow(trained, tmp_path):
    options = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "register": "aligned"}
    found, _ = replay(trained, "mlflow", options, tmp_path)
    metrics = trained[3]
    assert found["runs"] == 1, "the second session goes on with the run of the first"
    assert found["status"] == "FINISHED"
    close(found["history"]["train/loss"], expected(metrics, "train/loss"))
    close(found["history"]["eval/loss"], expected(metrics, "eval_loss"))
    assert found["params"]["stages.0.lr"] == "0.0001"
    assert found["params"]["stages.0.loss.beta"] == "0.1"
    assert found["tags"]["alert.collapse"] == "entropy fell"
    ((name, digest, profile, context),) = found["datasets"]
    assert (name, json.loads(profile), context) == ("dpo-train", {"num_rows": 20}, "train")
    assert digest
    assert set(found["models"]) == {"dpo-step-2", "dpo-final"}
    step, final = found["models"]["dpo-step-2"], found["models"]["dpo-final"]
    assert step["status"] == final["status"] == "READY"
    assert step["tags"]["preftune.path"].endswith("step-000002/model")
    assert step["files"] == [], "only the final model is copied"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(final["files"])
    losses = dict(expected(metrics, "train/loss"))
    assert step["metrics"]["train/loss"] == pytest.approx(losses[2])
    assert final["metrics"]["train/loss"] == pytest.approx(losses[4])
    name, number, is_of_run, source = found["version"]
    assert (name, number, is_of_run) == ("aligned", "1", True)
    assert found["models"]["dpo-final"]["id"] in source


@pytest.mark.slow
def test_wandb_offline_and_its_key_is_nowhere(trained, tmp_path):
    found, done = replay(trained, "wandb", {"mode": "offline"}, tmp_path, WANDB_API_KEY=KEY)
    recipe, run, _, metrics = trained
    assert found["sessions"] == 2
    assert found["id"] == run.run.name
    losses = [[row["step"], row["train/loss"]] for row in found["history"] if "train/loss" in row]
    close(losses, expected(metrics, "train/loss"))
    evals = [[row["step"], row["eval/loss"]] for row in found["history"] if "eval/loss" in row]
    close(evals, expected(metrics, "eval_loss"))
    assert found["config"]["seed"] == recipe.seed
    assert found["summary"]["alert/collapse"] == "entropy fell"
    assert found["summary"]["status"] == "finished"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_trackio(trained, tmp_path):
    found, _ = replay(trained, "trackio", {}, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    metrics = trained[3]
    losses = [[row["step"], row["train/loss"]] for row in found["rows"] if "train/loss" in row]
    close(losses, expected(metrics, "train/loss"))
    assert ["collapse", "entropy fell", "warn"] in found["alerts"]
    assert ["run interrupted", None, "error"] in found["alerts"]
    assert found["config"]["seed"] == 0
