"""Sinks beside a run: one that fails, hangs or lags is said once, and the run neither stops nor waits for long."""

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from preftune.app.plan import plan
from preftune.app.recipes import load_recipe, make_recipe, save_recipe
from preftune.app.tracking import build_sinks
from preftune.app.train import train
from preftune.core.errors import Blocked, RecipeError
from preftune.core.events import EvalDone, Noted, Progress, StageFinished, StepDone
from preftune.core.files import read_jsonl
from preftune.tracking import runner as runner_module
from preftune.tracking.base import RunFacts, flat, hide_secrets, sinks, without_secrets
from preftune.tracking.runner import Tracking

RUN = RunFacts("run-1", Path("runs/run-1"), {"model": {"name": "m"}}, ("dpo",))
STEP = StepDone("dpo", 1, {"loss": 0.5})
RELEASE = threading.Event()


@sinks.register("for_tests")
@dataclass
class Recorder:
    """Keeps what it is told, or misbehaves at one place."""

    at: str = ""
    how: str = "raise"
    seen: list = field(default_factory=list)

    def missing(self):
        return "its package is not installed" if self.at == "missing" else ""

    def way_out(self):
        return "pip install it"

    def begin(self, run):
        self._do("begin", run)

    def take(self, event):
        self._do("take", event)

    def end(self, status):
        self._do("end", status)

    def _do(self, place, what):
        if place == self.at and self.how == "hang":
            RELEASE.wait(30)
        if place == self.at and self.how == "raise":
            raise SystemExit("no more") if place == "end" else ValueError("bad\nnews")
        self.seen.append((place, what))


@pytest.fixture(autouse=True)
def _release():
    RELEASE.clear()
    yield
    RELEASE.set()


def run_with(sink, events, close_seconds=30.0, status="finished"):
    told = []
    tracking = Tracking({"for_tests": sink}, RUN, told.append, close_seconds=close_seconds)
    for event in events:
        tracking(event)
    tracking.close(status)
    return told


def test_a_sink_sees_the_run_in_order_and_its_end():
    sink = Recorder()
    assert run_with(sink, [STEP, Progress("x", 1, 2), STEP], status="interrupted") == []
    assert sink.seen == [("begin", RUN), ("take", STEP), ("take", STEP), ("end", "interrupted")]


@pytest.mark.parametrize(
    ("at", "words"), [("begin", "ValueError: bad news"), ("take", "ValueError"), ("end", "SystemExit: no more")]
)
def test_a_failure_is_said_once_in_one_line(at, words):
    told = run_with(Recorder(at=at), [STEP] * 5)
    assert [(one.level, one.code) for one in told] == [("warning", "sink_failed")]
    assert f"for_tests failed and is left out from here on: {words}" in told[0].message
    assert "\n" not in told[0].message


@pytest.mark.parametrize("at", ["begin", "take", "end"])
def test_one_that_hangs_is_left_after_a_bounded_time(at):
    started = time.monotonic()
    told = run_with(Recorder(at=at, how="hang"), [STEP] * 3, close_seconds=0.3)
    assert time.monotonic() - started < 5
    assert [one.code for one in told] == ["sink_failed"]
    assert "did not end within 0 s" in told[0].message


ENDING = """
import atexit, sys, time
from preftune.core.leaving import end
from preftune.tracking.runner import Tracking
from preftune.tracking.base import RunFacts
from pathlib import Path

class Slow:
    def begin(self, run): time.sleep(int(sys.argv[1]))
    def take(self, event): pass
    def end(self, status): pass
    def abandon(self): print("abandoned", flush=True)

atexit.register(lambda: (print("handler", flush=True), time.sleep(int(sys.argv[1]))))
Tracking({"slow": Slow()}, RunFacts("r", Path(), {}, ()), print, close_seconds=0.5).close("finished")
end(3)
"""


