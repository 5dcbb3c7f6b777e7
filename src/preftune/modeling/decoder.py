"""The next-token logits of many conversations, whose adapters differ, in one forward pass.

``SlotDecoder`` runs a flat row over kept keys and values (:mod:`preftune.modeling.slots`). A probe at the start
compares it with the model's own plain forward; a model that it does not agree with, or whose state is no plain
key-value cache, is served by ``PlainDecoder``: one conversation after another, each computed as a whole.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from preftune.modeling.adapter_bank import BASE, AdapterBank
from preftune.modeling.attention import CannotShare, attention_name, use_attention
from preftune.modeling.forward import TOLERANCE
from preftune.modeling.laid_out import lay_out_layers
from preftune.modeling.layout import Call
from preftune.modeling.machine import memory_limit
from preftune.modeling.quiet import quiet
from preftune.modeling.sharing import LONGEST_PROBE, position_limits, text_config, trace_fault, why_not_shared
from preftune.modeling.slots import SLOTS, SMALLEST_ROOM, Shelf, SlotRow, SlotStep

PROBE_TOKENS = 24
PROBE_PIECE = 9
SPARE = 0.25
"""Of the memory, what a second copy of the weights may take: one conversation is answered 1.5 to 2 times as fast with it."""


@dataclass(slots=True, eq=False)
class PlainRow:
    """A conversation of the plain decoder: its tokens so far."""

    adapter: int
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.ids)


Row: TypeAlias = SlotRow | PlainRow


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """Tokens that a row gets in one pass. wants: logits of the last one, of all of them, or none."""

    row: Row
    ids: Sequence[int]
    wants: str = "last"


class Decoder(Protocol):
    """What the batcher needs of a model."""

    reason: str
    bank: AdapterBank

    def open(self, adapter: int = BASE) -> Row:
        """A conversation without tokens."""

    def forward(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Add tokens to rows; of each feed its logits, (1 or n or 0, vocabulary), float32.

        Rows that were settled come first and are all there, with one token each.
        """

    def settle(self, row: Row) -> None:
        """The prompt is read: from now on the row gets one token a pass."""

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens, not settled."""

    def close(self, row: Row) -> None:
        """Let a row go, at any time."""

    def bytes_of(self, tokens: int) -> int:
        """Memory that a row of so many tokens takes."""


class SlotDecoder:
    """Continuous batches over kept keys and values.

    Parameters
        base: in evaluation mode; its attention implementation is changed for good.

    Raises
        CannotShare: the model's logits differ on the probe, or it cannot take the layout; it is as it was.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        reasons = why_not_shared(base)
        if reasons:
            raise CannotShare("; ".join(reasons))
        self.reason = ""
        self.bank = AdapterBank(base)
        self._base = base
        self._shelves: dict[int, Shelf] = {}
        self._positions = next(iter(position_limits(text_config(base))), 1 << 30)
        self._token_bytes = 0
        self._certify()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._base.parameters()).device

    def open(self, adapter: int = BASE) -> Row:
        """A conversation without tokens."""
        return SlotRow(adapter)

    def forward(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Add tokens to rows; of each feed its logits. See ``Decoder``."""
        return self._run(feeds, None)

    def settle(self, row: Row) -> None:
        """Put a row whose prompt is read on its shelf."""
        assert isinstance(row, SlotRow)
        self._shelve(row, row.own)
        row.own = []

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens, not settled."""
        assert isinstance(row, SlotRow)
        layers = row.own if row.shelf is None else row.shelf.take(row)
        return SlotRow(row.adapter, row.length, [(keys.clone(), values.clone()) for keys, values in layers])

    def close(self, row: Row) -> None:
        """Let a row go."""
        assert isinstance(row, SlotRow)
        row.own = []
        if row.shelf is not None:
            row.shelf.remove(row)

    def bytes_of(self, tokens: int) -> int:
        """Memory that a row of so many tokens takes on its shelf."""
        return self._room(tokens) * self._token_bytes

    def _room(self, tokens: int) -> int:
        room = SMALLEST_ROOM
        while room < tokens:
            room *= 2
        return max(min(room, self._positions), tokens)

    def _shelve(self, row: SlotRow, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        room = self._room(row.length + 1)
        self._shelves.setdefault(room, Shelf(room)).add(row, layers)

    def _run(self, feeds: Sequence[Feed], trace: list[Call] | None) -> list[Tensor]:
        feed_of = {id(feed.row): number for number, feed in enumerate(feeds)}
        for feed in feeds:  # those that outgrow their shelf
            row = cast(SlotRow, feed.row)
            if row.shelf is not None and row.length >= row.shelf.room:
                layers = [(keys.clone(), values.clone()) for keys, values in row.shelf.take(row)]
                row.shelf.remove(row)
                self._shelve(row, layers)
        shelves = tuple(shelf for shelf in self._shelves.values() if shelf.rows)
        pieces = tuple((cast(SlotRow, feed.row), len(feed.ids)) for feed in feeds if cast(SlotRow, feed.row).shelf is None)
        order = [feed_of[id(row)] for shelf in shelves for row in shelf.rows]
        order += [feed_of[id(row)] for row, _ in pieces]
        assert len(order) == len(feeds), "every settled row gets a token in every pass"
        ids: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        wanted: list[int] = []
        counts: list[int] = []
        for number in order:
            feed, row = feeds[number], cast(SlotRow, feeds[number].row)
            count = len(feed.ids)
            first = {"last": count - 1, "all": 0, "none": count}[feed.wants]
            wanted.extend(range(len(ids) + first, len(ids) + count))
            counts.append(count - first)
            ids.extend(feed.ids)
            positions.extend(range(row.length, row.length + count))
            owners.extend([row.adapter] * count)
        logits = self._logits(ids, positions, owners, wanted, SlotStep(shelves, pieces, self.device, trace=trace))
        for feed in feeds:
            cast(SlotRow, feed.row).length += len(feed.ids)
        parts: list[Tensor] = [logits[:0]] * len(feeds)
        for number, part in zip(order, torch.split(logits, counts), strict=True):
            parts[number] = part
        return parts

    def _logits(self, ids: list[int], positions: list[int], owners: list[int], wanted: list[int], step: SlotStep) -> Tensor:
        self.bank.use(owners)
        with torch.inference_mode():
            out = self._base(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self.device),
                use_cache=False,
                slot_step=step,
            )
        return cast(Tensor, out.logits)[0].float()

    def _certify(self) -> None:
        """Compare prompts read in pieces and answered together with plain forward passes, token by token."""
        base = self._base
        before = attention_name(base)
        config = text_config(base)
        window = getattr(config, "sliding_window", None)
        span = PROBE_TOKENS if not isinstance(window, int) or window + 12 > LONGEST_PROBE else window + 12
        span = max(4, min(span, self._positions - 1))
        draw = random.Random(0)
        rows = [
            [draw.randrange(min(3, config.vocab_size - 1), config.vocab_size) for _ in range(count)]
            for count in (span, max(3, span // 2))
        ]
        with torch.inference_mode(), quiet():
            expected = [
                base(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0].float() for ids in rows
            ]
            use_attention(base, SLOTS)
            try:
                fault = self._compare(rows, expected)
            except (CannotShare, TypeError, RuntimeError, IndexError, ValueError) as error:
                fault = str(error).splitlines()[0]
        if fault:
            base.set_attn_implementation(before)
            raise CannotShare(fault)

    def _compare(self, rows: list[list[int]], expected: list[Tensor]) -> str:
        base = self._base
        parts: list[list[Tensor]] = [[], []]
        opened = [self.open(), self.open()]
        heads = [len(ids) // 2 for ids in rows]
        for start in range(0, max(heads), PROBE_PIECE):
            feeds = [
                Feed(row, ids[start : min(start + PROBE_PIECE, head)], "all")
                for row, ids, head in zip(opened, rows, heads, strict=True)
                if start < head
            ]
            trace: list[Call] = []
            for feed, part in zip(feeds, self._run(feeds, trace), strict=True):
                parts[opened.index(feed.row)].append(part)
            fault = trace_fault(base, trace)
            if fault is not None:
                return fault
        self._token_bytes = sum(
            part.element_size() * part.shape[1] * part.shape[3] for both in cast(SlotRow, opened[0]).own for part in both
        )
        for row in opened:
            self.settle(row)
        for place in range(max(len(ids) - head for ids, head in zip(rows, heads, strict=True))):
            alive = [number for number in (0, 1) if heads[number] + place < len(rows[number])]
            for number in {0, 1} - set(alive):
                if cast(SlotRow, opened[number]).shelf is not None:
                    self.close(opened[number])
            feeds = [Feed(opened[number], [rows[number][heads[number] + place]]) for number in alive]
            for number, part in zip(alive, self._run(feeds, None), strict=True):
                parts[number].append(part)
        for row in opened:
            self.close(row)
        mean, most = TOLERANCE[base.dtype]
        got = torch.cat([torch.log_softmax(torch.cat(part), -1) for part in parts])
        gap = (got - torch.cat([torch.log_softmax(one, -1) for one in expected])).abs()
        # the bulk of a vocabulary is far in the tail, where rounding is of no interest
        gap = gap.gather(1, got.topk(min(32, got.shape[1]), -1).indices)
        if gap.mean() <= mean and gap.max() <= most:
            return ""
        return f"its log-probabilities in a mixed batch differ from plain ones by {gap.max():.2g} nats on a probe"


class PlainDecoder:
    """One conversation after another, each computed as a whole, by the model's own forward: slow, and right for any model.

    reason: why the model is not served in batches.
    """

    def __init__(self, base: PreTrainedModel, reason: str) -> None:
        self.reason = reason
        self.bank = AdapterBank(base)
        self._base = base

    def open(self, adapter: int = BASE) -> Row:
        """A conversation without tokens."""
        return PlainRow(adapter)

    def forward(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Add tokens to rows; of each feed its logits. See ``Decoder``."""
        parts = []
        device = next(self._base.parameters()).device
        for feed in feeds:
            row = cast(PlainRow, feed.row)
            row.ids.extend(feed.ids)
            if feed.wants == "none":
                parts.append(torch.empty(0, text_config(self._base).vocab_size))
                continue
            self.bank.use([row.adapter] * len(row.ids))
            keep = 1 if feed.wants == "last" else len(feed.ids)
            with torch.inference_mode():
                logits = self._base(input_ids=torch.tensor([row.ids], device=device), use_cache=False).logits
            parts.append(logits[0, -keep:].float())
        return parts

    def settle(self, row: Row) -> None:
        """Nothing to do."""

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens."""
        return PlainRow(row.adapter, list(cast(PlainRow, row).ids))

    def close(self, row: Row) -> None:
        """Let a row go."""
        cast(PlainRow, row).ids = []

    def bytes_of(self, tokens: int) -> int:
        """Nothing is kept but ids."""
        return 8 * tokens


def decoder_of(base: PreTrainedModel) -> SlotDecoder | PlainDecoder:
    """Batches where the model agrees with itself in them, else one after another.

    The model answers and does not train. On a CPU with room its weights are laid out for their products before it is asked
    whether it agrees (:mod:`preftune.modeling.laid_out`).
    """
    base.requires_grad_(requires_grad=False)
    limit = memory_limit(base.device)
    lay_out_layers(base, math.inf if limit is None else SPARE * limit.num_bytes)
    try:
        return SlotDecoder(base)
    except CannotShare as error:
        return PlainDecoder(base, str(error))
