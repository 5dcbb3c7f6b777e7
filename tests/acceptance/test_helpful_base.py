"""Anthropic's helpful-base, a real file with its traps: every row accounted for, and a LoRA DPO run that reports its drift."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
FILE = SHARED / "hh-rlhf" / "helpful-base.test.jsonl.gz"
MODEL = SHARED / "models" / "stories260K" / "hf"
pytestmark = pytest.mark.skipif(not (FILE.is_file() and MODEL.is_dir()), reason="needs the shared data: hh-rlhf and stories260K")


@pytest.mark.slow
def test_dpo_on_the_rows_that_fit(preftune, tmp_path):
    recipe = tmp_path / "helpful.yaml"
    recipe.write_text(
        f"model: {{name: {MODEL}, chat_template: plain, dtype: float32}}\nmethod: dpo\nbeta: 0.1\nlr: 1e-3\nadapter: lora\n"
        f"data: {{train: {FILE}, select: 0.02}}\nmax_steps: 3\npairs_per_step: 8\nevals: 1\n"
        "probe: {prompts: 4, max_new_tokens: 16}\n",
        encoding="utf-8",
    )
    done = preftune("train", recipe, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    run = Path(json.loads(done.stdout)["run"])
    data = json.loads((run / "stages" / "1-dpo" / "data.json").read_text(encoding="utf-8"))
    excluded = [json.loads(line) for line in (run / "excluded.jsonl").read_text(encoding="utf-8").splitlines()]
    assert data["train"] + data["select"] + len(excluded) == 2354, "every row is used or has a reason"
    assert sum(data["counts"].values()) == len(excluded)
    assert (data["counts"]["identical"], data["counts"]["prompts_differ"]) == (2, 9)
    assert data["counts"]["prompt_too_long"] + data["counts"]["too_long"] == 835, "those that do not fit in 512 positions"
    rows = [json.loads(line) for line in (run / "stages" / "1-dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert kl[0] == 0 < kl[-1]
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["logps/chosen_change"] == steps[0]["logps/rejected_change"] == 0
    for row in steps:
        assert row["rewards/chosen"] == pytest.approx(0.1 * row["logps/chosen_change"], abs=1e-4)
        assert row["rewards/rejected"] == pytest.approx(0.1 * row["logps/rejected_change"], abs=1e-4)
    assert {"eval_logps/chosen", "eval_logps/rejected", "eval_logps/chosen_change_per_token"} <= set().union(*rows)
