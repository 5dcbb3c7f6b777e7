"""Adapters on a base of 4 or 8 bits: the reference is that base, and what merges them merges into it dequantised."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses_of, make_examples, make_model, make_plan

from preftune.core.errors import RecipeError
from preftune.core.recipe import LoraConfig, ModelConfig, build_recipe
from preftune.data.pack import pack_of
from preftune.modeling import quantised
from preftune.modeling.export import score, write_export
from preftune.modeling.forward import Scorer
from preftune.modeling.load import MissingPackage, load_model
from preftune.modeling.quantised import NOTE
from preftune.modeling.reference import ReferenceIdentity, weights_digest
from preftune.training.loop import run_stage

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra quant is not installed"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
LORA = LoraConfig(rank=4, alpha=8)
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model", **SHAPE)


def plan_of(tmp_path, model, bits, **changes):
    from dataclasses import replace

    plan = make_plan(tmp_path, model, lora=LORA, warmup=0.0, **changes)
    config = ModelConfig(name=str(model), **({f"load_in_{bits}": True} if bits else {}))
    return replace(plan, loaded=load_model(config, precision="float32"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_stage_trains_on_the_rounded_base(tmp_path, model, bits):
    result = run_stage(plan_of(tmp_path, model, bits, lr=5e-3))
    losses = losses_of(tmp_path / "run")
    assert losses[min(losses)] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are the same rounded base"
    assert losses[max(losses)] < losses[min(losses)]
    assert set(load_file(result.final / "adapter_model.safetensors")), "the adapter alone is saved"
    assert json.loads((result.final / NOTE).read_text())[f"load_in_{bits}"] is True
    dense = run_stage(plan_of(tmp_path, model, None, folder="dense", lr=5e-3))
    assert dense.reference_forwards > 0, "another reference, whose scores were not in the cache"
    assert not (dense.final / NOTE).exists()
    assert losses_of(tmp_path / "dense") != losses


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_merging_goes_through_the_dequantised_base(tmp_path, model, bits):
    final = run_stage(plan_of(tmp_path, model, bits, lr=5e-3)).final
    found = write_export(ModelConfig(name=str(final)), tmp_path / "out", "merged", "float32")
    assert found.is_same
    assert found.largest_gap <= 1e-4
    rows = [([1, 5, 6, 7], [20, 30, 40, 50])]
    (whole,) = score(ModelConfig(name=str(tmp_path / "out")), rows)
    (final / NOTE).unlink()  # the original base instead: another model
    (wrong,) = score(ModelConfig(name=str(final)), rows)
    assert (whole - wrong).abs().max() > 1e-3


def test_a_loaded_adapter_computes_what_was_trained(tmp_path, model):
    """The next stage, an evaluation and the server load a run through the note; in float32 it is the model that trained."""
    plan = plan_of(tmp_path, model, "4bit", lr=5e-3)
    final = run_stage(plan).final
    pack = pack_of(make_examples(4, 3))
    with torch.no_grad():
        trained = Scorer(plan.loaded.model).token_logps(pack)
        again = Scorer(load_model(ModelConfig(name=str(final)), precision="float32").model).token_logps(pack)
    assert (trained - again).abs().max() < 1e-4


def test_evaluation_leaves_the_weights_as_they_are(model):
    """bitsandbytes repacks 4-bit weights for inference on some processors; then nothing would be the same afterwards."""
    loaded = load_model(ModelConfig(name=str(model), load_in_4bit=True), precision="float32").model
    before = weights_digest(loaded)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        without = loaded.eval()(input_ids=ids).logits
    embedded = loaded.get_input_embeddings()(ids).detach().requires_grad_()
    assert torch.equal(loaded(inputs_embeds=embedded).logits.detach(), without)
    assert weights_digest(loaded) == before


def test_the_identity_of_the_reference_holds_bits_and_scales(model):
    def identity(**how):
        loaded = load_model(ModelConfig(name=str(model), **how), precision="float32").model
        return ReferenceIdentity.of(Scorer(loaded)).digest, loaded

    digests = [identity(**how)[0] for how in ({}, {"load_in_4bit": True}, {"load_in_8bit": True})]
    assert len(set(digests)) == 3
    again, loaded = identity(load_in_4bit=True)
    assert again == digests[1]
    layer = next(module for module in loaded.modules() if hasattr(getattr(module, "weight", None), "quant_state"))
    before = weights_digest(loaded)
    layer.weight.quant_state.offset += 0.01
    assert weights_digest(loaded) != before


def test_contradictions_and_a_missing_package_are_one_line(model, monkeypatch):
    base = {"data": "d.jsonl", "method": "dpo"}
    with pytest.raises(RecipeError, match=r"adapter: full trains all weights, and model.load_in_4bit rounds them"):
        build_recipe({**base, "model": {"name": "m", "load_in_4bit": True}, "adapter": "full"}, {"dpo": ()})
    with pytest.raises(RecipeError, match=r"model.load_in_8bit: contradicts load_in_4bit"):
        build_recipe({**base, "model": {"name": "m", "load_in_4bit": True, "load_in_8bit": True}}, {"dpo": ()})
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"load_in_4bit needs the package bitsandbytes; pip install 'preftune\[quant\]'"):
        load_model(ModelConfig(name=str(model), load_in_4bit=True), precision="float32")
