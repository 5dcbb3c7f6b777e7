"""Which judges may judge a result: each refusal beside a judge that may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import preftune
from preftune.app.evaluate import evaluate_run
from preftune.app.plan import plan
from preftune.app.recipes import make_recipe
from preftune.core.errors import Blocked
from preftune.data.pipeline import read_examples
from preftune.judging.base import load_judge, names_of

LLM = "llm:qwen2.5:7b@http://localhost:11434/v1"
STARTER = str(Path(preftune.__file__).parent / "starter" / "model")
RULES = {"name": "rules", "rules": [{"kind": "lexicon", "words": ["merry"], "weight": 1.0}]}


@pytest.fixture
def facts(tmp_path: Path):
    (tmp_path / "v.jsonl").write_text('{"prompt": "Say something about snow."}\n')

    def go(judge: Any, *, labelled_by: Any = None, **keys: Any) -> str:
        judges = names_of(load_judge(labelled_by, tmp_path)) if labelled_by else ["someone"]
        row = {"prompt": "Hi", "chosen": " yes", "rejected": " no", "judges": judges}
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        evaluation = {"prompts": str(tmp_path / "v.jsonl"), "judge": judge, **keys}
        recipe = make_recipe(
            {"model": "starter", "method": "dpo", "data": str(tmp_path / "p.jsonl"), "evaluation": evaluation}, tmp_path
        )
        found = [one for one in plan(recipe).blockers if one.code == "judge_not_independent"]
        return "; ".join(one.fact for one in found)

    return go


def test_the_same_model_may_not_judge_even_with_other_settings(facts) -> None:
    other_settings = {"name": "llm", "url": "http://elsewhere/v1", "model": "qwen2.5:7b", "criteria": "brevity"}
    assert "asks the model that made the pairs (llm:qwen2.5:7b)" in facts(LLM, pairs_judge=other_settings)
    assert facts(LLM, pairs_judge={**other_settings, "model": "llama3:8b"}) == ""
    assert facts(LLM, pairs_judge=RULES) == ""
    assert facts(LLM, pairs_judge=other_settings, same_judge_reason="only a smoke test") == ""


def test_a_judge_that_rows_name_may_not_judge(facts, tmp_path: Path) -> None:
    assert "llm:qwen2.5:7b) is named in the rows" in facts(LLM, labelled_by=LLM)
    assert read_examples([str(tmp_path / "p.jsonl")]).examples[0].provenance.judges[1] == "llm:qwen2.5:7b"
    assert "is named in the rows" in facts(RULES, labelled_by=RULES)
    assert facts(RULES, labelled_by=LLM) == ""
    assert facts(LLM, labelled_by=LLM, same_judge_reason="nothing else runs here") == ""


def test_eval_refuses_too_and_the_report_prints_the_reason(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    judge = json.dumps(RULES)
    keys = [f"evaluation.prompts={tmp_path}/v.jsonl", f"evaluation.judge={judge}", f"evaluation.pairs_judge={judge}"]
    keys.append("evaluation.decoding.max_new_tokens=4")
    with pytest.raises(Blocked, match="is the one that made the pairs"):
        evaluate_run(STARTER, keys, baseline="starter", output=tmp_path)
    reason = "evaluation.same_judge_reason=a trial of the report"
    result = evaluate_run(STARTER, [*keys, reason], baseline="starter", output=tmp_path)
    assert "may not be independent of the pairs: a trial of the report" in result.report_markdown.read_text()
