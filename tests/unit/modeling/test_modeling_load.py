"""Loading: what comes in, one line for what cannot, and adapters whose history is kept."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from preftune.core.errors import BadRow, InputError
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.core.records import Message
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.lineage import lineage_of, save_model
from preftune.modeling.load import NO_LIMIT, load_info, load_model, load_tokenizer, model_path, read_max_positions
from preftune.modeling.quiet import quiet
from preftune.modeling.sharing import probe_pack

WORDS = ["<unk>", "<bos>", "<eos>", "<end>", "user", "assistant", "hello", "world", "a", "preftune", ":"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }} : {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
TINY: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "attention_dropout": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: tiny Llama, word tokenizer, chat template."""
    folder = tmp_path_factory.mktemp("model") / "m"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = TEMPLATE
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


def config(folder: Path, **more: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), **more)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_folder_loads_in_the_precision_asked_for(folder: Path, precision: Any, dtype: torch.dtype) -> None:
    loaded = load_model(config(folder), precision=precision)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.max_positions == 32 == read_max_positions(config(folder))
    assert not loaded.model.training
    assert load_info(loaded)["architecture"] == "LlamaForCausalLM"


def test_dropout_is_off(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.2
    assert load_model(config(folder), precision="float32").model.config.attention_dropout == 0.0


def test_the_starter_has_a_name() -> None:
    assert Path(model_path("starter")).name == "model"


def test_tokenizer_is_the_port(folder: Path) -> None:
    tokenizer = load_tokenizer(config(folder))
    assert tokenizer.bos_id == 1
    assert tokenizer.end_id == 2
    assert tokenizer.eos_ids == {2, 7, 3}  # its own, the generation config's, and the template's turn end
    assert tokenizer.has_chat_template
    text = tokenizer.render([Message("user", "hello")], add_generation_prompt=True)
    assert text == "user : hello <end> assistant : "
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False) == [4, 10, 6, 3, 5, 10]
    assert [text[start:stop] for start, stop in offsets] == ["user", ":", "hello", "<end>", "assistant", ":"]
    assert tokenizer.decode([6, 7, 3]) == "hello world"
    assert tokenizer.decode([6, 3], skip_special_tokens=False) == "hello <end>"
    with pytest.raises(BadRow, match="no tools here"):
        tokenizer.render([Message("tool", "x")], add_generation_prompt=False)


def test_identity_follows_vocabulary_and_template(folder: Path, tmp_path: Path) -> None:
    first = load_tokenizer(config(folder)).identity
    assert load_tokenizer(config(folder)).identity == first
    file = tmp_path / "other.jinja"
    file.write_text(TEMPLATE.replace("user", "USER").replace(" : ", " "))
    other = load_tokenizer(config(folder, chat_template=str(file)))
    assert other.identity != first
    assert other.render([Message("user", "hello")], add_generation_prompt=False) == "user hello <end> "


def test_a_template_of_that_name_must_exist(folder: Path) -> None:
    with pytest.raises(InputError, match="chatml"):
        load_tokenizer(config(folder, chat_template="no-such-file.jinja"))
    assert load_tokenizer(config(folder, chat_template="chatml")).has_chat_template


def test_a_long_text_is_encoded_without_talk(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(config(folder))
    assert len(tokenizer.encode("hello " * 500, add_special_tokens=False)) == 500
    assert len(tokenizer.encode_with_offsets("hello " * 500, add_special_tokens=False)[0]) == 500
    assert capfd.readouterr().err == ""


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))

    return change


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut("model.safetensors"), "truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "neither config.json nor adapter_config.json"),
        (cut("config.json"), "cannot be read as JSON"),
        (edit("config.json", model_type="no-such-type"), "no-such-type"),
        (edit("config.json", vision_config={"hidden_size": 8}), "'vision_config'"),
        (edit("config.json", is_encoder_decoder=True), "'is_encoder_decoder'"),
        (edit("config.json", hidden_size=20), "cannot be loaded"),
        (edit("config.json", vocab_size=5), "cannot be loaded|do not match"),
        (drop_a_weight, r"model\.norm\.weight"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "."),
        (cut("tokenizer.json"), "cannot be loaded"),
        (edit("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil"), "."),
    ],
)
def test_damage_is_one_line(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    load_model(config(folder), precision="float32")  # whole, it loads
    damage(folder)
    with pytest.raises(InputError, match=says) as caught:
        load_model(config(folder), precision="float32")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder)) or "config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing-here", "/nothing/here", "a/b/c", "no-such-model-anywhere-7f3a"])
