"""One completion, piece by piece: the same tokens that ``generate`` makes of the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import DynamicCache

from preftune.core.errors import InputError
from preftune.core.recipe import DecodingConfig
from preftune.modeling.attention import plain_attention
from preftune.modeling.forward import base_of
from preftune.modeling.generate import Prompt, Sampler, can_batch, generate, pick, prompt_ids
from preftune.modeling.load import NO_LIMIT
from preftune.modeling.sharing import position_limits, text_config
from preftune.modeling.tokenizer import HubTokenizer

HALF_A_LETTER = "\ufffd"


def stream(model: nn.Module, tokenizer: HubTokenizer, prompt: Prompt, decoding: DecodingConfig, seed: int) -> Iterator[str]:
    """Pieces of text whose sum is the completion; whole letters only. A model with a state of its own gives one piece.

    Raises
        InputError: the prompt leaves no position for an answer.
    """
    base = base_of(model)
    ids = prompt_ids(tokenizer, prompt)
    limits = position_limits(text_config(base))
    limit = limits[0] if limits else NO_LIMIT
    if not ids or len(ids) >= limit:
        raise InputError(f"the conversation has {len(ids)} tokens, the model has {limit} positions")
    if not can_batch(base):
        yield generate(model, tokenizer, [ids], decoding, seed)[0].text
        return
    shown = ""
    for written in _tokens(model, ids, decoding, seed, min(decoding.max_new_tokens, limit - len(ids)), tokenizer.eos_ids):
        text = tokenizer.decode(written)
        if text != shown and text.startswith(shown) and not text.endswith(HALF_A_LETTER):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(written)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


def _tokens(
    model: nn.Module, ids: list[int], decoding: DecodingConfig, seed: int, budget: int, ends: frozenset[int]
) -> Iterator[list[int]]:
    """The answer's tokens so far, after each one; the token that ends it is not among them."""
    base = base_of(model)
    device = next(base.parameters()).device
    uniform = Sampler(decoding, seed, 0).uniform
    cache = DynamicCache(config=base.config)
    given = torch.tensor([ids], device=device)
    written: list[int] = []
    for step in range(budget):
        with torch.inference_mode(), plain_attention(base):
            output = base(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            number = torch.tensor([float(uniform[step])], dtype=torch.float64, device=device)
            token = int(pick(output.logits[:, -1], number, decoding.temperature, decoding.top_p))
        if token in ends:
            break
        written.append(token)
        given = torch.tensor([[token]], device=device)
        yield written
    if not written:
        yield written
