"""Preflight: each blocker and warning fires on its own fact, and none on a sound stage."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from preftune.core.recipe import LoraConfig, StageConfig
from preftune.core.records import Provenance, TokenisedCompletion, TokenisedExample
from preftune.data.split import Leak, leaks
from preftune.training.model_files import check_model, num_parameters_of
from preftune.training.preflight import check_leaks, check_stage


def example(token, prefix="train"):
    answers = tuple(TokenisedCompletion((token, other, 2), (True, True, True)) for other in (7, 8))
    return TokenisedExample(f"{prefix}{token}", (1, token), answers, provenance=Provenance(f"{prefix}.jsonl", token))


@dataclass
class Data:
    train: list = field(default_factory=lambda: [example(token) for token in range(10, 74)])
    select: list = field(default_factory=lambda: [example(token, "select") for token in range(80, 90)])
    counts: dict = field(default_factory=dict)
    has_chat_rows: bool = False


def found(config=None, data=None, has_chat_template=True):
    config = StageConfig(name="dpo", **(config or {}))
    return {one.code: one for one in check_stage(config, data or Data(), has_chat_template=has_chat_template)}


def test_a_sound_stage_has_no_findings():
    assert found() == {}
    assert found({"method": "sft"}) == {}
    assert found({"adapter": "full"}) == {}


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"lr": 1e-3}, "unusual_lr", "lr 0.001 is outside what is published for dpo with lora"),
        ({"lr": 1e-4, "adapter": "full"}, "unusual_lr", "dpo with full"),
        ({"method": "sft", "lr": 1e-7}, "unusual_lr", "sft with lora"),
        ({"loss": {"beta": 3.0}}, "unusual_beta", "beta 3 is outside what is published for log-ratios summed over tokens"),
        (
            {"loss": {"length_normalised": True}},
            "unusual_beta",
            "beta 0.1 is outside what is published for log-ratios divided by",
        ),
        ({"epochs": 6}, "many_epochs", "6 epochs"),
        ({"lora": LoraConfig(dropout=0.1)}, "dropout", "dropout 0.1"),
    ],
)
def test_unusual_settings_are_warnings(config, code, words):
    findings = found(config)
    assert list(findings) == [code]
    assert findings[code].level == "warning"
    assert words in findings[code].fact
    assert findings[code].way_out


def test_usual_settings_are_not():
    assert found({"loss": {"beta": 5.0, "length_normalised": True}}) == {}
    assert found({"lr": 5e-6}) == {}


def test_nothing_left_to_train_on():
    finding = found(data=Data(train=[], counts={"too_long": 3, "identical": 1}))["nothing_to_train"]
    assert finding.level == "blocker"
    assert "identical 1, too_long 3" in finding.fact


def test_no_chat_template():
    assert found(data=Data(train=[], has_chat_rows=True), has_chat_template=False)["no_chat_template"].level == "blocker"
    assert found(data=Data(has_chat_rows=True)) == {}
    assert found(has_chat_template=False) == {}


def test_leakage_between_train_and_select():
    leaky = Data(select=[example(80, "select"), example(12, "select")])
    finding = found(data=leaky)["leakage"]
    assert finding.level == "blocker"
    assert "1 of 2 held-out examples" in finding.fact
    assert "select.jsonl:12" in finding.fact


def test_leakage_of_verdict_prompts():
    assert check_leaks([], "a", "b") == []
    found = leaks(["Tell me a story", "Sing"], ["sing", "Dance", "tell me a  story"])
    (finding,) = check_leaks(found, "stage 1's training data", "the verdict prompts")
    assert (finding.level, finding.code) == ("blocker", "leakage")
    assert "2 of the verdict prompts are also in stage 1's training data (the first: number 1 is number 2 there)" in finding.fact
    (finding,) = check_leaks([Leak(0, 4, "near", 0.9)], "a", "b")
    assert (finding.level, finding.code) == ("warning", "near_leakage")


def test_nothing_held_out_is_a_warning():
    assert found(data=Data(select=[]))["empty_select"].level == "warning"
    assert found({"evals": 0}, Data(select=[])) == {}


@pytest.mark.parametrize("changes", [{"keep": "best"}, {"early_stopping": {"patience": 1}}, {"keep": "best", "evals": 0}])
def test_choosing_by_nothing_is_refused_before_anything_is_trained(changes):
    data = Data() if changes.get("evals") == 0 else Data(select=[])
    assert found(changes, data)["nothing_to_choose_by"].level == "blocker"
    assert "nothing_to_choose_by" not in found(changes | {"evals": 2})


def test_one_step_of_warm_up_learns_nothing():
    one = Data(train=[example(10)])
    assert found(data=one)["no_learning"].level == "blocker"
    assert found({"warmup": 0.0}, one) == {}


def model_folder(path, *, config=None, weights=True):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if weights:
        save_file({"w": np.zeros(100, dtype=np.float32)}, path / "model.safetensors")
    return path


def test_a_sound_model_folder(tmp_path):
    assert check_model(str(model_folder(tmp_path / "m"))) == []


def test_a_model_that_is_not_there(tmp_path):
    (finding,) = check_model(str(tmp_path / "nothing"))
    assert (finding.level, finding.code) == ("blocker", "no_model")


def test_weights_that_are_missing(tmp_path):
    folder = model_folder(tmp_path / "m", weights=False)
    (finding,) = check_model(str(folder))
    assert (finding.code, "no weights" in finding.fact) == ("missing_file", True)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (finding,) = check_model(str(folder))
    assert "only pytorch_model.bin, which is not read" in finding.fact


def test_a_shard_that_is_missing(tmp_path):
    folder = model_folder(tmp_path / "m")
    weight_map = {"a": "model.safetensors", "b": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (finding,) = check_model(str(folder))
    assert "lacks 1 of its 2 weight files, first model-00002.safetensors" in finding.fact


def test_truncated_weights(tmp_path):
    folder = model_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    (finding,) = check_model(str(folder))
    assert (finding.code, "model.safetensors is truncated or damaged" in finding.fact) == ("damaged_file", True)
    assert "\n" not in str(finding)


def test_a_package_that_is_missing(tmp_path, monkeypatch):
    from preftune.training import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    folder = model_folder(tmp_path / "m", config={"quantization_config": {"quant_method": "bitsandbytes"}})
    (finding,) = check_model(str(folder))
    assert (finding.code, "needs the package bitsandbytes" in finding.fact) == ("missing_dependency", True)
    monkeypatch.setattr(model_files, "find_spec", lambda name: object())
    assert check_model(str(folder)) == []


def test_published_learning_rates_say_nothing_of_tiny_models():
    config = StageConfig(name="dpo", adapter="full", lr=1e-4)
    codes = [
        [one.code for one in check_stage(config, Data(), has_chat_template=True, num_parameters=size)]
        for size in (None, 10**9, 10**6)
    ]
    assert ["unusual_lr" in found for found in codes] == [True, True, False]


def test_parameters_are_counted_from_the_headers(starter_model):
    assert num_parameters_of(str(starter_model)) == num_parameters_of("starter") > 1_000_000
    assert num_parameters_of("org/name") is None


@pytest.mark.parametrize(("share", "loss", "is_found"), [(2, {}, False), (4, {}, True), (4, {"lambda_d": "auto"}, False)])
def test_unbalanced_labels_are_doubted(share, loss, is_found):
    rows = [replace(example(token), labels=(token % share == 0,) * 2) for token in range(10, 74)]
    codes = found({"method": "kto", "loss": loss}, Data(train=rows))
    assert ("label_weights" in codes) is is_found
    if is_found:
        assert codes["label_weights"].level == "warning"
        assert "0.333" in codes["label_weights"].fact


@pytest.mark.parametrize(
    ("method", "is_said"), [("sppo_hard", True), ("aot", True), ("dpo", False), ("wpo", False), ("sft", False)]
)
def test_confidences_that_the_loss_does_not_read_are_a_warning(method, is_said):
    data = Data()
    data.train[3:5] = [replace(one, confidence=0.7) for one in data.train[3:5]]
    data.train[9] = replace(data.train[9], confidence=1.0)
    findings = found({"method": method, "loss": {}}, data)
    assert ("confidence_not_read" in findings) is is_said
    if is_said:
        said = findings["confidence_not_read"]
        assert said.level == "warning"
        assert f"{method} does not read how sure a label is, so 2 of 64 pairs with a confidence below 1" in said.fact
        assert "first train.jsonl:13 (0.7)" in said.fact
        assert "such as dpo" in said.way_out
    assert "confidence_not_read" not in found({"method": method, "loss": {}}, Data())
