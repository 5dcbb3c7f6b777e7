"""Sampling completions in batches, the same text for a prompt whatever batch it is in.

Every prompt has its own stream of uniform numbers, from (seed, index of the prompt) or from a seed of its own, one
number a token; a token is the inverse of the cumulative distribution at that number. So a text depends on the batch
only through the rounding of its logits, which in float32 moves a cumulative probability by about 1e-6. Rows that end
leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from preftune.core.errors import InputError
from preftune.core.recipe import DecodingConfig
from preftune.core.records import Message, Messages
from preftune.data.tokenize import prompt_ids_of
from preftune.modeling.attention import plain_attention
from preftune.modeling.forward import base_of
from preftune.modeling.load import NO_LIMIT
from preftune.modeling.quiet import quiet
from preftune.modeling.sharing import SHAREABLE_LAYERS, position_limits, text_config
from preftune.modeling.tokenizer import HubTokenizer

Prompt: TypeAlias = Messages | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled completion.

    text: without special tokens. num_tokens: tokens of the answer, its end token not counted. is_complete: it ended by
    itself, before ``max_new_tokens`` or the last position of the model.
    """

    text: str
    num_tokens: int
    is_complete: bool


def generate(
    model: nn.Module,
    tokenizer: HubTokenizer,
    prompts: Sequence[Prompt],
    decoding: DecodingConfig,
    seed: int | Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """One completion per prompt, in the order of the prompts.

    Parameters
        prompts: turns (rendered with the chat template and its generation prompt), raw text, or token ids.
        decoding: temperature 0 is greedy; top_p keeps the smallest set of tokens whose probability reaches it.
        seed: of all streams, or one for each prompt, which then does not depend on its place in the list.
        on_progress: called with prompts done and prompts in all.

    Raises
        InputError: a prompt that is empty or leaves no position for an answer.
    """
    return [_generation(tokenizer, ids) for ids in sample_tokens(model, tokenizer, prompts, decoding, seed, on_progress)]


def sample_tokens(
    model: nn.Module,
    tokenizer: HubTokenizer,
    prompts: Sequence[Prompt],
    decoding: DecodingConfig,
    seed: int | Sequence[int] | Sequence[tuple[int, int]],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    is_sharded: bool = False,
) -> list[list[int]]:
    """The token ids that ``generate`` makes its texts of, with the end token where the model wrote one.

    seed: as there, or (seed, index) of the stream of each prompt. is_sharded: the weights are gathered layer by layer from
    several processes, which inference mode does not allow.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    limits = position_limits(text_config(base_of(model)))
    limit = limits[0] if limits else NO_LIMIT
    for index, ids in enumerate(rows):
        if not ids or len(ids) >= limit:
            raise InputError(f"prompt {index + 1}: has {len(ids)} tokens, the model has {limit} positions; shorten or remove it")
    seeds = [(seed, index) for index in range(len(rows))] if isinstance(seed, int) else seed
    keys = [(one, 0) if isinstance(one, int) else one for one in seeds]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    size = decoding.batch_size if can_batch(base_of(model)) else 1
    results: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad() if is_sharded else torch.inference_mode(), plain_attention(base_of(model)), quiet():
            for start in range(0, len(order), size):
                members = order[start : start + size]
                batch = _Batch([rows[i] for i in members], [Sampler(decoding, *keys[i]) for i in members], limit)
                decode = _decode if can_batch(base_of(model)) else _decode_alone
                done = start
                for position, ids in decode(model, batch, decoding, tokenizer.eos_ids):
                    results[members[position]] = ids
                    done += 1
                if on_progress is not None:
                    on_progress(done, len(rows))
    finally:
        model.train(was_training)
    return [results[index] for index in range(len(rows))]


class Sampler:
    """Picks the tokens of one completion: greedy, or by its own stream of uniform numbers."""

    def __init__(self, decoding: DecodingConfig, seed: int, index: int) -> None:
        stream = np.random.Generator(np.random.Philox(key=[seed % (1 << 64), index]))
        self.uniform = stream.random(decoding.max_new_tokens)


def pick(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row: logits (rows, vocabulary), uniform (rows,) in [0, 1) -> ids (rows,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    ids = None
    if top_p < 1:
        probabilities, ids = torch.sort(probabilities, stable=True, dim=-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    total = probabilities.double().cumsum(-1)
    at = torch.searchsorted(total, (uniform.double()[:, None] * total[:, -1:]), right=True).squeeze(1)
    # a number that rounds up to the total belongs to the last token that has any probability
    at = torch.minimum(at, (probabilities > 0).long().cumsum(-1).argmax(-1))
    return at if ids is None else ids.gather(1, at[:, None]).squeeze(1)


@dataclass(frozen=True, slots=True)
class _Batch:
    prompts: list[list[int]]
    samplers: list[Sampler]
    limit: int

    @property
    def room(self) -> int:
        """New tokens that the longest prompt leaves positions for."""
        return self.limit - max(len(ids) for ids in self.prompts)


def _decode(model: nn.Module, batch: _Batch, decoding: DecodingConfig, eos_ids: frozenset[int]) -> list[tuple[int, list[int]]]:
    """Left-padded batch with a key-value cache; returns (place in the batch, new ids)."""
    base = base_of(model)
    device = next(base.parameters()).device
    lengths = torch.tensor([len(ids) for ids in batch.prompts])
    width = int(lengths.max())
    pad = min(eos_ids, default=0)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch.prompts], device=device)
    mask = (torch.arange(width)[None, :] >= (width - lengths)[:, None]).long().to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    uniform = torch.from_numpy(np.stack([sampler.uniform for sampler in batch.samplers])).to(device)
    alive = list(range(len(batch.prompts)))
    written: list[list[int]] = [[] for _ in alive]
    budget = [min(decoding.max_new_tokens, batch.limit - len(row)) for row in batch.prompts]
    cache = DynamicCache(config=base.config)
    for step in range(max(budget)):
        output = base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        chosen = pick(output.logits[:, -1], uniform[:, step], decoding.temperature, decoding.top_p)
        keep = []
        for place, token in enumerate(chosen.tolist()):
            row = alive[place]
            written[row].append(token)
            if token not in eos_ids and len(written[row]) < budget[row]:
                keep.append(place)
        if not keep:
            break
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask, positions, chosen, uniform = mask[index], positions[index], chosen[index], uniform[index]
            alive = [alive[place] for place in keep]
        ids = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
    return list(enumerate(written))


class _PickAlone(LogitsProcessor):
    """Makes transformers' own loop take our token, for models whose state is not a plain key-value cache."""

    def __init__(self, sampler: Sampler, prompt: int, decoding: DecodingConfig) -> None:
        self.sampler, self.prompt, self.decoding = sampler, prompt, decoding

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        uniform = torch.from_numpy(self.sampler.uniform[[input_ids.shape[1] - self.prompt]])
        chosen = pick(scores, uniform.to(scores.device), self.decoding.temperature, self.decoding.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


def _decode_alone(
    model: nn.Module, batch: _Batch, decoding: DecodingConfig, eos_ids: frozenset[int]
) -> list[tuple[int, list[int]]]:
    """One prompt through transformers' own loop."""
    base = base_of(model)
    prompt, sampler = batch.prompts[0], batch.samplers[0]
    ids = torch.tensor([prompt], device=next(base.parameters()).device)
    run = cast(Callable[..., Tensor], base.generate)
    out = run(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(decoding.max_new_tokens, batch.room),
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=min(eos_ids, default=0),
        logits_processor=LogitsProcessorList([_PickAlone(sampler, len(prompt), decoding)]),
    )
    return [(0, out[0, len(prompt) :].tolist())]


def can_batch(base: PreTrainedModel) -> bool:
    """Attention only, with positions that can be given: left padding then changes nothing."""
    config = text_config(base)
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(getattr(type(base), "_supports_attention_backend", False)) and kinds <= SHAREABLE_LAYERS


def prompt_ids(tokenizer: HubTokenizer, prompt: Prompt) -> list[int]:
    """The ids that training puts before a completion, so that a model is asked as it was taught."""
    if isinstance(prompt, str):
        return list(prompt_ids_of((Message("user", prompt),), tokenizer, style="text"))
    if prompt and isinstance(prompt[0], Message):
        return list(prompt_ids_of(cast(Messages, prompt), tokenizer))
    return [int(cast(int, token)) for token in prompt]


def _generation(tokenizer: HubTokenizer, ids: list[int]) -> Generation:
    is_complete = bool(ids) and ids[-1] in tokenizer.eos_ids
    answer = ids[:-1] if is_complete else ids
    return Generation(tokenizer.decode(answer), len(answer), is_complete)