@pytest.mark.parametrize(("seconds", "is_left"), [(300, True), (0, False)])
def test_what_a_sink_left_behind_does_not_keep_the_process(seconds, is_left):
    done = subprocess.run([sys.executable, "-c", ENDING, str(seconds)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert ("abandoned" in done.stdout) is is_left
    assert ("handler" in done.stdout) is not is_left, "exit handlers run where nothing hangs, and only there"


def test_one_that_lags_drops_events_rather_than_memory(monkeypatch):
    monkeypatch.setattr(runner_module, "QUEUE", 4)
    told = run_with(Recorder(at="begin", how="hang"), [STEP] * 20, close_seconds=0.1)
    assert len(told) == 1


def test_the_others_go_on():
    good, told = Recorder(), []
    tracking = Tracking({"bad": Recorder(at="take"), "good": good}, RUN, told.append)
    for _ in range(3):
        tracking(STEP)
    tracking.close("finished")
    assert len(good.seen) == 5
    assert len(told) == 1


def test_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secret")
    assert without_secrets("refused: 0123456789secret is no key") == "refused: *** is no key"
    given = {"evaluation": {"judge": {"name": "llm", "api_key": "abc"}}, "tokens_per_pack": 3, "stages": [{"password": "x"}]}
    hidden = {"evaluation": {"judge": {"name": "llm", "api_key": "***"}}, "tokens_per_pack": 3, "stages": [{"password": "***"}]}
    assert hide_secrets(given) == hidden
    assert dict(flat(hidden))["stages.0.password"] == "***"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["tensorbord"], r"tracking.0: no sink 'tensorbord': did you mean 'tensorboard'"),
        ([{"mlflow": {"url": "x"}}], r"tracking.0: sink 'mlflow' has no option 'url': did you mean 'uri'"),
        (
            [{"mlflow": {"upload": "some"}}],
            r"tracking.0: sink 'mlflow', option 'upload': write 'none', 'final' or 'all'",
        ),
        ([{"wandb": {"api_key": "x"}}], r"tracking.0: sink 'wandb' has no option 'api_key'"),
        (["mlflow", "mlflow"], "tracking: mlflow is there twice"),
        (7, "tracking: write a list of sinks"),
        ([{"a": 1}], "tracking.0: write the name of a sink"),
    ],
)
def test_a_sink_that_is_not_there_is_refused_in_one_line(given, words):
    with pytest.raises(RecipeError, match=words) as caught:
        make_recipe({"model": "starter", "data": "pairs.jsonl", "tracking": given})
    assert "\n" not in str(caught.value)


def small(starter_model, tmp_path, tracking, **keys):
    return make_recipe(
        {
            "model": "starter", "method": "dpo", "adapter": "full", "lr": 1e-4, "max_steps": 2, "pairs_per_step": 4,
            "data": {"train": str(starter_model.parent / "pairs.jsonl"), "limit": 12}, "probe": "off", "checkpoints": 1,
            "output": str(tmp_path / "runs"), "tracking": tracking, **keys,
        }
    )  # fmt: skip


def test_a_missing_package_blocks_with_the_way_out(starter_model, tmp_path):
    recipe = small(starter_model, tmp_path, [{"for_tests": {"at": "missing"}}])
    made = plan(recipe)
    assert [(one.code, one.way_out) for one in made.blockers] == [("missing_dependency", "pip install it")]
    with pytest.raises(Blocked, match="tracking: for_tests: its package is not installed"):
        train(recipe, probe="off")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio"])
def test_packages_that_are_not_here_name_their_extra(name):
    import importlib.util

    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    sink = build_sinks(make_recipe({"model": "starter", "data": "pairs.jsonl", "tracking": name}))[name]
    assert sink.missing() == f"the package {name} is not installed"
    assert f"pip install 'preftune[{name}]'" in sink.way_out()


def test_a_real_run_is_told_whole_and_a_broken_sink_costs_it_nothing(starter_model, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("preftune.app.tracking.sinks", Kept(kept))
    done = train(small(starter_model, tmp_path, ["for_tests"]), probe="off")
    (sink,) = kept
    (_, facts), *events, last = sink.seen
    assert facts.name == done.run.name
    assert facts.recipe["stages"][0]["lr"] == 1e-4
    assert [(one.stage, one.split, one.rows) for one in facts.data] == [("dpo", "train", 12)]
    rows = read_jsonl(done.run / "stages" / "1-dpo" / "metrics.jsonl")
    steps = [event for _, event in events if isinstance(event, StepDone | EvalDone)]
    assert [{**event.metrics, "step": event.step} for event in steps] == rows
    assert isinstance(events[-1][1], StageFinished)
    assert last == ("end", "finished")
    seen = []
    broken = train(small(starter_model, tmp_path, [{"for_tests": {"at": "take"}}]), seen.append, probe="off")
    assert broken.stages[0]["status"] == "succeeded"
    said = [one for one in seen if isinstance(one, Noted) and one.code == "sink_failed"]
    assert len(said) == 1
    assert len([row for row in read_jsonl(broken.run / "events.jsonl") if row["code"] == "sink_failed"]) == 1
    again = load_recipe(broken.run / "recipe.yaml")
    assert again.tracking[0].options == {"at": "take"}
    save_recipe(again, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == again


class Kept:
    """The registry, remembering what it built."""

    def __init__(self, kept):
        self._kept = kept

    def build(self, name, options):
        self._kept[:] = [sinks.build(name, options)]
        return self._kept[0]
