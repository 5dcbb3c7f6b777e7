"""Checkpointing and offloading: the same bits, less memory; chosen by hand, or where the largest pack would not fit."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import losses_of, make_examples, make_model, make_plan

from preftune.core.errors import UsageError
from preftune.core.events import Noted
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import cropped, pack_of
from preftune.modeling import activations
from preftune.modeling.activations import keep_layer_inputs, kept_bytes
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.modeling.machine import MemoryLimit
from preftune.training import saving
from preftune.training.loop import run_stage

PLAIN = LoraConfig(rank=4, alpha=8)


@pytest.fixture
def deep_model(tmp_path):
    """Six layers, wide inside, so that layer inputs are a small part of what a forward pass keeps."""
    return make_model(tmp_path / "deep", num_hidden_layers=6, intermediate_size=256)


def scorer_of(folder, place=None, where=None, *, is_checkpointed=True):
    loaded = load_model(ModelConfig(name=str(folder)), precision="float32")
    scorer = Scorer(loaded.model)
    if is_checkpointed:
        keep_layer_inputs(loaded.model, place, where)
    return scorer


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_setting_trains_the_same_model(tmp_path, tiny_model, monkeypatch, adapter):
    monkeypatch.setattr(activations, "LEAST_BYTES", 0)
    settings = {
        "off": {"gradient_checkpointing": "off"},
        "on": {"gradient_checkpointing": "on"},
        "disk": {"activation_offloading": "disk"},
    }
    facts = {}
    for name, setting in settings.items():
        changes = {"adapter": adapter, "lora": PLAIN, "max_steps": 4, **setting}
        facts[name] = run_stage(make_plan(tmp_path, tiny_model, folder=name, **changes)).facts
    assert [facts[name]["gradient_checkpointing"] for name in settings] == ["off", "on", "on"]
    assert losses_of(tmp_path / "on") == losses_of(tmp_path / "off") == losses_of(tmp_path / "disk")
    file = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    weights = {name: load_file(tmp_path / name / "final" / file) for name in settings}
    assert all(torch.equal(one, weights["off"][key]) for name in settings for key, one in weights[name].items())
    assert not list((tmp_path / "disk" / "activations").iterdir()), "files without names leave nothing behind"


@pytest.mark.parametrize("is_training", [True, False])
def test_checkpointing_keeps_layer_inputs_alone(deep_model, is_training):
    pack = pack_of(make_examples(8))
    sizes = {}
    for is_on in (False, True):
        scorer = scorer_of(deep_model, is_checkpointed=is_on)
        scorer.model.train(is_training)
        sizes[is_on] = kept_bytes(scorer, pack)
        assert all(module.training == is_training for module in scorer.model.modules())
    inputs = len(pack.ids) * 6 * 32 * 4  # tokens x layers x width x float32
    assert sizes[False] > 10 * inputs
    assert inputs <= sizes[True] < 4 * inputs


@pytest.mark.parametrize("place", [None, "disk"])
def test_what_a_pass_kept_is_freed(deep_model, tmp_path, place):
    """A node of a graph that holds its own output, by what a hook gives back, would stay for the whole run."""
    scorer = scorer_of(deep_model, place, tmp_path, is_checkpointed=place is not None)
    outputs = []
    for layer in scorer.model.base_model.layers:
        layer.register_forward_hook(lambda _module, _given, output: outputs.append(weakref.ref(output)))
    pack = pack_of(make_examples(8))
    kept_bytes(scorer, pack)
    scorer.token_logps(pack)
    gc.collect()
    assert len(outputs) == 12
    assert not [one for one in outputs if one() is not None]


def test_offloading_keeps_next_to_nothing_and_gives_the_same_gradients(deep_model, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "LEAST_BYTES", 0)
    pack = pack_of(make_examples(8))
    sizes = []
    write = activations.DiskFile.write

    def note(file, tensor):
        sizes.append(tensor.nbytes)
        return write(file, tensor)

    monkeypatch.setattr(activations.DiskFile, "write", note)
    gradients = []
    for place in (None, "disk"):
        scorer = scorer_of(deep_model, place, tmp_path / "offloaded")
        torch.autograd.backward(scorer.token_logps(pack).sum())
        gradients.append({name: one.grad for name, one in scorer.model.named_parameters()})
        assert bool(sizes) == (place == "disk")
    assert sum(sizes) >= len(pack.ids) * 6 * 32 * 4, "tokens x layers x width x float32"
    for name, one in gradients[0].items():
        assert torch.equal(one, gradients[1][name]), name


def test_bfloat16_comes_back_from_the_disk_as_it_went(tmp_path):
    file = activations.DiskFile(tmp_path)
    tensors = [torch.randn(7, 5).bfloat16(), torch.arange(6).view(2, 3).t(), torch.randn(3), torch.tensor(True)]
    places = [file.write(one) for one in tensors]
    for one, place in zip(tensors, places, strict=True):
        assert torch.equal(place.read(), one)
        assert place.read().dtype == one.dtype


def test_auto_checkpoints_where_the_largest_pack_would_not_fit(tmp_path, tiny_model, monkeypatch):
    roomy = run_stage(make_plan(tmp_path, tiny_model, folder="roomy", max_steps=1))
    assert roomy.facts["gradient_checkpointing"] == "off"
    monkeypatch.setattr(saving, "memory_limit", lambda device: MemoryLimit(saving.held_bytes(device), "test's memory"))
    seen = []
    tight = run_stage(make_plan(tmp_path, tiny_model, folder="tight", max_steps=1), seen.append)
    assert tight.facts["gradient_checkpointing"] == "on"
    (said,) = [event for event in seen if isinstance(event, Noted) and event.code == "checkpointing"]
    assert "would keep" in said.message
    assert "the test's memory is" in said.message
    assert losses_of(tmp_path / "roomy") == losses_of(tmp_path / "tight")


def test_frozen_weights_are_laid_out_where_there_is_room(tmp_path, tiny_model, monkeypatch):
    """Three runs of the same bits: with room, without it, and with what is checkpointed anyway."""

    def trained(name, **changes):
        plan = make_plan(tmp_path, tiny_model, folder=name, max_steps=3, lora=PLAIN, **changes)
        plan = replace(plan, loaded=load_model(ModelConfig(name=str(tiny_model)), precision="bfloat16"))
        return run_stage(plan).facts["laid_out_weights_bytes"]

    frozen = [
        one for one in load_model(ModelConfig(name=str(tiny_model)), precision="bfloat16").model.parameters() if one.dim() == 2
    ]
    taken = trained("roomy")
    # where everything else fits and these copies do not, though they are a small part of the memory
    held = saving.held_bytes
    monkeypatch.setattr(saving, "held_bytes", lambda _device: taken * 99)
    monkeypatch.setattr(saving, "memory_limit", lambda _device: MemoryLimit(taken * 1000, "test's memory"))
    assert trained("fits", gradient_checkpointing="off") == taken
    monkeypatch.setattr(saving, "held_bytes", lambda _device: taken * 850)
    assert trained("full", gradient_checkpointing="off") == 0
    monkeypatch.setattr(saving, "held_bytes", held)
    monkeypatch.setattr(saving, "memory_limit", lambda _device: MemoryLimit(taken * 9, "test's memory"))
    assert trained("tight", gradient_checkpointing="off") == 0
    assert trained("checkpointed", gradient_checkpointing="on") == 0
    assert 0 < taken <= 2 * sum(one.nbytes for one in frozen)
    assert losses_of(tmp_path / "roomy") == losses_of(tmp_path / "tight") == losses_of(tmp_path / "checkpointed")


def test_what_the_largest_pack_keeps_is_foreseen_from_a_small_one(deep_model):
    """From at most a thousand tokens to packs of twice as many and to one long pair."""
    scorer = scorer_of(deep_model, is_checkpointed=False)
    config = make_plan(deep_model.parent, deep_model, pairs_per_step=64, tokens_per_pack=2000).config
    short = make_examples(200)
    foreseen = saving.need_of(scorer, config, short)
    pack = pack_of(sorted(short, key=lambda one: -one.num_tokens)[:55])
    actual = kept_bytes(scorer, pack) * foreseen.tokens / len(pack.ids)
    assert foreseen.activations == pytest.approx(actual, rel=0.25)
    assert foreseen.tokens == pytest.approx(2000, rel=0.2)


def test_the_host_is_refused_without_a_gpu(tmp_path, tiny_model):
    with pytest.raises(UsageError, match=r"activation_offloading: host .* this stage runs on the CPU; write disk or off"):
        run_stage(make_plan(tmp_path, tiny_model, activation_offloading="host"))


def test_a_cropped_example_keeps_the_join():
    (example,) = make_examples(1)
    assert cropped(example, 100) is example
    short = cropped(example, 8)
    assert short.num_tokens <= 8
    assert example.prompt_ids[-len(short.prompt_ids) :] == short.prompt_ids
    assert all(one.ids == whole.ids[: len(one.ids)] for one, whole in zip(short.completions, example.completions, strict=True))
