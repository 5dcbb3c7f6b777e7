"""A whole stage on a tiny model: starts as its reference, is reproducible, learns, never scores the reference twice."""

import json
import math
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses_of, make_examples, make_model, make_plan

from preftune.core.errors import CheckpointError, Interrupted, NonFiniteLoss
from preftune.core.events import CheckpointSaved, EvalDone, Progress, StageFinished, StageStarted, StepDone
from preftune.core.files import read_json, read_jsonl
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_of, pack_step
from preftune.maths.losses.base import losses
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.modeling.reference import ReferenceCache, ReferenceIdentity
from preftune.training import prepare as prepare_module
from preftune.training.checkpoint import latest, load_checkpoint
from preftune.training.invariants import InvariantBroken, check_packed_equals_plain, check_start_is_reference
from preftune.training.loop import run_stage
from preftune.training.step import Objective

PLAIN = LoraConfig(rank=4, alpha=8)
TRL_NAMES = {
    "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected",
}  # fmt: skip
AGAINST_REFERENCE = {f"logps/{side}_change{unit}" for side in ("chosen", "rejected") for unit in ("", "_per_token")}


@pytest.mark.parametrize("shared_prefix", ["auto", "off"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_first_step_starts_at_the_reference(tmp_path, tiny_model, adapter, shared_prefix):
    plan = make_plan(tmp_path, tiny_model, adapter=adapter, lora=PLAIN, shared_prefix=shared_prefix, max_steps=2, warmup=0.0)
    run_stage(plan)
    first, second = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert first["rewards/margins"] == 0.0
    assert first["rewards/chosen"] == 0.0
    assert first["rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert second["rewards/margins"] != 0.0, "the second step is somewhere else"
    assert TRL_NAMES | AGAINST_REFERENCE | {
        "pairs_per_second",
        "tokens_per_second",
        "peak_memory_gb",
        "elapsed_s",
        "step",
    } == set(first)


def test_events_and_rows_tell_the_same(tmp_path, tiny_model):
    seen = []
    result = run_stage(make_plan(tmp_path, tiny_model), seen.append)
    kinds = [type(event) for event in seen if not isinstance(event, Progress)]
    assert kinds[0] is StageStarted
    assert kinds[-1] is StageFinished
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [event for event in seen if isinstance(event, StepDone)]
    assert [dict(event.metrics) | {"step": event.step} for event in steps] == [row for row in rows if "loss" in row]
    evals = [event for event in seen if isinstance(event, EvalDone) and "eval_loss" in event.metrics]
    assert [event.step for event in evals] == [5, 10]
    assert all(name.startswith("eval_") for event in evals for name in event.metrics)
    probes = [event for event in seen if isinstance(event, EvalDone) and event not in evals]
    assert [dict(event.metrics) | {"step": event.step} for event in probes] == [row for row in rows if "probe/entropy" in row]
    assert [event.step for event in probes] == [0, 5, 10]
    assert [event.step for event in seen if isinstance(event, CheckpointSaved)] == [2, 5, 8]
    assert result.metrics["eval_loss"] == evals[-1].metrics["eval_loss"]
    assert result.metrics["loss"] == steps[-1].metrics["loss"]
    assert steps[-1].metrics["epoch"] == 2.0
    assert steps[-1].metrics["num_tokens"] == 2 * sum(example.num_tokens for example in make_examples(18))
    assert (result.final / "adapter_config.json").is_file()
    assert (result.final / "tokenizer.json").is_file()


@pytest.mark.parametrize(("method", "adapter"), [("dpo", "lora"), ("dpo", "full"), ("sft", "lora"), ("sft", "full")])
def test_a_stage_learns(tmp_path, tiny_model, method, adapter):
    rows = make_examples(8, completions=1 if method == "sft" else 2)
    changes = {"loss": {} if method == "sft" else {"beta": 0.1}, "lora": PLAIN, "lr": 5e-3, "epochs": 12.0, "checkpoints": 0}
    result = run_stage(make_plan(tmp_path, tiny_model, rows, [], method=method, adapter=adapter, **changes))
    found = losses_of(tmp_path / "run")
    assert found[24] < 0.7 * found[1]
    if method == "dpo":
        assert result.metrics["rewards/accuracies"] == 1.0
    trained = load_model(ModelConfig(name=str(result.final)), precision="float32").model
    start = load_model(ModelConfig(name=str(tiny_model)), precision="float32").model
    gap = (Scorer(trained).token_logps(pack_of(rows)) - Scorer(start).token_logps(pack_of(rows))).abs().max()
    assert gap > 0.05, "the final model is another than the start"


def test_the_final_model_scores_as_the_trained_one_did(tmp_path, tiny_model):
    result = run_stage(make_plan(tmp_path, tiny_model, lora=PLAIN, lr=5e-3))
    select = make_examples(7, 1, prefix="select")
    model = load_model(ModelConfig(name=str(result.final)), precision="float32").model
    scorer = Scorer(model)
    pack = pack_of(select)
    sums = torch.zeros(14).index_add(0, torch.from_numpy(pack.segments), scorer.token_logps(pack).detach())
    assert sums[0::2].mean().item() == pytest.approx(result.metrics["eval_logps/chosen"], abs=1e-4)
    assert sums[1::2].mean().item() == pytest.approx(result.metrics["eval_logps/rejected"], abs=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, tiny_model):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)  # what the process drew before does not matter
        run_stage(make_plan(tmp_path, tiny_model, folder=folder, seed=seed, checkpoints=0))
    weights = {folder: (tmp_path / folder / "final" / "adapter_model.safetensors").read_bytes() for folder in "abc"}
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert weights["a"] == weights["b"]
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")
    assert weights["a"] != weights["c"]


def test_tokens_per_pack_changes_nothing_but_rounding(tmp_path, tiny_model):
    for folder, tokens in (("tiny", 1), ("huge", 10**6)):
        run_stage(make_plan(tmp_path, tiny_model, folder=folder, lora=PLAIN, tokens_per_pack=tokens))
    rows = {name: read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("tiny", "huge")}
    for one, other in zip(rows["tiny"], rows["huge"], strict=True):
        for key in set(one) - {"pairs_per_second", "tokens_per_second", "peak_memory_gb", "elapsed_s"}:
            assert one[key] == pytest.approx(other[key], abs=2e-4), (one["step"], key)


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_model):
    for folder, is_on in (("off", False), ("on", True)):
        run_stage(
            make_plan(
                tmp_path, tiny_model, folder=folder, lora=PLAIN, gradient_checkpointing="on" if is_on else "off", max_steps=4
            )
        )
    assert losses_of(tmp_path / "on") == pytest.approx(losses_of(tmp_path / "off"), abs=1e-6)


CHANGES = {
    "lr": {"lr": 5e-4},
    "beta": {"loss": {"beta": 0.4}},
    "options": {"loss": {"beta": 2.0, "length_normalised": True, "rpo_alpha": 0.1}},
    "seed": {"seed": 3},
    "rank": {"lora": LoraConfig(rank=2, alpha=4)},
    "epochs": {"epochs": 3.0},
    "folder and step": {"pairs_per_step": 3},
    "packs": {"tokens_per_pack": 300},
}


def test_the_reference_is_never_scored_twice(tmp_path, tiny_model):
    first = run_stage(make_plan(tmp_path, tiny_model))
    assert first.reference_forwards == 2 * (18 + 7), "both completions of every training and held-out pair"
    for name, changes in CHANGES.items():
        again = run_stage(make_plan(tmp_path, tiny_model, folder=name, **changes))
        assert again.reference_forwards == 0, name


def test_what_changes_the_reference_scores_it_again(tmp_path, tiny_model, tmp_path_factory):
    """The cache off, and what must not be served from it: another model, other rows."""
    run_stage(make_plan(tmp_path, tiny_model, max_steps=5))
    other = make_model(tmp_path_factory.mktemp("other"), seed=9)
    assert run_stage(make_plan(tmp_path, other, folder="model", max_steps=5)).reference_forwards == 50
    more = [*make_examples(18), *make_examples(2, 77, prefix="more")]
    assert run_stage(make_plan(tmp_path, tiny_model, more, folder="rows")).reference_forwards == 4
    shutil.rmtree(tmp_path / "cache")
    assert run_stage(make_plan(tmp_path, tiny_model, folder="again")).reference_forwards == 50


def test_a_first_pack_with_scores_of_an_earlier_run_is_not_held_to_equality(tmp_path, tiny_model):
    """The chosen completions were scored in other packs by a run on other pairs: they may differ by rounding, and no more."""
    rows = make_examples(18)
    run_stage(make_plan(tmp_path, tiny_model, rows, pairs_per_step=18, max_steps=2))
    others = make_examples(18, 77)
    mixed = [
        replace(one, completions=(one.completions[0], other.completions[1])) for one, other in zip(rows, others, strict=True)
    ]
    again = run_stage(make_plan(tmp_path, tiny_model, mixed, folder="mixed", pairs_per_step=5, max_steps=2))
    assert again.facts["start_gap"] < 1e-4
    twice = [mixed[0], replace(mixed[0], completions=(mixed[0].completions[0], others[3].completions[0])), *mixed[1:]]
    fresh = make_plan(tmp_path / "twice", tiny_model, twice, pairs_per_step=2, shuffle=False, max_steps=2)
    assert run_stage(fresh).facts["start_gap"] < 1e-4  # a completion that two pairs of the pack share is kept once


@pytest.mark.parametrize("change", ["held", "twice"])
def test_a_pack_is_new_only_as_a_whole(tmp_path, tiny_model, change):
    scorer = Scorer(load_model(ModelConfig(name=str(tiny_model)), precision="float32").model)
    cache = ReferenceCache(tmp_path, ReferenceIdentity.of(scorer))
    one, two = make_examples(2)
    assert cache.is_new(pack_of([one, two]))
    if change == "held":
        cache.fill(pack_of([replace(one, completions=one.completions[:1])]), scorer)
        assert len(cache.lookup([one, two])) == 2, "each has a completion that is missing"
        assert not cache.is_new(pack_of([one, two]))
    else:
        shared = replace(two, prompt_ids=one.prompt_ids, completions=(one.completions[0], two.completions[1]))
        assert not cache.is_new(pack_of([one, shared]))


def test_sft_scores_no_reference(tmp_path, tiny_model):
    result = run_stage(make_plan(tmp_path, tiny_model, method="sft", loss={}, max_steps=2))
    assert result.reference_forwards == 0
    assert not (tmp_path / "cache").exists()
    assert set(result.metrics) >= {"loss", "eval_loss"}
    assert not any("rewards" in name for name in result.metrics)


def test_stopping_while_the_reference_is_scored_keeps_what_was_scored(tmp_path, tiny_model):
    import os
    import signal

    def sink(event):
        if isinstance(event, Progress) and event.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="while the reference was scored"):
        run_stage(make_plan(tmp_path, tiny_model, tokens_per_pack=40), sink)
    result = run_stage(make_plan(tmp_path, tiny_model, tokens_per_pack=40, resume=True))
    assert 0 < result.reference_forwards < 50


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_bfloat16(tmp_path, tiny_model, adapter):
    plan = make_plan(tmp_path, tiny_model, precision="bfloat16", adapter=adapter, lora=PLAIN, lr=5e-3, epochs=6.0)
    result = run_stage(plan)
    found = losses_of(tmp_path / "run")
    assert found[1] == pytest.approx(math.log(2), abs=1e-6), "the reference was scored by the same kernels"
    assert min(found.values()) < 0.6
    checkpoint = load_checkpoint(latest(tmp_path / "run" / "checkpoints"))
    assert {tensor.dtype for tensor in checkpoint.parameters.values()} == {torch.float32}
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    expected = torch.float32 if adapter == "lora" else torch.bfloat16
    assert {tensor.dtype for tensor in load_file(result.final / name).values()} == {expected}


