"""Every reference policy: what it scores, what it costs, and how it moves; each beside the same stage without it."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny import losses_of, make_examples, make_model, make_plan

from preftune.core.errors import CheckpointError, Interrupted, UsageError
from preftune.core.events import StepDone
from preftune.core.files import read_jsonl
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.core.references import ReferenceConfig, SyncConfig
from preftune.data.pack import pack_of
from preftune.modeling.forward import Scorer
from preftune.modeling.lineage import save_model
from preftune.modeling.load import load_model
from preftune.training import held as held_module
from preftune.training.checkpoint import latest, load_checkpoint
from preftune.training.loop import run_stage
from preftune.training.reference import LiveReference

PLAIN = LoraConfig(rank=4, alpha=8)
ROWS = make_examples(8)
# every step sees all rows, so that what a step logs can be computed by hand
WHOLE = {"pairs_per_step": 8, "lora": PLAIN, "checkpoints": 0, "probe": None, "warmup": 0.0, "lr": 5e-3, "epochs": 99.0}


FAST = {"lr": 5e-3, "warmup": 0.0}


def reference(policy="frozen", **keys):
    return ReferenceConfig(policy=policy, **keys)


def rows_of(folder):
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]


def loaded(folder):
    return load_model(ModelConfig(name=str(folder)), precision="float32")


def logps(model, rows=ROWS):
    """Summed log-probabilities, (chosen, rejected) of each pair, by plain rows."""
    pack = pack_of(rows)
    with torch.no_grad():
        tokens = Scorer(model, shared=False).token_logps(pack)
    sums = torch.zeros(2 * len(rows)).index_add(0, torch.from_numpy(pack.segments), tokens)
    return sums[0::2], sums[1::2]


@pytest.mark.parametrize(("adapter", "policies"), [("lora", ["adapter_off", "frozen"]), ("full", ["frozen"])])
def test_live_references_train_as_the_cached_one_does(tmp_path, tiny_model, adapter, policies):
    cached = run_stage(make_plan(tmp_path, tiny_model, adapter=adapter, lora=PLAIN, **FAST))
    assert cached.reference_forwards == 2 * (18 + 7)
    for policy in policies:
        plan = make_plan(tmp_path, tiny_model, adapter=adapter, lora=PLAIN, **FAST, folder=policy, reference=reference(policy))
        live = run_stage(plan)
        # two epochs and two evaluations; the first pack once more, where the start is compared with its reference
        assert live.reference_forwards >= 2 * (2 * 18 + 2 * 7)
        assert losses_of(tmp_path / policy) == pytest.approx(losses_of(tmp_path / "run"), abs=2e-5)
        first, *others = rows_of(tmp_path / policy)
        assert first["rewards/margins"] == 0.0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert all(row["rewards/margins"] != 0.0 for row in others), "the copy does not move with the policy"


def test_a_copy_that_is_none_would_show(tmp_path, tiny_model, monkeypatch):
    """The feature off: a frozen reference without a copy is the policy itself."""
    monkeypatch.setattr(held_module.HeldWeights, "in_place", lambda self: held_module.adapter_off(self._model))
    run_stage(make_plan(tmp_path, tiny_model, adapter="full", reference=reference(), max_steps=4))
    assert [row["rewards/margins"] for row in rows_of(tmp_path / "run")] == [0.0] * 4


def test_without_a_reference_the_log_ratios_are_log_probabilities(tmp_path, tiny_model):
    plan = make_plan(tmp_path, tiny_model, ROWS, [], reference=reference("none"), max_steps=1, **WHOLE)
    result = run_stage(plan)
    chosen, rejected = logps(loaded(tiny_model).model)
    expected = torch.log1p(torch.exp(-0.1 * (chosen - rejected))).mean().item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.reference_forwards == 0
    assert not any(name.endswith("_change") for name in result.metrics)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("policy", ["cached", "frozen"])
def test_another_model_as_reference(tmp_path, tiny_model, tmp_path_factory, policy):
    other = make_model(tmp_path_factory.mktemp("other"), seed=5)
    plan = make_plan(tmp_path, tiny_model, ROWS, [], reference=reference(policy, model=str(other)), max_steps=2, **WHOLE)
    result = run_stage(replace(plan, reference=ModelConfig(name=str(other))))
    own, its = logps(loaded(tiny_model).model), logps(loaded(other).model)
    margins = 0.1 * ((own[0] - its[0]) - (own[1] - its[1]))
    first = rows_of(tmp_path / "run")[0]
    assert first["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert abs(first["rewards/margins"]) > 0.01, "the two models differ"
    assert result.reference_forwards == (16 if policy == "cached" else 32)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path, tiny_model, tmp_path_factory):
    other = make_model(tmp_path_factory.mktemp("other"), seed=5)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"w9"', '"x9"'))
    plan = make_plan(tmp_path, tiny_model, ROWS, [], reference=reference(model=str(other)), **WHOLE)
    with pytest.raises(UsageError, match=r"stage dpo: reference.model: .* has another vocabulary") as caught:
        run_stage(replace(plan, reference=ModelConfig(name=str(other))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["cached", "adapter_off", "frozen"])
def test_an_sft_adapter_is_the_start_and_the_reference(tmp_path, tiny_model, policy):
    demonstrations = [replace(one, completions=one.completions[:1]) for one in ROWS]
    sft = {**WHOLE, "method": "sft", "loss": {}, "max_steps": 6}
    first = run_stage(make_plan(tmp_path, tiny_model, demonstrations, [], folder="sft", **sft))
    assert (first.final / "adapter_config.json").is_file()
    base, tuned = logps(loaded(tiny_model).model), logps(loaded(first.final).model)
    assert (base[0] - tuned[0]).abs().max() > 0.5, "stage 1 has moved"
    base_run = run_stage(make_plan(tmp_path, tiny_model, ROWS, [], folder="base", max_steps=1, **WHOLE))
    second = run_stage(make_plan(tmp_path, first.final, ROWS, [], reference=reference(policy), max_steps=3, **WHOLE))
    start, *_, last = rows_of(tmp_path / "run")
    assert start["rewards/margins"] == 0.0
    assert start["logps/chosen"] == pytest.approx(tuned[0].mean().item(), abs=1e-4)
    assert abs(start["logps/chosen"] - base_run.metrics["logps/chosen"]) > 0.2, "it is not the base that is compared with"
    # the change that the last step logs is against stage 1: of the policy two updates on, whose figures are in the row
    assert last["logps/chosen_change"] == pytest.approx(last["logps/chosen"] - tuned[0].mean().item(), abs=1e-4)
    assert (second.final / "adapter_config.json").is_file(), "both stages in one adapter on the base"
    assert loaded(second.final).model.preftune_lineage.base == str(tiny_model.resolve())


def mixed(tiny_model, after, alpha):
    """The mean of the weights of the start and of a trained model, by hand, as a model."""
    model, trained = loaded(tiny_model).model, loaded(after).model
    with torch.no_grad():
        for own, its in zip(model.parameters(), trained.parameters(), strict=True):
            own.copy_((1 - alpha) * own.double() + alpha * its.double())
    return model


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_reference_that_follows_is_the_mean_of_the_weights(tmp_path, tiny_model, adapter, alpha):
    plan = {**WHOLE, "adapter": adapter, "reference": reference(sync=SyncConfig(alpha=alpha, every=3))}
    at_3 = run_stage(make_plan(tmp_path, tiny_model, ROWS, [], folder="short", max_steps=3, schedule="constant", **plan))
    run_stage(make_plan(tmp_path, tiny_model, ROWS, [], max_steps=5, schedule="constant", **plan))
    rows = rows_of(tmp_path / "run")
    assert [row["reference/syncs"] for row in rows] == [0, 0, 1, 1, 1]
    assert rows[2]["rewards/margins"] > 0.01
    policy, its = logps(loaded(at_3.final).model), logps(mixed(tiny_model, at_3.final, alpha))
    for side, name in enumerate(("chosen", "rejected")):
        expected = (policy[side] - its[side]).mean().item()
        assert rows[3][f"logps/{name}_change"] == pytest.approx(expected, abs=2e-4)
    if alpha == 1.0:
        assert rows[3]["rewards/margins"] == 0.0, "a copy, bit for bit"
    else:
        still = logps(loaded(tiny_model).model)
        assert abs(rows[3]["logps/chosen_change"] - (policy[0] - still[0]).mean().item()) > 0.05, "it has moved"
        assert abs(rows[3]["rewards/margins"]) < rows[2]["rewards/margins"]


def test_a_soft_update_mixes_products_not_factors(tmp_path, tiny_model, monkeypatch):
    """What would be wrong: A and B averaged one by one give another matrix than the average of B A."""
    plan = {**WHOLE, "reference": reference(sync=SyncConfig(alpha=0.5, every=3)), "schedule": "constant"}
    run_stage(make_plan(tmp_path, tiny_model, ROWS, [], max_steps=4, **plan))
    real = held_module.following
    monkeypatch.setattr(
        "preftune.training.reference.following", lambda *given, is_soft_adapter: real(*given, is_soft_adapter=False)
    )
    run_stage(make_plan(tmp_path, tiny_model, ROWS, [], folder="factors", max_steps=4, **plan))
    right, wrong = rows_of(tmp_path / "run")[3], rows_of(tmp_path / "factors")[3]
    assert abs(right["logps/chosen_change"] - wrong["logps/chosen_change"]) > 1e-3


def stopped_at(step):
    def sink(event):
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return sink


@pytest.mark.parametrize(("adapter", "alpha"), [("lora", 1.0), ("lora", 0.3), ("full", 0.3)])
def test_a_reference_that_follows_is_resumed_bit_for_bit(tmp_path, tiny_model, monkeypatch, adapter, alpha):
    plan = {"adapter": adapter, "checkpoints": 0, "lr": 5e-3, "reference": reference(sync=SyncConfig(alpha=alpha, every=2))}
    run_stage(make_plan(tmp_path, tiny_model, folder="whole", **plan))
    for folder in ("stopped", "forgetful"):
        with pytest.raises(Interrupted):
            run_stage(make_plan(tmp_path, tiny_model, folder=folder, **plan), stopped_at(5))
    held = load_checkpoint(latest(tmp_path / "stopped" / "checkpoints")).reference
    assert held
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    run_stage(make_plan(tmp_path, tiny_model, folder="stopped", resume=True, **plan))
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole")]
    evals = [[row["eval_loss"] for row in of if "eval_loss" in row] for of in rows]
    assert evals[0] == evals[1]
    # the feature off: what TRL does, whose reference restarts from the base
    monkeypatch.setattr(LiveReference, "load", lambda self, tensors: None)
    run_stage(make_plan(tmp_path, tiny_model, folder="forgetful", resume=True, **plan))
    assert losses_of(tmp_path / "forgetful") != losses_of(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["cached", "adapter_off", "frozen"])
def test_a_checkpoint_knows_its_reference(tmp_path, tiny_model, tmp_path_factory, policy):
    plan = {"reference": reference(policy), "checkpoints": 0}
    with pytest.raises(Interrupted):
        run_stage(make_plan(tmp_path, tiny_model, **plan), stopped_at(3))
    other = make_model(tmp_path_factory.mktemp("other"), seed=1)
    with pytest.raises(CheckpointError, match="was made with another reference model"):
        run_stage(make_plan(tmp_path, other, resume=True, **plan))
    assert run_stage(make_plan(tmp_path, tiny_model, resume=True, **plan)).resumed_from == 3


def test_a_reference_model_that_changed_is_not_resumed(tmp_path, tiny_model, tmp_path_factory):
    other = make_model(tmp_path_factory.mktemp("other"), seed=5)
    plan = {"reference": reference("cached", model="other"), "checkpoints": 0}
    with pytest.raises(Interrupted):
        run_stage(replace(make_plan(tmp_path, tiny_model, **plan), reference=ModelConfig(name=str(other))), stopped_at(3))
    changed = loaded(other)
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    save_model(changed.model, changed.tokenizer, other)
    with pytest.raises(CheckpointError, match="was made with another reference model"):
        run_stage(replace(make_plan(tmp_path, tiny_model, resume=True, **plan), reference=ModelConfig(name=str(other))))


GRID = [(lr, beta) for lr in (1e-4, 3e-4, 1e-3, 3e-3) for beta in (0.05, 0.5)]


def test_a_sweep_of_four_rates_and_two_betas_costs_the_reference_once(tmp_path, tiny_model, monkeypatch):
    asked = []
    real = Scorer.token_logps

    def counted(self, pack, **keys):
        if not torch.is_grad_enabled() and pack.num_completions > 2:
            asked.append(pack.num_completions)
        return real(self, pack, **keys)

    monkeypatch.setattr(Scorer, "token_logps", counted)
    plan = {"max_steps": 1, "checkpoints": 0, "evals": 0, "probe": None, "pairs_per_step": 18}
    forwards = []
    for at, (lr, beta) in enumerate(GRID):
        one = make_plan(tmp_path, tiny_model, folder=f"point-{at}", lr=lr, loss={"beta": beta}, **plan)
        before = len(asked)
        forwards.append((run_stage(one).reference_forwards, sum(asked[before:])))
    scored, seen = zip(*forwards, strict=True)
    assert scored == (50, *[0] * 7)
    # besides the reference, each run compares its first pack with plain rows: the same for every point
    assert len(set(seen[1:])) == 1
    assert seen[0] == seen[1] + 50
    # the feature off: a cache of its own for every point
    own = make_plan(tmp_path, tiny_model, folder="own", lr=1e-4, loss={"beta": 0.05}, **plan)
    assert run_stage(replace(own, cache_folder=tmp_path / "another")).reference_forwards == 50