def test_nothing_there_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.modeling.load._hub_answers", lambda: False)
    with pytest.raises(InputError, match=f"^{name}: ") as caught:
        load_model(ModelConfig(name=name), precision="float32")
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        load_model(ModelConfig(name=str(folder / "config.json")), precision="float32")


def train_a_little(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_adapters_of_two_stages_are_saved_as_one(folder: Path, tmp_path: Path) -> None:
    """Stage 2 starts from, and its file contains, what stage 1 trained; other layers and another rank do not matter."""
    base = load_model(config(folder), precision="float32")
    pack = probe_pack(base.model)
    with torch.no_grad():
        untrained = Scorer(base.model).token_logps(pack)
        first = add_lora(base.model, LoraConfig(rank=2, alpha=3.0, target_modules=("q_proj", "up_proj")), 0)
        train_a_little(first, 1)
        after_first = Scorer(first).token_logps(pack)
        save_model(first, base.tokenizer, tmp_path / "one")

        loaded = load_model(config(tmp_path / "one"), precision="float32")
        assert lineage_of(loaded.model).base == str(folder.resolve())
        torch.testing.assert_close(Scorer(loaded.model).token_logps(pack), after_first, rtol=0, atol=1e-5)
        assert float((after_first - untrained).abs().max()) > 1e-2

        second = add_lora(loaded.model, LoraConfig(rank=3, alpha=5.0, target_modules=("q_proj", "down_proj"), rslora=True), 0)
        train_a_little(second, 2)
        after_second = Scorer(second).token_logps(pack)
        save_model(second, loaded.tokenizer, tmp_path / "two")
        again = load_model(config(tmp_path / "two"), precision="float32")
        torch.testing.assert_close(Scorer(again.model).token_logps(pack), after_second, rtol=0, atol=1e-5)
        assert float((after_second - after_first).abs().max()) > 1e-2
    assert (tmp_path / "two" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "two" / "model.safetensors").exists()


def test_two_stages_with_dora_are_saved_whole(folder: Path, tmp_path: Path) -> None:
    base = load_model(config(folder), precision="float32")
    pack = probe_pack(base.model)
    with torch.no_grad():
        first = add_lora(base.model, LoraConfig(rank=2, dora=True), 0)
        train_a_little(first, 1)
        save_model(first, base.tokenizer, tmp_path / "one")
        loaded = load_model(config(tmp_path / "one"), precision="float32")
        second = add_lora(loaded.model, LoraConfig(rank=2), 0)
        train_a_little(second, 2)
        expected = Scorer(second).token_logps(pack)
        save_model(second, loaded.tokenizer, tmp_path / "two")
        again = load_model(config(tmp_path / "two"), precision="float32")
        torch.testing.assert_close(Scorer(again.model).token_logps(pack), expected, rtol=0, atol=1e-4)
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_full_weights_round_trip(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(config(folder), precision="float32")
    Scorer(loaded.model)
    train_a_little(loaded.model, 1)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "full")
    again = load_model(config(tmp_path / "full"), precision="float32")
    ours, theirs = loaded.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "preftune_shared" not in (tmp_path / "full" / "config.json").read_text()
    assert again.tokenizer.identity == loaded.tokenizer.identity


def test_adapter_folders_are_merged_once_rounded_once(folder: Path, tmp_path: Path) -> None:
    base = load_model(config(folder), precision="float32")
    adapted = add_lora(base.model, LoraConfig(rank=2), 0)
    train_a_little(adapted, 1)
    save_model(adapted, base.tokenizer, tmp_path / "one")
    exact = load_model(config(tmp_path / "one"), precision="float32").model.state_dict()
    low = load_model(config(tmp_path / "one"), precision="bfloat16").model.state_dict()
    assert all(torch.equal(exact[name].bfloat16(), low[name]) for name in exact)


def test_an_adapter_without_its_base_is_one_line(folder: Path, tmp_path: Path) -> None:
    base = load_model(config(folder), precision="float32")
    save_model(add_lora(base.model, LoraConfig(rank=2), 0), base.tokenizer, tmp_path / "one")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such model folder"):
        load_model(config(tmp_path / "one"), precision="float32")


def test_models_without_a_limit_say_so() -> None:
    assert NO_LIMIT > 1 << 30


def test_quiet_gives_the_settings_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    with quiet():
        warnings.warn("heard by nobody", stacklevel=1)
    assert logging.get_verbosity() == before
