"""Many low-rank adapters beside one base, each token of a batch with its own.

The adapters that a batch needs are stacked: A = [A1; A2; ...], B = [s1 B1, s2 B2, ...]. Then

    y = x W^T + b + (m * (x A^T)) B^T

where m keeps for every token the columns of its own adapter, so that a batch of any mixture costs two narrow products
a layer and a base token (no columns) gets exactly its base's y. The base's modules stay as they are: the sum is added
by a forward hook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.core.errors import InputError
from preftune.modeling.lineage import PREFIX, Factors
from preftune.modeling.load import one_line

MOST_STACKED = 8
BASE = -1


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """Stacked factors of one layer: a (R, in), b (out, R), owners (R,) the number of each column's adapter."""

    a: Tensor
    b: Tensor
    owners: tuple[int, ...]


class AdapterBank:
    """Adapters of one base in memory, by number.

    Attributes
        sizes: bytes of each adapter, by number, least recently used first.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._layers = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        self._factors: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._hooked: set[str] = set()
        self._stacked: tuple[int, ...] = ()
        self._stacks: dict[str, _Stack] = {}
        self._owners: Tensor | None = None  # of the tokens of the pass that runs, (tokens,); None: no adapter at all
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._count = 0
        self.sizes: dict[int, int] = {}

    def add(self, factors: Factors) -> int:
        """Keep an adapter; its number.

        Raises
            InputError: it adapts a layer that the base does not have, or one of another shape, or has values that are
                not finite (they would spread to others in the batch).
        """
        like = next(self._base.parameters())
        kept = {}
        for name, (a, b) in factors.items():
            layer = self._layers.get(name)
            if layer is None:
                raise InputError(
                    f"the adapter has weights for {name}, which is no linear layer of its base; it is another model's"
                )
            weight = layer.weight
            wide, high = weight.shape if isinstance(layer, Conv1D) else weight.shape[::-1]
            if a.shape[1] != wide or b.shape[0] != high:
                raise InputError(
                    f"the adapter's weights for {name} are of {a.shape[1]} by {b.shape[0]}, the base's of {wide} by {high}; "
                    "it is another model's"
                )
            if not (a.isfinite().all() and b.isfinite().all()):
                raise InputError(f"the adapter has weights that are not finite in {name}; its training went wrong")
            kept[name] = (a.to(like.device, like.dtype).contiguous(), b.to(like.device, like.dtype).contiguous())
        number, self._count = self._count, self._count + 1
        self._factors[number] = kept
        self.sizes[number] = sum(part.numel() * part.element_size() for both in kept.values() for part in both)
        for name in kept.keys() - self._hooked:
            self._layers[name].register_forward_hook(self._hook(name))
            self._hooked.add(name)
        return number

    def remove(self, number: int) -> None:
        """Forget an adapter that nobody uses."""
        self._factors.pop(number)
        self.sizes.pop(number)
        if number in self._stacked:
            self._stacked = ()
            self._stacks = {}

    def use(self, numbers: Sequence[int]) -> None:
        """Before a forward pass over a flat row: the adapter of every token, ``BASE`` for none."""
        wanted = sorted(set(numbers) - {BASE})
        self._kept = {}
        if not wanted:
            self._owners = None
            return
        for number in wanted:
            self.sizes[number] = self.sizes.pop(number)
        if not set(wanted) <= set(self._stacked):
            known = [number for number in self._stacked if number in self._factors and number not in wanted]
            room = max(0, MOST_STACKED - len(wanted))
            self._stack((*known[len(known) - room :], *wanted) if room else tuple(wanted))
        self._owners = torch.tensor(numbers, device=next(self._base.parameters()).device)

    def _stack(self, numbers: tuple[int, ...]) -> None:
        self._stacked, self._stacks = numbers, {}
        for name in self._hooked:
            parts = [(number, *self._factors[number][name]) for number in numbers if name in self._factors[number]]
            if parts:
                owners = tuple(number for number, a, _ in parts for _ in range(len(a)))
                self._stacks[name] = _Stack(torch.cat([a for _, a, _ in parts]), torch.cat([b for _, _, b in parts], 1), owners)

    def _mask(self, owners: tuple[int, ...], like: Tensor) -> Tensor:
        """(tokens, R): one where a column is of the token's own adapter."""
        if owners not in self._kept:
            tokens = cast(Tensor, self._owners)
            columns = torch.tensor(owners, device=like.device)
            self._kept[owners] = (tokens[:, None] == columns[None]).to(like.dtype)
        return self._kept[owners]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            del module
            stack = self._stacks.get(name)
            if self._owners is None or stack is None:
                return y
            inner = nn.functional.linear(args[0].reshape(-1, args[0].shape[-1]), stack.a)
            inner = inner * self._mask(stack.owners, inner)
            return torch.addmm(y.reshape(-1, y.shape[-1]), inner, stack.b.t()).view(y.shape)

        return add


def read_factors(folder: str) -> Factors:
    """A and s B of every layer of a plain adapter folder (``serving.placing`` says which are plain), float32.

    Raises
        InputError: files that are missing or damaged.
    """
    with one_line(folder):
        config = peft.LoraConfig.from_pretrained(folder)
        weights: Mapping[str, Tensor] = load_peft_weights(folder, device="cpu")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a in weights.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = weights.get(key.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise InputError(f"{folder}: has lora_A but no lora_B for {name}; the adapter is incomplete")
        found[name] = (a.float(), b.float() * _scale(config, name))
    if not found:
        raise InputError(f"{folder}: its adapter holds no low-rank matrices")
    return found


def _scale(config: Any, name: str) -> float:
    """alpha / r, or alpha / sqrt(r); both may be given by layer."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha / math.sqrt(rank)) if config.use_rslora else float(alpha / rank)


def adapter_bytes(folder: str) -> int:
    """Bytes of an adapter's files: what it will take of memory in float32, about."""
    return sum(path.stat().st_size for path in Path(folder).glob("adapter_model*"))
