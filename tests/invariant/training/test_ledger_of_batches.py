"""The ledger under losses that see the whole step at once: every pair has its own margin, whatever pack it was in."""

import pytest
import torch
from tiny import make_examples, make_plan

from preftune.core.files import read_jsonl
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_of
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.ledger import read_ledger
from preftune.training.loop import run_stage

ROWS = make_examples(8)
PLAN = {
    "pairs_per_step": 8, "tokens_per_pack": 40, "lora": LoraConfig(rank=4, alpha=8), "checkpoints": 0, "probe": None,
    "warmup": 0.0, "lr": 5e-3, "epochs": 9.0, "schedule": "constant", "evals": 0, "loss": {"beta": 0.1},
}  # fmt: skip


def log_ratios(policy, start):
    """Difference of log-ratios of each pair, by plain rows: (pairs,) nats."""
    pack = pack_of(ROWS)
    with torch.no_grad():
        gap = Scorer(policy, shared=False).token_logps(pack) - Scorer(start, shared=False).token_logps(pack)
    sums = torch.zeros(16).index_add(0, torch.from_numpy(pack.segments), gap)
    return sums[0::2] - sums[1::2]


@pytest.mark.parametrize("method", ["dpo", "aot", "bco_pair"])
def test_each_pair_has_the_margin_that_it_had_before_its_update(tmp_path, tiny_model, method):
    once = run_stage(make_plan(tmp_path, tiny_model, ROWS, [], method=method, folder="once", max_steps=1, **PLAN))
    run_stage(make_plan(tmp_path, tiny_model, ROWS, [], method=method, max_steps=2, **PLAN))
    models = (load_model(ModelConfig(name=str(one)), precision="float32").model for one in (once.final, tiny_model))
    expected = 0.1 * log_ratios(*models)
    assert expected.std() > 0.02, "the pairs differ"
    first, second = [row for row in read_jsonl(tmp_path / "run" / "ledger.jsonl") if row["step"] > 0]
    assert [margin for *_, margin in first["pairs"]] == pytest.approx([0.0] * 8, abs=1e-5)
    by_line = {line: margin for _, line, _, margin in second["pairs"]}
    assert sorted(by_line) == list(range(1, 9))
    assert [by_line[line] for line in range(1, 9)] == pytest.approx(expected.tolist(), abs=2e-4)
    assert second["mean"] == pytest.approx(expected.mean().item(), abs=1e-4)
    looks = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert looks[0].line == int(expected.argmin()) + 1, "the furthest below the others is the first suspect"
