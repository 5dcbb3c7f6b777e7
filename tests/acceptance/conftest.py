"""The command line as users have it: a process of its own, its own folders, no network."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "src" / "preftune" / "starter"


@pytest.fixture
def environment(tmp_path):
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PREFTUNE_")}
    return {**keep, "PREFTUNE_CACHE": str(tmp_path / ".cache"), "PREFTUNE_HOME": str(tmp_path / ".home"), "HF_HUB_OFFLINE": "1"}


def caller(program, folder, environment):
    def call(*arguments, timeout=300, **options):
        command = [str(program), *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False, **options
        )

    return call


@pytest.fixture
def preftune(tmp_path, environment, warm_command):
    """Runs a verb; its process is forked from one that has loaded the libraries (tests/warm_start.py)."""
    return caller(warm_command, tmp_path, environment)


@pytest.fixture
def cold_preftune(tmp_path, environment, cold_command):
    """Runs a verb as a shell does."""
    return caller(cold_command, tmp_path, environment)


@pytest.fixture
def pairs(tmp_path):
    """Sixty of the starter's pairs."""
    lines = (STARTER / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path, pairs):
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: starter\nmethod: dpo\nbeta: 0.1\nlr: 1e-4\nadapter: full\n"
        "epochs: 8\nmax_steps: 4\npairs_per_step: 8\ndata: pairs.jsonl\nprobe: {prompts: 4, max_new_tokens: 16}\n",
        encoding="utf-8",
    )
    return path
