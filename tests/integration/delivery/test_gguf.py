"""A GGUF file holds the run's model, as transformers reads it back (test_llama_cpp.py: as llama.cpp does)."""

import json

import pytest
from click.testing import CliRunner
from tokenizers import pre_tokenizers

from preftune.app.export import NotTheSameModel, export_gguf
from preftune.cli.export import command
from preftune.core.errors import InputError, UsageError
from preftune.core.recipe import ModelConfig
from preftune.modeling import gguf_file
from preftune.modeling.export import WrongTokens, check_tokens, score, score_gguf
from preftune.modeling.load import load_model

KINDS = ("llama", "llama, tied", "qwen2", "qwen3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_file_of_every_family_and_type_is_the_model(random_model, tmp_path, kind, dtype):
    done = export_gguf(str(random_model(kind)), tmp_path / "out" / "m.gguf", dtype)
    gap = done.facts["verified"]["largest_gap"]
    assert (dtype == "f32" and gap < 1e-4) or (1e-5 < gap < {"f16": 0.05, "q8_0": 0.5}.get(dtype, 0))
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["m.gguf"]


def test_what_makes_it_right_matters(random_model, tmp_path, monkeypatch):
    """Without the interleaved rows another model would be written, and nothing is left of it."""
    folder = str(random_model("llama"))
    monkeypatch.setattr(gguf_file, "PERMUTED", frozenset())
    with pytest.raises(NotTheSameModel, match=r"the file is not the model of .*\(f16 allows 0.05\).* nothing was written"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_the_file_says_what_programs_read(random_model, tmp_path):
    import gguf

    export_gguf("starter", tmp_path / "m.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    loaded = load_model(ModelConfig(name="starter"), precision="float32")
    raw = loaded.tokenizer.raw
    said = {name.removeprefix("tokenizer."): one.contents() for name, one in fields.items() if name.startswith("tokenizer.")}
    assert said["chat_template"] == raw.chat_template
    assert (said["ggml.model"], said["ggml.pre"]) == ("gpt2", "gpt-2")
    assert (said["ggml.bos_token_id"], said["ggml.eos_token_id"]) == (raw.bos_token_id, raw.eos_token_id)
    assert said["ggml.add_bos_token"] is False, "the chat template writes it"
    assert said["ggml.tokens"] == raw.convert_ids_to_tokens(range(len(said["ggml.tokens"])))
    special = {number for number, token in raw.added_tokens_decoder.items() if token.special}
    control = {number for number, kind in enumerate(said["ggml.token_type"]) if kind == gguf.TokenType.CONTROL}
    assert special == control


def test_another_tokenizer_is_noticed(tmp_path, monkeypatch):
    export_gguf("starter", tmp_path / "m.gguf", "f32")
    tokenizer = load_model(ModelConfig(name="starter"), precision="float32").tokenizer
    check_tokens(tokenizer, tmp_path / "m.gguf", ["Once upon a time"])
    other = pre_tokenizers.ByteLevel(add_prefix_space=True)
    monkeypatch.setattr("preftune.modeling.export.splitter", lambda name: other)
    with pytest.raises(WrongTokens, match=r"its tokenizer gives other tokens for "):
        check_tokens(tokenizer, tmp_path / "m.gguf", [])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ways_of_cutting_text_are_recognised(name):
    tokenizer = load_model(ModelConfig(name="starter"), precision="float32").tokenizer
    tokenizer.raw.backend_tokenizer.pre_tokenizer = gguf_file.splitter(name)
    assert gguf_file.split_name(tokenizer) == name


def test_what_cannot_be_written_is_refused_by_name(random_model, tmp_path, starter_model):
    folder = random_model("llama")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(InputError, match="rotary positions are of the type linear, only default"):
        export_gguf(str(folder), tmp_path / "m.gguf")
    tokenizer = load_model(ModelConfig(name="starter"), precision="float32").tokenizer
    tokenizer.raw.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"cuts text in a way that has no name in this writer \(Whitespace\)"):
        gguf_file.split_name(tokenizer)
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        export_gguf("starter", tmp_path / "folder")
    refused = CliRunner().invoke(command, ["starter", "--to", str(tmp_path / "m.gguf"), "--gguf", "f16", "--dtype", "bfloat16"])
    assert isinstance(refused.exception, UsageError)
    assert "--dtype does not go with --gguf" in str(refused.exception)


def test_the_command_writes_a_run_with_its_adapter_merged(lora_run, tmp_path):
    target = tmp_path / "m.gguf"
    done = CliRunner().invoke(
        command, [str(lora_run.run), "--to", str(target), "--gguf", "f32", "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert (facts["form"], facts["dtype"], facts["run"]) == ("GGUF", "f32", lora_run.run.name)
    rows = [([0, 5, 6], [70, 80, 90])]
    adapted, plain = score(ModelConfig(name=str(lora_run.model)), rows), score(ModelConfig(name="starter"), rows)
    (written,) = score_gguf(target, rows)
    assert (written - adapted[0]).abs().max() < 1e-4 < (plain[0] - adapted[0]).abs().max()
