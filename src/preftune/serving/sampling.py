"""The next token of every row of a batch, each by its own settings and its own stream of numbers.

A token is the inverse of the row's cumulative distribution at its next uniform number, as in ``modeling.generate``: so
what a row gets depends on its seed and its logits, and not on the rows beside it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from preftune.serving.protocol import Sampling

SHORTLIST = 512


class Stream:
    """What the choice of a row's tokens depends on: its settings, its numbers and the tokens so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], choice: int) -> None:
        self.sampling = sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._numbers = np.random.Generator(np.random.Philox(key=[seed % (1 << 64), choice]))
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.long)
        self._counts: dict[int, int] = {}
        self._forbidden: list[int] = []
        self.is_shaped = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
            or bool(sampling.logit_bias)
        )

    def forbid(self, tokens: Sequence[int]) -> None:
        """Tokens that may not come next (an end before ``min_tokens``); replaces those of before."""
        self._forbidden = list(tokens)

    def told(self, token: int) -> None:
        """A token was chosen."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def number(self) -> float:
        """The next uniform number in [0, 1)."""
        return float(self._numbers.random())

    def shape(self, logits: Tensor) -> Tensor:
        """Penalties and biases on one row of logits, (vocabulary,); a new tensor where anything changes."""
        if not (self.is_shaped or self._forbidden):
            return logits
        s, shaped = self.sampling, logits.clone()
        own = torch.tensor(sorted(self._counts), dtype=torch.long, device=logits.device)
        if s.repetition_penalty != 1.0:
            seen = torch.unique(torch.cat([self._prompt.to(logits.device), own]))
            part = shaped[seen]
            shaped[seen] = torch.where(part > 0, part / s.repetition_penalty, part * s.repetition_penalty)
        if len(own) and (s.presence_penalty or s.frequency_penalty):
            counts = torch.tensor([self._counts[token] for token in own.tolist()], device=logits.device)
            shaped[own] -= s.presence_penalty + s.frequency_penalty * counts
        for token, bias in s.logit_bias.items():
            if token < len(shaped):
                shaped[token] += bias
        if self._forbidden:
            shaped[self._forbidden] = float("-inf")
        return shaped


def choose(logits: Tensor, streams: Sequence[Stream]) -> list[int]:
    """One token a row: logits (rows, vocabulary), float32."""
    if any(stream.is_shaped or stream._forbidden for stream in streams):  # noqa: SLF001 -- one module
        logits = torch.stack([stream.shape(row) for stream, row in zip(streams, logits, strict=True)])
    chosen = logits.argmax(-1).tolist()
    for is_cut in (False, True):
        rows = [
            number
            for number, stream in enumerate(streams)
            if stream.sampling.temperature > 0 and _is_cut(stream.sampling) == is_cut
        ]
        if rows:
            picked = _cut_and_draw if is_cut else _draw_from_all
            part = picked(logits[rows], [streams[number] for number in rows])
            for number, token in zip(rows, part, strict=True):
                chosen[number] = token
    for stream, token in zip(streams, chosen, strict=True):
        stream.told(token)
    return [int(token) for token in chosen]


def _is_cut(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _heated(logits: Tensor, streams: Sequence[Stream]) -> Tensor:
    """Probabilities after temperature, (rows, vocabulary)."""
    temperatures = torch.tensor([stream.sampling.temperature for stream in streams], device=logits.device)
    return torch.softmax(logits / temperatures[:, None], -1)


def _draw(probabilities: Tensor, streams: Sequence[Stream]) -> Tensor:
    """The place of each row's number in its cumulative distribution, (rows,); rows need not sum to 1."""
    total = probabilities.double().cumsum(-1)
    uniform = torch.tensor([stream.number() for stream in streams], dtype=torch.float64, device=probabilities.device)
    at = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True).squeeze(1)
    # a number that rounds up to the total belongs to the last token that has any probability
    return torch.minimum(at, (probabilities > 0).long().cumsum(-1).argmax(-1))


def _draw_from_all(logits: Tensor, streams: Sequence[Stream]) -> list[int]:
    return list(_draw(_heated(logits, streams), streams).tolist())


def _cut_and_draw(logits: Tensor, streams: Sequence[Stream]) -> list[int]:
    """Rows with top_k, top_p or min_p. A shortlist is enough for nearly all of them: sorting a vocabulary is dear."""
    probabilities = _heated(logits, streams)
    size = min(SHORTLIST, logits.shape[1])
    values, ids = probabilities.topk(size, -1)
    if any(
        not _fits(stream.sampling, float(row.sum()), float(row[0]), float(row[-1]), size)
        for stream, row in zip(streams, values, strict=True)
    ):
        values, ids = torch.sort(probabilities, stable=True, dim=-1, descending=True)
    device = logits.device
    top_p = torch.tensor([stream.sampling.top_p for stream in streams], device=device)[:, None]
    min_p = torch.tensor([stream.sampling.min_p for stream in streams], device=device)[:, None]
    top_k = torch.tensor([stream.sampling.top_k or logits.shape[1] for stream in streams], device=device)[:, None]
    kept = torch.arange(values.shape[1], device=device)[None] < top_k
    # top_p is a share of what top_k left, as everywhere
    share = values.masked_fill(~kept, 0.0)
    share = torch.where(top_k < logits.shape[1], share / share.sum(-1, keepdim=True), share)
    kept &= ((share.cumsum(-1) - share) < top_p) | (top_p >= 1)
    kept &= values >= min_p * values[:, :1]
    kept[:, 0] = True
    at = _draw(values.masked_fill(~kept, 0.0), streams)
    return list(ids.gather(1, at[:, None]).squeeze(1).tolist())


def _fits(sampling: Sampling, mass: float, best: float, worst: float, size: int) -> bool:
    """Whether nothing outside the shortlist could be kept."""
    is_short = 0 < sampling.top_k <= size
    return (
        is_short
        or (sampling.top_p < 1 and mass > sampling.top_p + 1e-4)
        or (sampling.min_p > 0 and worst < sampling.min_p * best)
    )
