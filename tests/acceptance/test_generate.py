"""Pairs made by the verb and by rounds of a recipe, on the starter, in processes that are killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preftune.app.generate import generate_pairs
from preftune.data.pipeline import read_examples
from preftune.judging.base import Candidate
from preftune.judging.rules import load_rules

STARTER = Path(__file__).resolve().parents[2] / "src" / "preftune" / "starter"
DECODING = ["decoding.batch_size=6", "decoding.max_new_tokens=60", "decoding.temperature=0.9"]
SMALL = ["--limit", "16", "--samples", "3", *DECODING, "guards.require_complete=false"]
MADE = ("drawn.jsonl", "judgements.jsonl", "samples.jsonl", "summary.json")


def verb(out):
    files = ["--prompts", STARTER / "verdict.jsonl", "--judge", STARTER / "judge_pairs.yaml", "--out", out]
    return ["generate", "starter", *files, *SMALL, "--json"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kill_when(preftune_arguments, is_time, tmp_path, environment):
    """Start the command line and SIGKILL it as soon as ``is_time``."""
    command = [str(Path(sys.executable).with_name("preftune")), *map(str, preftune_arguments)]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=told, stderr=told)
        deadline = time.monotonic() + 240
        while not is_time():
            assert process.poll() is None, (tmp_path / "told").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)


@pytest.mark.slow
def test_the_verb_makes_pairs_that_resume_byte_for_byte(preftune, tmp_path, environment):
    done = preftune(*verb("whole/pairs.jsonl"))
    assert done.returncode == 0, done.stderr
    result, pairs = json.loads(done.stdout), lines(tmp_path / "whole/pairs.jsonl")
    record = tmp_path / "whole/pairs-record"
    samples = lines(record / "samples.jsonl")
    assert (len(samples), result["samples"], result["pairs"]) == (48, 48, len(pairs))

    judge = load_rules("judge_pairs.yaml", STARTER)
    prompts = lines(STARTER / "verdict.jsonl")
    for one in samples[::7]:
        assert one["score"] == judge.score((), Candidate(one["text"], one["num_tokens"], one["is_complete"]))
        assert one["judge"] == judge.identity
    for pair in pairs:
        assert pair["judges"] == [judge.identity]
        assert pair["generators"][0].startswith("starter@")
        assert pair["prompt"] in [row["prompt"] for row in prompts[:16]]
        held = {one["text"]: one for one in samples if one["prompt_digest"] == pair["prompt_digest"]}
        best, worst = held[pair["chosen"][0]["content"]], held[pair["rejected"][0]["content"]]
        assert (best["score"], worst["score"]) == (pair["chosen_score"], pair["rejected_score"])
        assert pair["chosen_score"] > pair["rejected_score"]
    assert len(read_examples([str(tmp_path / "whole/pairs.jsonl")], strict=True).examples) == len(pairs)

    drawn = tmp_path / "killed/pairs-record/drawn.jsonl"
    kill_when(verb("killed/pairs.jsonl"), lambda: drawn.is_file() and drawn.stat().st_size > 0, tmp_path, environment)
    before = drawn.read_bytes()
    assert 0 < before.count(b"\n") < 48, "killed in the middle"
    assert not (tmp_path / "killed/pairs.jsonl").exists()
    again = preftune(*verb("killed/pairs.jsonl"))
    assert again.returncode == 0, again.stderr
    assert drawn.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "what was sampled was not sampled again"
    assert len({(one["prompt"], one["number"]) for one in lines(drawn)}) == len(lines(drawn)) == 48
    judged = tmp_path / "killed/pairs-record/judgements.jsonl"
    judged.write_bytes(judged.read_bytes()[:-700])  # as a kill between two judgements, and inside one, leaves it
    (tmp_path / "killed/pairs.jsonl").unlink()
    files = {"prompts": str(STARTER / "verdict.jsonl"), "judge": str(STARTER / "judge_pairs.yaml")}
    keys = {**files, "limit": 16, "samples": 3}
    resumed = generate_pairs("starter", keys, SMALL[4:], out=tmp_path / "killed/pairs.jsonl")
    assert resumed.facts["pairs"] == len(pairs)
    for name in MADE:
        assert (drawn.parent / name).read_bytes() == (record / name).read_bytes(), name
    assert (tmp_path / "killed/pairs.jsonl").read_bytes() == (tmp_path / "whole/pairs.jsonl").read_bytes()

    foreign = preftune(*verb(STARTER / "sft.jsonl"))
    assert (foreign.returncode, "was not made by this command" in foreign.stderr) == (2, True)


ROUNDS = """
model: starter
seed: 3
adapter: full
rounds: 2
prompts_per_round: 8
stages:
  - method: generate
    prompts: pairs.jsonl
    judge: {pairs_judge}
    samples: 3
    guards: {{require_complete: false}}
    decoding: {{temperature: 0.9, max_new_tokens: 60, batch_size: 6}}
  - {{method: dpo, beta: 0.1, lr: 1e-4, pairs_per_step: 2, data: {{select: 0.2}}}}
evaluation:
  prompts: {verdict}
  judge: {judge}
  limit: 8
  decoding: {{temperature: 0.7, max_new_tokens: 40, batch_size: 64}}
"""


@pytest.mark.slow
def test_rounds_run_end_to_end_and_resume_inside_the_second(preftune, pairs, tmp_path, environment):
    recipe = tmp_path / "rounds.yaml"
    files = {
        "pairs_judge": STARTER / "judge_pairs.yaml",
        "verdict": STARTER / "verdict.jsonl",
        "judge": STARTER / "judge_verdict.yaml",
    }
    recipe.write_text(ROUNDS.format(**files), encoding="utf-8")
    done = preftune("run", recipe, "output=whole", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    run = Path(result["trained"]["run"])
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["1-generate-r1", "2-dpo-r1", "3-generate-r2", "4-dpo-r2"]
    stages = result["trained"]["stages"]
    assert stages[2]["start"] == stages[3]["start"] == str(run / "stages/2-dpo-r1/final"), "round 2 starts from round 1"
    parts = [
        {row["prompt_digest"] for row in lines(run / f"stages/{name}/record/samples.jsonl")}
        for name in ("1-generate-r1", "3-generate-r2")
    ]
    assert [len(part) for part in parts] == [8, 8]
    assert not parts[0] & parts[1]
    rounds = json.loads((run / "evaluation/report.json").read_text())["rounds"]
    assert [one["round"] for one in rounds] == [1, 2]
    assert rounds[1]["against_before"]["num_prompts"] == 8
    assert rounds[1]["gain_interval"]["low"] <= rounds[1]["gain"] <= rounds[1]["gain_interval"]["high"]
    for name in ("report.md", "report.html"):
        assert "Round 2" in (run / "evaluation" / name).read_text(), name

    def in_second_round():
        found = list((tmp_path / "killed").glob("*/stages/3-generate-r2/record/drawn.jsonl"))
        return bool(found) and found[0].stat().st_size > 0

    kill_when(["train", recipe, "output=killed"], in_second_round, tmp_path, environment)
    killed = next((tmp_path / "killed").iterdir())
    assert not (killed / "stages/4-dpo-r2").exists()
    again = preftune("train", "--resume", killed, "--json")
    assert again.returncode == 0, again.stderr
    for name in (
        "stages/3-generate-r2/pairs.jsonl",
        "stages/3-generate-r2/record/summary.json",
        "stages/4-dpo-r2/final/model.safetensors",
    ):
        assert (killed / name).read_bytes() == (run / name).read_bytes(), name
