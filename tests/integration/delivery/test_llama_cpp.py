"""What llama.cpp computes from our GGUF files is what transformers computes from the weights they were made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM

from llama_cpp_server import llama_cpp
from preftune.app.export import export_gguf
from preftune.core.recipe import ModelConfig
from preftune.modeling import gguf_file
from preftune.modeling.export import TRICKY
from preftune.modeling.load import load_model, model_path
from preftune.modeling.quiet import quiet

# nats a token. f32: sums in another order. f16: llama.cpp rounds what a matrix is multiplied with to its type too, so 2^-11 of
# every factor, twice. q8_0: likewise, and 1/254 of the largest of each 32 factors
BOUNDS = {"f32": 1e-4, "f16": 0.05, "q8_0": 0.5}
ROWS, TOKENS = 3, 24


@torch.inference_mode()
def written(source):
    """Sequences that a model writes, log p of each token behind the first under plain transformers in float32, its end tokens."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        torch.manual_seed(0)
        ids = model.generate(
            torch.tensor([[5], [70], [300]]), do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
    assert ids.shape == (ROWS, TOKENS + 1)
    return ids.tolist(), model(ids).logits.log_softmax(-1)


def largest_gaps(path, ids, wanted):
    """(of the tokens that stand there, of the whole vocabulary): the largest difference of a log-probability in llama.cpp."""
    size = wanted.shape[-1]
    with llama_cpp(path, "--exact") as server:
        got = [[server.log_probs(row[: at + 1], size) for at in range(len(row) - 1)] for row in ids]
    assert all(len(one) == size for row in got for one in row)
    theirs = torch.tensor([[[one[token] for token in range(size)] for one in row] for row in got])
    difference = (theirs - wanted[:, :-1]).abs()
    chosen = difference.gather(-1, torch.tensor(ids)[:, 1:, None])
    return float(chosen.max()), float(difference.max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen2", "qwen3"])
def test_every_token_has_the_same_log_prob_in_llama_cpp(random_model, tmp_path, kind):
    folder = random_model(kind)
    ids, wanted = written(folder)
    for dtype, bound in BOUNDS.items():
        path = tmp_path / f"{dtype}.gguf"
        export_gguf(str(folder), path, dtype)
        gap, anywhere = largest_gaps(path, ids, wanted)
        print(f"{kind} {dtype}: {gap:.2g} nat, {anywhere:.2g} over the vocabulary")  # for docs/export.md; pytest -s shows it
        assert gap < bound, dtype
        assert dtype != "f32" or anywhere < bound


def test_the_comparison_sees_a_wrong_file(random_model, tmp_path, monkeypatch):
    """Rows of q and k that are not interleaved are another model, and llama.cpp computes that one."""
    folder = random_model("llama")
    ids, wanted = written(folder)
    monkeypatch.setattr(gguf_file, "PERMUTED", frozenset())
    gguf_file.write_gguf(load_model(ModelConfig(name=str(folder)), precision="float32"), tmp_path / "m.gguf", "f32")
    assert largest_gaps(tmp_path / "m.gguf", ids[:1], wanted[:1])[0] > BOUNDS["q8_0"]


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """The starter in llama.cpp, and how we load it."""
    path = tmp_path_factory.mktemp("llama") / "m.gguf"
    export_gguf("starter", path, "f32")
    with llama_cpp(path, "--exact") as server:
        yield server, load_model(ModelConfig(name="starter"), precision="float32").tokenizer


@pytest.mark.parametrize(
    "text", [TRICKY, "Once upon a time, a fox named Pip went to the forest. ", "  two\n\n\n  lines\t\t1234567\r\n"]
)
def test_llama_cpp_cuts_texts_into_the_same_tokens(starter, text):
    server, tokenizer = starter
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert server.ask("/tokenize", {"content": text, "add_special": True})["tokens"] == ids
    end = tokenizer.decode([tokenizer.end_id], skip_special_tokens=False)
    got = server.ask("/tokenize", {"content": text + end, "parse_special": True})["tokens"]
    assert got == tokenizer.encode(text + end, add_special_tokens=False)
    assert got[-1] == tokenizer.end_id


def test_llama_cpp_writes_the_same_prompt_of_turns(starter):
    server, tokenizer = starter
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    prompt = server.ask("/apply-template", {"messages": turns})["prompt"]
    assert prompt == tokenizer.raw.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_llama_cpp_knows_where_a_text_begins_and_ends(starter):
    server, tokenizer = starter
    said = server.ask("/props")
    assert said["eos_token"] == tokenizer.decode([tokenizer.end_id], skip_special_tokens=False)
    assert said["bos_token"] == tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False)
    turns = [{"role": "user", "content": "Write a short story about a fox."}]
    answer = server.ask("/v1/chat/completions", {"messages": turns, "max_tokens": 400, "temperature": 0})["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert not any(mark in answer["message"]["content"] for mark in tokenizer.raw.all_special_tokens)


def greedy_merges(folder, name):
    """The starter with merges over everything in a text, so that only the cutting keeps its parts apart, cut as ``name`` says."""
    copied = Path(shutil.copytree(model_path("starter"), folder / "model"))
    said = json.loads((copied / "tokenizer.json").read_text())
    special = [one["content"] for one in sorted(said["added_tokens"], key=lambda one: one["id"])]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([TRICKY] * 3, BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet))
    trained.pre_tokenizer = gguf_file.splitter(name)
    made = json.loads(trained.to_str())
    (copied / "tokenizer.json").write_text(json.dumps({**said, "model": made["model"], "pre_tokenizer": made["pre_tokenizer"]}))
    return load_model(ModelConfig(name=str(copied)), precision="float32")


def test_llama_cpp_means_the_same_by_the_names_of_cutting(tmp_path):
    cuts = {}
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        (tmp_path / name).mkdir()
        loaded = greedy_merges(tmp_path / name, name)
        gguf_file.write_gguf(loaded, tmp_path / name / "m.gguf", "f16")
        with llama_cpp(tmp_path / name / "m.gguf") as server:
            cuts[name] = server.ask("/tokenize", {"content": TRICKY})["tokens"]
        assert cuts[name] == loaded.tokenizer.encode(TRICKY, add_special_tokens=False), name
    assert len(set(map(tuple, cuts.values()))) == len(cuts), "the text does not tell them apart"