def test_a_loss_that_is_not_finite_names_the_pairs(tmp_path, tiny_model):
    plan = make_plan(tmp_path, tiny_model, lr=1e30, warmup=0.0, checkpoints=9, max_grad_norm=None)
    words = r"step \d: .*so the optimiser took no step; at fault: train.jsonl:\d+ \(example train-"
    with pytest.raises(NonFiniteLoss, match=words) as caught:
        run_stage(plan)
    assert "\n" not in str(caught.value)
    kept = read_json(tmp_path / "run" / "nonfinite.json")
    assert kept["is_alone"]
    assert {"file", "line", "example_id", "gave"} == set(kept["examples"][0])
    assert kept["step"] not in losses_of(tmp_path / "run"), "the step did not happen"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == kept["step"] - 1


def objective_of(tiny_model, shift):
    scorer = Scorer(load_model(ModelConfig(name=str(tiny_model)), precision="float32").model)
    pack = pack_step(make_examples(4), 10**6)[0]
    return Objective(scorer, losses.build("dpo"), lambda pack: scorer.token_logps(pack).detach() + shift), pack


def test_a_start_that_is_not_the_reference_is_refused(tiny_model):
    assert check_start_is_reference(*objective_of(tiny_model, 0.0), is_exact=True) == 0.0
    with pytest.raises(InvariantBroken, match=r"differ by .*e-05 nats at most .*\(allowed 0 and 0\)"):
        check_start_is_reference(*objective_of(tiny_model, 1e-5), is_exact=True)
    assert 0 < check_start_is_reference(*objective_of(tiny_model, 1e-5), is_exact=False) < 1e-4
    with pytest.raises(InvariantBroken, match=r"differ by 0\.1 nats"):
        check_start_is_reference(*objective_of(tiny_model, 0.1), is_exact=False)


