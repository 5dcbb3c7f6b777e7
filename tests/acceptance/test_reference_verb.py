"""`preftune reference`: what it scores, that it goes on after an interruption, and that two at once lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import preftune as library
from preftune.core.errors import Interrupted
from preftune.core.events import Progress


def counts(done):
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["hits"], result["misses"]


def test_scores_are_made_once_and_a_run_finds_them(preftune, recipe, tmp_path):
    first = preftune("reference", recipe, "--json")
    hits, misses = counts(first)
    assert (hits, misses) == (0, 64)
    stage = json.loads(first.stdout)["stages"][0]
    assert stage["num_bytes"] > 64 * 40  # an entry of the index for each, and its values
    assert not (tmp_path / "runs").exists(), "nothing is trained"
    assert counts(preftune("reference", recipe, "--json", "beta=0.7", "lr=3e-4", "epochs=1")) == (64, 0)
    said = preftune("reference", recipe)
    assert "64 completions, 64 held, 0 scored now; the cache of reference" in said.stdout
    run = preftune("train", recipe, "max_steps=1", "warmup=0", "--no-probe", "--json")
    assert json.loads(run.stdout)["stages"][0]["reference_forwards"] == 0, run.stderr


def test_stages_whose_start_is_not_there_yet_say_so(preftune, pairs, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "model: starter\ndata: pairs.jsonl\nadapter: full\nstages:\n  - {name: a, method: sft}\n  - {name: b, method: dpo}\n"
        "  - {name: c, method: dpo, reference: frozen}\n"
    )
    lines = preftune("reference", recipe).stdout.splitlines()
    assert lines[0] == "stage a: compares with no cached reference"
    assert lines[1].startswith("stage b: starts from what the stage before it trains")
    assert lines[2] == "stage c: compares with no cached reference"


def test_an_interrupted_call_goes_on_where_it_was(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / ".cache"))

    def stop_in_the_middle(event):
        if isinstance(event, Progress) and event.what == "scoring the reference" and event.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"2 of .* packs done; their scores are kept"):
        library.reference(recipe, sink=stop_in_the_middle, tokens_per_pack=256)
    again = library.reference(recipe, tokens_per_pack=256)
    assert again.hits > 0
    assert again.misses > 0
    assert again.hits + again.misses == 64
    assert library.reference(recipe).misses == 0


@pytest.mark.slow
def test_two_at_once_lose_nothing_and_a_killed_one_costs_nobody_else(recipe, environment, preftune, tmp_path):
    command = [str(Path(sys.executable).with_name("preftune")), "reference", str(recipe), "--json", "tokens_per_pack=128"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    folder = tmp_path / ".cache" / "reference"
    while not list(folder.glob("*/*.index")):
        assert all(one.poll() is None for one in both)
        time.sleep(0.02)
    both[2].kill()
    for one in both[:2]:
        result = json.loads(one.communicate(timeout=200)[0])
        assert result["hits"] + result["misses"] == 64
    both[2].communicate()
    assert len(list(folder.glob("*/*.index"))) >= 2, "each has files of its own"
    assert counts(preftune("reference", recipe, "--json")) == (64, 0)
