"""Tiny random models of many families, a pack, and an independent plain forward to compare with."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack, pack_of

VOCABULARY = 97
BASIC: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_LIKE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str, settings: dict[str, Any], *, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A model with amplified matrices and randomised norms, biases and sinks, so that every feature shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(7.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def example(draw: random.Random, prompt: int, lengths: tuple[int, ...], unscored: tuple[int, ...] = ()) -> TokenisedExample:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    completions = tuple(
        TokenisedCompletion(ids(length), tuple(index not in unscored for index in range(length))) for length in lengths
    )
    return TokenisedExample(f"{prompt}-{lengths}", ids(prompt), completions)


def small_pack(seed: int = 0) -> Pack:
    """Prompts with one, two and three completions; rows longer than a window of 7; two tokens that do not count."""
    draw = random.Random(seed)
    return pack_of([example(draw, 9, (6, 5)), example(draw, 4, (7,)), example(draw, 11, (3, 9, 4), unscored=(1, 2))])


def plain_logps(model: PreTrainedModel, pack: Pack) -> Tensor:
    """One row a completion, the model's own logits, float32 log-softmax: nothing of preftune's modeling."""
    parts = []
    for one in pack.examples:
        for completion in one.completions:
            row = torch.tensor([[*one.prompt_ids, *completion.ids]])
            logps = torch.log_softmax(model(input_ids=row, use_cache=False).logits[0].float(), -1)
            rows = len(one.prompt_ids) - 1 + torch.arange(len(completion.ids))
            picked = logps[rows].gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
            parts.append(picked[torch.tensor(completion.scored)])
    return torch.cat(parts)


def row_logps(model: PreTrainedModel, pack: Pack, **arguments: Any) -> Tensor:
    """The packed row through the model as it is: what one gets when a feature of the layout is left out."""
    logits = model(input_ids=torch.from_numpy(pack.ids)[None], use_cache=False, **arguments).logits[0]
    logps = torch.log_softmax(logits.float(), -1)[torch.from_numpy(pack.rows)]
    return logps.gather(1, torch.from_numpy(pack.targets)[:, None]).squeeze(1)


def gradients(model: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of log-probs."""
    weights = torch.linspace(-1.0, 1.5, len(logps))
    model.zero_grad(set_to_none=True)
    torch.autograd.backward((logps * weights).sum())
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest distance of two gradients, relative to the norm of each parameter's (or a thousandth of the largest)."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(float(one.norm()) for one in theirs.values())
    return max(float((ours[name] - theirs[name]).norm()) / max(float(theirs[name].norm()), floor) for name in ours)
