"""Generation: the same text in every batch, the text of a loop without cache, and ends where it should."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BASIC, GPT2_LIKE, VOCABULARY, build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from preftune.core.errors import InputError
from preftune.core.recipe import DecodingConfig, LoraConfig
from preftune.core.records import Message
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.attention import SHARED, attention_name
from preftune.modeling.forward import Scorer
from preftune.modeling.generate import Generation, generate, pick
from preftune.modeling.tokenizer import HubTokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}t9t {% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> HubTokenizer:
    raw = Tokenizer(models.WordLevel({f"t{i}t": i for i in range(VOCABULARY)}, unk_token="t0t"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="t1t", eos_token="t2t", unk_token="t0t")
    wrapped.chat_template = TEMPLATE
    return HubTokenizer(wrapped, (2, 5))


def prompts_of(count: int = 9) -> list[tuple[int, ...]]:
    draw = random.Random(0)
    return [tuple(draw.randrange(6, VOCABULARY) for _ in range(draw.randrange(1, 14))) for _ in range(count)]


def naive(
    model: Any, tokenizer: HubTokenizer, prompt: tuple[int, ...], decoding: DecodingConfig, seed: int, index: int
) -> Generation:
    """One prompt, no cache, no padding; numpy's inverse of the cumulative distribution."""
    uniform = np.random.Generator(np.random.Philox(key=[seed, index])).random(decoding.max_new_tokens)
    ids: list[int] = []
    for number in uniform:
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1].double().numpy()
        if decoding.temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / decoding.temperature)
            p /= p.sum()
            order = np.argsort(-p, kind="stable") if decoding.top_p < 1 else np.arange(len(p))
            q = p[order]
            q = np.where(np.cumsum(q) - q >= decoding.top_p, 0.0, q)
            total = np.cumsum(q)
            token = int(order[np.searchsorted(total, number * total[-1], side="right")])
        ids.append(token)
        if token in tokenizer.eos_ids:
            return Generation(tokenizer.decode(ids[:-1]), len(ids) - 1, True)
    return Generation(tokenizer.decode(ids), len(ids), False)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASIC),
    "mistral-window": ("mistral", {**BASIC, "head_dim": 8, "sliding_window": 7}),
    "gemma3": (
        "gemma3_text",
        {**BASIC, "head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("gpt2", GPT2_LIKE),
    "bloom": ("bloom", {**BASIC, "n_layer": 2, "n_head": 4}),
    "mamba": (
        "mamba",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4, "eos_token_id": 2},
    ),
}


@pytest.mark.filterwarnings("ignore")  # some families warn about their own slow paths
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoding", [{"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 1.2, "top_p": 0.8}])
def test_texts_are_those_of_a_loop_without_cache_in_any_batch(
    family: str, decoding: dict[str, float], tokenizer: HubTokenizer
) -> None:
    model = build(*FAMILIES[family], attention="eager")
    prompts = prompts_of()
    settings = DecodingConfig(max_new_tokens=16, **decoding)
    with torch.no_grad():
        expected = [naive(model, tokenizer, prompt, settings, 7, i) for i, prompt in enumerate(prompts)]
    for size in (1, 4, 32):
        got = generate(model, tokenizer, prompts, settings.model_copy(update={"batch_size": size}), 7)
        assert got == expected, size
    if settings.temperature > 0:
        assert generate(model, tokenizer, prompts, settings, 8) != expected


def test_every_end_token_ends_and_the_last_position_too(tokenizer: HubTokenizer) -> None:
    model = build("llama", {**BASIC, "max_position_embeddings": 24})
    got = generate(model, tokenizer, prompts_of(40), DecodingConfig(temperature=1.5, max_new_tokens=200), 0)
    assert any(one.is_complete for one in got)
    assert any(not one.is_complete for one in got)
    for prompt, one in zip(prompts_of(40), got, strict=True):
        assert one.is_complete or len(prompt) + one.num_tokens == 24
        assert "t2t" not in one.text.split()
        assert "t5t" not in one.text.split()


def test_prompts_may_be_turns_text_or_ids(tokenizer: HubTokenizer) -> None:
    model = build("llama", BASIC)
    greedy = DecodingConfig(temperature=0.0, max_new_tokens=6)
    turns = (Message("user", "t20t t21t"),)
    as_turns, as_text, as_ids = generate(model, tokenizer, [turns, "t20t t21t t9t", (20, 21, 9)], greedy, 0)
    assert as_turns == as_text == as_ids


def test_progress_and_order(tokenizer: HubTokenizer) -> None:
    model = build("llama", BASIC)
    seen: list[tuple[int, int]] = []
    prompts = prompts_of(9)
    settings = DecodingConfig(max_new_tokens=4, batch_size=4)
    all_at_once = generate(model, tokenizer, prompts, settings, 0, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert all_at_once[:3] == generate(model, tokenizer, prompts[:3], settings, 0)


@pytest.mark.parametrize("prompt", [(), tuple(range(10, 74))])
def test_prompts_that_leave_no_room_are_named(prompt: tuple[int, ...], tokenizer: HubTokenizer) -> None:
    with pytest.raises(InputError, match="prompt 2: has"):
        generate(build("llama", BASIC), tokenizer, [(20,), prompt], DecodingConfig(), 0)


def test_a_shared_scorer_and_generation_live_on_one_model(tokenizer: HubTokenizer) -> None:
    base = build("llama", BASIC)
    settings = DecodingConfig(max_new_tokens=8)
    before = generate(base, tokenizer, prompts_of(), settings, 0)
    model = add_lora(base, LoraConfig(rank=4), 0)
    Scorer(model, shared=True)
    model.train()
    assert generate(model, tokenizer, prompts_of(), settings, 0) == before  # a fresh adapter changes nothing
    assert attention_name(base) == SHARED
    assert model.training
    shake(model)
    assert generate(model, tokenizer, prompts_of(), settings, 0) != before
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts_of(), settings, 0) == before


def shake(model: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))


def test_pick_by_hand() -> None:
    # p = (.5, .25, .25): numbers below .5 give 0, below .75 give 1, then 2; top_p .5 leaves only the first
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(6, 1)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 0.9999999999])
    assert pick(logits, numbers, 1.0, 1.0).tolist() == [0, 0, 1, 1, 2, 2]
    assert pick(logits, numbers, 1.0, 0.5).tolist() == [0] * 6
    assert pick(logits, numbers, 0.0, 1.0).tolist() == [0] * 6


def test_pick_never_takes_what_has_no_probability() -> None:
    logits = torch.tensor([[0.0, float("-inf"), float("-inf")]])
    assert pick(logits, torch.tensor([1.0 - 1e-16], dtype=torch.float64), 1.0, 1.0).tolist() == [0]


def test_pick_draws_by_probability() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    numbers = torch.from_numpy(np.random.Generator(np.random.Philox(key=[0, 0])).random(20000))
    counts = torch.bincount(pick(p.log().repeat(20000, 1), numbers, 1.0, 1.0), minlength=4) / 20000
    assert float((counts - p).abs().max()) < 4 * 0.5 / 20000**0.5  # four standard errors
