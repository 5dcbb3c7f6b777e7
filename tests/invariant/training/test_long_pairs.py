"""Both completions with the whole context: a prompt of 32,768 tokens and two completions of 1,024 train on this machine.

Run as a program it trains and prints what it took; the test reads that, because the peak is a process's own.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_model

from preftune.core.recipe import ModelConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_of
from preftune.modeling.activations import keep_layer_inputs
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model

PROMPT, COMPLETION = 32_768, 1024
WIDTH, LAYERS = 16, 2
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40_000,
}


def words(count, seed):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, 97)}" for _ in range(count))


def train(folder):
    """One optimiser step on one long pair; the facts and the growth of the process's memory while it trained."""
    import preftune
    from preftune.modeling.machine import peak_resident_bytes, resident_bytes

    row = {"prompt": words(PROMPT, 0), "chosen": words(COMPLETION, 1), "rejected": words(COMPLETION, 2)}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    before = resident_bytes()
    result = preftune.train(
        model=str(folder / "model"),
        method="dpo",
        data={"train": str(folder / "pairs.jsonl"), "max_length": 40_000},
        adapter="full",
        pairs_per_step=1,
        max_steps=1,
        warmup=0.0,
        evals=0,
        probe="off",
        activation_offloading="disk",
        output=str(folder / "runs"),
    )
    (stage,) = result.stages
    print(json.dumps({"grew": peak_resident_bytes() - before, "metrics": stage["metrics"]}))


@pytest.mark.slow
def test_a_prompt_of_32k_tokens_trains(tmp_path):
    make_model(tmp_path / "model", **SHAPE)
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = PROMPT + 2 * COMPLETION
    assert found["metrics"]["num_tokens"] == pytest.approx(tokens, abs=8), "nothing was cut, and the prompt stands once"
    assert found["metrics"]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert found["metrics"]["grad_norm"] > 0
    assert found["grew"] < tokens * tokens / 4, (
        "a quarter of a byte for each pair of tokens; one mask of bools is four times that"
    )


def test_chunked_and_whole_have_the_same_gradients(tmp_path, monkeypatch):
    """At a length that both can do: attention with all scores at once, and in two flash parts under checkpointing."""
    from preftune.modeling import attention

    model = make_model(tmp_path / "model", **SHAPE)
    draw = random.Random(0)
    ids = [draw.randrange(3, 97) for _ in range(1500 + 300 + 200)]
    completions = tuple(TokenisedCompletion(tuple(part), (True,) * len(part)) for part in (ids[1500:1800], ids[1800:]))
    pack = pack_of([TokenisedExample("long", tuple(ids[:1500]), completions)])
    upstream = torch.randn(len(pack.targets), generator=torch.Generator().manual_seed(0))
    found = []
    for explicit in (10**6, 0):
        monkeypatch.setattr(attention, "EXPLICIT_TOKENS", explicit)
        loaded = load_model(ModelConfig(name=str(model)), precision="float32")
        scorer = Scorer(loaded.model, shared=True, head_chunk=4096 if explicit else 64)
        if not explicit:
            keep_layer_inputs(loaded.model, "disk", tmp_path / "offloaded")
        torch.autograd.backward((scorer.token_logps(pack) * upstream).sum())
        found.append({name: one.grad for name, one in loaded.model.named_parameters()})
    for name, one in found[0].items():
        assert one.norm() > 0, name
        assert (one - found[1][name]).norm() <= 1e-4 * one.norm(), name


if __name__ == "__main__":
    train(Path(sys.argv[1]))