def test_a_packed_forward_that_is_wrong_is_refused(tiny_model, monkeypatch):
    objective, pack = objective_of(tiny_model, 0.0)
    assert objective.scorer.is_shared
    assert 0 <= check_packed_equals_plain(objective.scorer, pack) < 1e-4
    real = Scorer.token_logps
    monkeypatch.setattr(Scorer, "token_logps", lambda self, pack: real(self, pack) + 0.01 * self.is_shared)
    with pytest.raises(InvariantBroken, match=r"packed log-probabilities differ from plain ones by 0\.01"):
        check_packed_equals_plain(objective.scorer, pack)


def test_a_broken_start_stops_the_run(tmp_path, tiny_model, monkeypatch):
    """The reference of another model under this one's name: the run must not begin."""
    real = prepare_module.score_reference

    def wrong(*args, **kwargs):
        return Shifted(real(*args, **kwargs))

    class Shifted:
        def __init__(self, reference):
            self.inner, self.is_fresh, self.is_start = reference, reference.is_fresh, reference.is_start

        def scores(self, pack):
            return self.inner.scores(pack) - 0.2

        def meet(self, pack):
            self.inner.meet(pack)

    monkeypatch.setattr(prepare_module, "score_reference", wrong)
    with pytest.raises(InvariantBroken, match="does not start as its reference"):
        run_stage(make_plan(tmp_path, tiny_model))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, tiny_model, small_disk):
    run_stage(make_plan(tmp_path, tiny_model, folder="whole"))

    def fill(event):
        if isinstance(event, CheckpointSaved) and event.step == 2:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(free - 40_000))

    with pytest.raises(
        CheckpointError, match=r"step-000005 cannot be written: no space left on the disk; .*step 2 is intact"
    ) as caught:
        run_stage(make_plan(tmp_path, tiny_model, folder="disk/run"), fill)
    assert "\n" not in str(caught.value)
    root = small_disk / "run" / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-000002"], "nothing half-written is left"
    load_checkpoint(latest(root))
    (small_disk / "filler").unlink()
    assert run_stage(make_plan(tmp_path, tiny_model, folder="disk/run", resume=True)).resumed_from == 2
    assert losses_of(small_disk / "run") == losses_of(tmp_path / "whole")
