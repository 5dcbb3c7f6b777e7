"""Which rows of a group meet which keys in one product, so that little of what is hidden is formed.

A group (prompt p, completions c_1 ... c_K) is a tree of causal sequences: p c_1 in one piece, and every other completion
with the prompt's keys before its own. A part is a block of a sequence's rows and the keys up to the block's end. Smaller
parts form fewer hidden cells and cost more calls, so a group is cut where the cells saved are worth the calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Span: TypeAlias = tuple[int, int]

PART_CELLS = 12_000
"""Cells, a row with a key for all heads, that take as long as the calls of one more part: two cores, bfloat16, 9 heads of 64."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and keys of one product as spans (first, end) of the group's tokens; keys in one span or two."""

    rows: Span
    keys: tuple[Span, ...]

    @property
    def num_keys(self) -> int:
        """Keys of all spans."""
        return sum(end - first for first, end in self.keys)


@lru_cache(maxsize=4096)
def parts_of(prompt: int, completions: tuple[int, ...], cells: int) -> tuple[Part, ...]:
    """The parts of a group, in the order of their rows; ``cells``: what one more part may cost (``PART_CELLS``).

    >>> parts_of(2, (2, 1), 100)
    (Part(rows=(0, 5), keys=((0, 5),)),)
    >>> parts_of(2, (2, 1), 5)
    (Part(rows=(0, 4), keys=((0, 4),)), Part(rows=(4, 5), keys=((0, 2), (4, 5))))
    """
    first, *others = completions
    chain = prompt + first
    apart = chain**2 + sum(length * (prompt + length) for length in others)
    total = chain + sum(others)
    if total**2 - apart < cells * len(others):
        return (Part((0, total), ((0, total),)),)
    parts = [Part((at, end), ((0, end),)) for at, end in _blocks(chain, cells)]
    start = chain
    for length in others:
        for at, end in _blocks(length, cells):
            own = (start, start + end)
            parts.append(Part((start + at, start + end), ((0, prompt), own) if prompt else (own,)))
        start += length
    return tuple(parts)


def _blocks(rows: int, cells: int) -> list[Span]:
    """A causal sequence's rows in blocks of about one size; b of them leave r^2 / 2 (1 + 1 / b) cells to form."""
    count = max(1, round(rows / math.sqrt(2 * cells)) if cells else rows)
    edges = [rows * number // count for number in range(count + 1)]
    return list(pairwise(edges))


def hidden_mask(prompt: int, completions: tuple[int, ...], window: int | None, part: Part) -> Tensor:
    """Which of a part's keys its rows do not see: (rows, keys) bool. Of the prompt or their own completion, up to themselves."""
    lengths = (prompt, *completions)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(prompt), *(prompt + torch.arange(length) for length in completions)])
    rows, keys = torch.arange(*part.rows)[:, None], torch.cat([torch.arange(*span) for span in part.keys])[None, :]
    hidden = (keys > rows) | ((owner[keys] != 0) & (owner[keys] != owner[rows]))
    if window is not None:
        hidden |= place[keys] <= place[rows] - window
    return hidden
