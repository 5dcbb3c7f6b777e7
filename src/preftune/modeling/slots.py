"""Keys and values of many conversations at once, and the attention that reads them.

One forward pass runs over a flat row of tokens: the newest token of every conversation that is being answered, then
pieces of prompts. Nothing is padded; only attention knows which token belongs to whom. As with packs
(:mod:`preftune.modeling.attention`) the layout travels as a keyword argument, so there is no global state.

Conversations that are answered lie in shelves of 64, 128, 256 ... tokens, each shelf a tensor (rows, kv_heads, room, D)
per layer whose first rows are in use: at most half of a row is unused, a batched product needs no gathering, and one
that leaves is replaced by the last. A prompt is read in pieces into tensors of its own and then put on a shelf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from preftune.modeling.attention import arrived
from preftune.modeling.layout import Call

SLOTS = "preftune_slots"
SMALLEST_ROOM = 64


@dataclass(slots=True, eq=False)
class SlotRow:
    """One conversation. length: tokens whose keys are kept. adapter: its number in the bank, or -1.

    own: keys and values per layer while the prompt is read, (1, kv_heads, tokens, D) each. shelf, place: where it is after.
    """

    adapter: int
    length: int = 0
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shelf: Shelf | None = None
    place: int = 0


class Shelf:
    """Conversations of at most ``room`` tokens; row i of every tensor belongs to ``rows[i]``."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.rows: list[SlotRow] = []
        self.layers: list[tuple[Tensor, Tensor]] = []

    def add(self, row: SlotRow, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put a row here with the keys and values it has so far, (1, kv_heads, length, D) per layer."""
        place = len(self.rows)
        if not self.layers or place >= len(self.layers[0][0]):
            self._grow(max(1, 2 * place), layers)
        for (keys, values), (own_keys, own_values) in zip(self.layers, layers, strict=True):
            keys[place, :, : row.length] = own_keys[0]
            values[place, :, : row.length] = own_values[0]
        self.rows.append(row)
        row.shelf, row.place = self, place

    def take(self, row: SlotRow) -> list[tuple[Tensor, Tensor]]:
        """Views of a row's keys and values."""
        at, n = slice(row.place, row.place + 1), row.length
        return [(keys[at, :, :n], values[at, :, :n]) for keys, values in self.layers]

    def remove(self, row: SlotRow) -> None:
        """Let a row go; the last one moves to its place. What is left behind is zeroed: a NaN there would spread."""
        last = self.rows.pop()
        if last is not row:
            for keys, values in self.layers:
                keys[row.place, :, : last.length] = keys[last.place, :, : last.length]
                values[row.place, :, : last.length] = values[last.place, :, : last.length]
            self.rows[row.place] = last
        for keys, values in self.layers:
            keys[len(self.rows)] = 0
            values[len(self.rows)] = 0
        if last is not row:
            for keys, values in self.layers:
                keys[row.place, :, last.length :] = 0
                values[row.place, :, last.length :] = 0
            last.place = row.place
        row.shelf = None
        if not self.rows:
            self.layers = []

    def _grow(self, rows: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        def wider(part: Tensor, old: Tensor | None) -> Tensor:
            made = part.new_zeros(rows, part.shape[1], self.room, part.shape[3])
            if old is not None:
                made[: len(old)] = old
            return made

        before: Sequence[tuple[Tensor | None, Tensor | None]] = self.layers or [(None, None)] * len(like)
        self.layers = [(wider(k, old_k), wider(v, old_v)) for (k, v), (old_k, old_v) in zip(like, before, strict=True)]


@dataclass(slots=True, eq=False)
class SlotStep:
    """The layout of one forward pass: answered shelves first, then pieces of prompts.

    shelves: those whose rows all get one token, in this order. pieces: (row, number of its tokens here).
    layer: counts the attention calls. trace: what they asked for, where a certificate wants to know.
    """

    shelves: tuple[Shelf, ...]
    pieces: tuple[tuple[SlotRow, int], ...]
    device: torch.device
    layer: int = 0
    trace: list[Call] | None = None
    lengths: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def places(self, number: int) -> Tensor:
        """Where each row of a shelf writes its new token: (rows,)."""
        if number not in self.lengths:
            rows = self.shelves[number].rows
            self.lengths[number] = torch.tensor([row.length for row in rows], device=self.device)
        return self.lengths[number]

    def hidden(self, number: int, window: int | None) -> Tensor:
        """Which kept tokens a shelf's rows do not see: (rows, 1, 1, tokens) bool."""
        key = (number, window)
        if key not in self.masks:
            own = self.places(number)[:, None]
            at = torch.arange(int(own.max()) + 1, device=self.device)[None]
            unseen = at > own
            if window is not None:
                unseen |= at <= own - window
            self.masks[key] = unseen[:, None, None]
        return self.masks[key]


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slot_step: SlotStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query (1, heads, tokens, D), key and value (1, kv_heads, tokens, D).

    Returns (1, tokens, heads, D). CannotShare where the layout did not arrive or an argument is unknown.
    """
    del dropout  # served models are in evaluation mode
    step = arrived(module, slot_step, attention_mask, others)
    if step.trace is not None:
        step.trace.append(Call(type(module).__name__, sliding_window, softcap, s_aux is not None))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    core = _Core(scale, sliding_window, softcap, s_aux)
    layer, at = step.layer, 0
    step.layer += 1
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for number, shelf in enumerate(step.shelves):
        span = slice(at, at + len(shelf.rows))
        at = span.stop
        places = step.places(number)
        keys, values = shelf.layers[layer]
        every = torch.arange(len(shelf.rows), device=places.device)
        keys[every, :, places] = key[0, :, span].transpose(0, 1)
        values[every, :, places] = value[0, :, span].transpose(0, 1)
        unseen = step.hidden(number, sliding_window)
        n, seen = len(shelf.rows), unseen.shape[-1]
        out[span] = core.newest(query[0, :, span].transpose(0, 1), keys[:n, :, :seen], values[:n, :, :seen], unseen)
    for row, count in step.pieces:
        span = slice(at, at + count)
        at = span.stop
        own = key[:, :, span], value[:, :, span]
        if layer < len(row.own):
            own = torch.cat([row.own[layer][0], own[0]], 2), torch.cat([row.own[layer][1], own[1]], 2)
            row.own[layer] = own
        else:
            row.own.append((own[0].contiguous(), own[1].contiguous()))
        out[span] = core.piece(query[:, :, span], *own)[0].transpose(0, 1)
    return out[None], None


AttentionInterface.register(SLOTS, cast(Callable[..., Any], slot_attention))


@dataclass(frozen=True, slots=True)
class _Core:
    """Softmax attention of one layer: scale, window, soft cap and sinks as the model asks for them."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def newest(self, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
        """One token of every row: q (rows, heads, D), k and v (rows, kv_heads, tokens, D) -> (rows, heads, D)."""
        rows, heads, width = q.shape
        grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], width)
        return self._weigh(grouped, k, v, unseen).reshape(rows, heads, -1)

    def piece(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A piece of a prompt that follows what k and v hold before it: q (1, heads, n, D) -> (1, heads, n, D)."""
        count, total = q.shape[2], k.shape[2]
        groups = q.shape[1] // k.shape[1]
        is_plain = self.softcap is None and self.sinks is None
        if is_plain and count == total and (self.window is None or total <= self.window):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=groups > 1)
        at = torch.arange(total, device=q.device)
        seen = at[None] <= at[total - count :, None]
        if self.window is not None:
            seen &= at[None] > at[total - count :, None] - self.window
        if is_plain:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=groups > 1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return self._weigh(q, k, v, ~seen)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor) -> Tensor:
        """Scores in the dtype of q, their softmax in float32: q (rows, K, n, D), k and v (rows, K, tokens, D)."""
        scores = (q @ k.transpose(2, 3)).float() * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(unseen, float("-inf"))
        if self.sinks is None:
            return torch.softmax(scores, -1).to(q.dtype) @ v
        sinks = self.sinks.float().reshape(1, k.shape[1], -1, 1).expand(len(q), -1, scores.shape[2], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1].to(q.dtype) @ v
